"""Trials told to MLflow and Weights & Biases, beside the run folder.

All of it happens in the driver: nothing of a tracker, its credentials least of all, goes to a worker or into the run
folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fmtune.config import LoggingConfig, TrialConfig
from fmtune.run import RunFolder, State
from fmtune.trackers.lane import Lane
from fmtune.trackers.tracker import TrackedRun, Tracker
from fmtune.training import EpochMetrics

_PATIENCE, _PATIENCE_OF_THE_INTERRUPTED = 30.0, 3.0
"""Seconds that the end of a run waits for what has not arrived."""

__all__ = ["Tracking", "connect_trackers", "track"]


def connect_trackers(config: LoggingConfig) -> list[Tracker]:
    """The trackers that a space asks for, each of them reached once.

    Raises:
        InputError: a package is missing, or a server gives no answer.
    """
    # Imported where they are asked for: each brings packages that take a second or more.
    trackers: list[Tracker] = []
    if config.mlflow is not None:
        from fmtune.trackers.mlflow import connect_mlflow

        trackers.append(connect_mlflow(config.mlflow))
    if config.wandb is not None:
        from fmtune.trackers.wandb import connect_wandb

        trackers.append(connect_wandb(config.wandb))
    return trackers


class Tracking:
    """Passes the events of a run on to its trackers, each of which has a thread of its own.

    So a slow server holds no trial up. A tracker that fails is told nothing more, and the run says so once.
    """

    def __init__(self, trackers: Sequence[Tracker], note: Callable[[str], None]) -> None:
        self._lanes = [Lane(tracker, note) for tracker in trackers]
        self._is_over = False

    def start_run(self, run: TrackedRun) -> None:
        for lane in self._lanes:
            lane.tell(lane.tracker.start_run, run)

    def start_trial(self, number: int, config: TrialConfig) -> None:
        for lane in self._lanes:
            lane.tell(lane.tracker.start_trial, number, config)

    def log_epoch(self, number: int, metrics: EpochMetrics) -> None:
        for lane in self._lanes:
            lane.tell(lane.tracker.log_epoch, number, metrics)

    def end_trial(self, number: int, state: State) -> None:
        for lane in self._lanes:
            lane.tell(lane.tracker.end_trial, number, state)

    def end_run(self, summary: dict[str, Any] | None) -> None:
        """Pass on summary.json's content, or None for a run that was cut short."""
        for lane in self._lanes:
            lane.tell(lane.tracker.end_run, summary)
        self._is_over = True

    def close(self) -> None:
        """Wait until all has arrived, not for long where the run was cut short."""
        patience = _PATIENCE if self._is_over else _PATIENCE_OF_THE_INTERRUPTED
        if not self._is_over:
            self.end_run(None)
        for lane in self._lanes:
            lane.close(patience)


@contextmanager
def track(trackers: Sequence[Tracker], folder: RunFolder, note: Callable[[str], None]) -> Iterator[Tracking]:
    """Tracking of the run in `folder`; `note` gets a sentence for each tracker that fails."""
    tracking = Tracking(trackers, note)
    tracking.start_run(TrackedRun.of(folder))
    try:
        yield tracking
    finally:
        tracking.close()
