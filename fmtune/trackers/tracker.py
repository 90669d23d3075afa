"""What fmtune wants of a tracking service."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from fmtune.checkpoint import read_json
from fmtune.config import TrialConfig
from fmtune.run import RunFolder, State
from fmtune.training import EpochMetrics


@dataclass(frozen=True)
class TrackedRun:
    """What trackers know a run by.

    Attributes:
        name: of its folder, for people.
        key: tells it from others of that name, and is the same when the run is resumed.
        folder: where a library may put files of its own.
    """

    name: str
    key: str
    folder: Path

    @classmethod
    def of(cls, folder: RunFolder) -> Self:
        name = folder.path.resolve().name
        started = read_json(folder.environment)["started"]
        return cls(name, hashlib.sha256(f"{name} {started}".encode()).hexdigest()[:12], folder.path.resolve())


class Tracker(Protocol):
    """One tracking service; its calls may wait for a server, and raise what the service's library raises.

    A run that goes on starts again, and so do the trials of it that go on: they are the same ones to the service.
    """

    name: str

    def start_run(self, run: TrackedRun) -> None: ...

    def start_trial(self, number: int, config: TrialConfig) -> None: ...

    def log_epoch(self, number: int, metrics: EpochMetrics) -> None: ...

    def end_trial(self, number: int, state: State) -> None: ...

    def end_run(self, summary: Mapping[str, Any] | None) -> None:
        """The run is over, with what summary.json says, or None where it was cut short.

        Trials that have not ended were stopped by the end of the time, or cut short too.
        """


def select_metrics(metrics: EpochMetrics) -> dict[str, float]:
    """What an epoch measured, by name."""
    return {name: value for name, value in metrics.as_dict().items() if name != "epoch" and value is not None}


def select_figures(summary: Mapping[str, Any]) -> dict[str, float]:
    """The figures of summary.json, the test accuracy with the ends of its 95% interval."""
    low, high = summary["test_interval"] or (None, None)
    baseline = summary["baseline"] or {}
    figures = {
        **{name: summary[name] for name in ("best_trial", "val_accuracy", "val_loss", "test_accuracy", "test_loss")},
        "test_accuracy_low": low,
        "test_accuracy_high": high,
        "baseline_val_accuracy": baseline.get("val_accuracy"),
        "baseline_test_accuracy": baseline.get("test_accuracy"),
        **{name: summary[name] for name in ("seconds", "images_trained")},
    }
    return {name: value for name, value in figures.items() if value is not None}
