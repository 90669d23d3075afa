"""A run folder as typed data."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open

from fmtune.calibration import Bin, Calibration, Mistake
from fmtune.checkpoint import read_json
from fmtune.config import Scalar, TrialConfig
from fmtune.errors import RunFolderError
from fmtune.ranges import Choice, Range
from fmtune.run import RunFolder
from fmtune.space import Space
from fmtune.training import EpochMetrics

STATES = {"complete": "complete", "pruned": "stopped early", "failed": "failed", "running": "unfinished"}
"""What people read for the states of trials.csv."""
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""Ends of the names of tensors that a network keeps and does not train."""


@dataclass(frozen=True)
class Trial:
    """A row of trials.csv, and the trial's epochs; values are None where nothing finite was measured.

    `objectives` are what several of them have beside accuracy, and `is_on_front` whether no trial beats it in all.
    """

    number: int
    state: str
    epoch: int
    val_accuracy: float | None
    val_loss: float | None
    seconds: float
    params: Mapping[str, Scalar]
    epochs: Sequence[EpochMetrics]
    objectives: Mapping[str, float | None] = field(default_factory=dict)
    is_on_front: bool = False

    def measured(self, metric: str) -> float | None:
        """`val_accuracy` or `val_loss` after its last epoch."""
        return self.val_accuracy if metric == "val_accuracy" else self.val_loss

    def measured_at(self, metric: str, epoch: int) -> float | None:
        """The metric after an epoch, or after the last one if it ran to an earlier end; None if it never came there."""
        if self.epoch < epoch and self.state != "complete":
            return None
        reached = [measured for measured in self.epochs if measured.epoch <= epoch]
        return finite(reached[-1].as_dict()[metric]) if reached else None


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: where it is.
        summary: content of summary.json.
        environment: content of environment.json.
        space: what was searched or trained; `yaml` is its text.
        trials: in the order of their numbers.
        config: what the kept model was trained with.
        classes: names of the classes that it tells apart.
        parameters: number of its weights.
        test: `Measured.as_dict()` of the kept model on the test split, if there was one.
        calibration: of the kept model on the test split; None where it was not measured, as in runs of older versions.
        mistakes: its surest ones there, the surest first; None likewise.
    """

    folder: RunFolder
    summary: Mapping[str, Any]
    environment: Mapping[str, Any]
    space: Space
    yaml: str
    trials: Sequence[Trial]
    config: TrialConfig
    classes: Sequence[str]
    parameters: int
    test: Mapping[str, Any] | None
    calibration: Calibration | None
    mistakes: Sequence[Mistake] | None

    @property
    def name(self) -> str:
        return self.folder.path.resolve().name

    @property
    def metric(self) -> str:
        """What decided between trials."""
        return self.space.search.metric

    @property
    def larger(self) -> bool:
        """Whether more of the metric is better."""
        return self.space.search.mode == "max"

    @property
    def is_single(self) -> bool:
        """Whether one configuration was trained, and nothing searched."""
        return self.summary["baseline"] is None and not self.space.ranges

    @cached_property
    def best(self) -> Trial | None:
        """The trial whose configuration was kept."""
        return next((trial for trial in self.trials if trial.number == self.summary["best_trial"]), None)

    @property
    def baseline(self) -> Trial | None:
        return self.trials[0] if self.summary["baseline"] is not None and self.trials else None

    @property
    def searched(self) -> list[Trial]:
        """Trials drawn from the space; the baseline need not lie in it."""
        return [trial for trial in self.trials if trial is not self.baseline]

    def value(self, trial: Trial) -> float | None:
        return trial.measured(self.metric)

    def is_better(self, value: float, other: float) -> bool:
        return value > other if self.larger else value < other


def read_run(folder: RunFolder) -> Run:
    """Read all that the report shows.

    Raises:
        RunFolderError: the run has not finished, or its model is not there.
        SpaceError: its space.yaml is no search space.
    """
    summary = folder.read_summary()
    space = Space.load(folder.space)
    test = read_json(_find_best(folder, "metrics.json")).get("test")
    measured = test or {}
    calibration, mistakes = measured.get("calibration"), measured.get("mistakes")
    return Run(
        folder=folder,
        summary=summary,
        environment=read_json(folder.environment),
        space=space,
        yaml=folder.space.read_text(encoding="utf-8"),
        trials=_read_trials(folder, space),
        config=TrialConfig.model_validate(read_json(_find_best(folder, "config.json"))["trial"]),
        classes=[entry["name"] for entry in read_json(_find_best(folder, "classes.json"))],
        parameters=_count_parameters(_find_best(folder, "model.safetensors")),
        test=test,
        calibration=calibration and _parse_calibration(calibration),
        mistakes=None if mistakes is None else [Mistake(**mistake) for mistake in mistakes],
    )


def _find_best(folder: RunFolder, name: str) -> Path:
    path = folder.best / name
    if not path.exists():
        raise RunFolderError(f"{path}: no such file; expected a finished run")
    return path


def _count_parameters(path: Path) -> int:
    """Number of weights by the file's header alone; the statistics of batch norms are none."""
    with safe_open(path, framework="numpy") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 (it is no mapping)
    return sum(math.prod(shape) for key, shape in shapes.items() if not key.endswith(_STATISTICS))


def _parse_calibration(content: Mapping[str, Any]) -> Calibration:
    return Calibration(content["ece"], [Bin(**entry) for entry in content["bins"]])


def _read_trials(folder: RunFolder, space: Space) -> list[Trial]:
    history = folder.read_history()
    with folder.trials.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    trials = [_parse_trial(row, space, history.get(int(row["number"]), [])) for row in rows]
    return sorted(trials, key=lambda trial: trial.number)


def _parse_trial(row: Mapping[str, str], space: Space, epochs: Sequence[EpochMetrics]) -> Trial:
    texts = {key: text for key in space.ranges if (text := row.get(f"params.{key}"))}
    return Trial(
        number=int(row["number"]),
        state=row["state"],
        epoch=int(row["epoch"]),
        val_accuracy=_parse_number(row["val_accuracy"]),
        val_loss=_parse_number(row["val_loss"]),
        seconds=float(row["seconds"]),
        params={key: _parse_value(text, space.ranges[key]) for key, text in texts.items()},
        epochs=epochs,
        objectives={name: _parse_number(row[name]) for name in space.search.objectives[1:]},
        is_on_front=row.get("pareto") == "True",
    )


def _parse_value(text: str, searched: Range) -> Scalar:
    """A parameter as its range draws it."""
    if text == "null":
        return None
    if isinstance(searched, Choice):
        by_text = {str(value): value for value in searched.values}
        # The baseline may have a value that the space has not.
        return by_text.get(text, text)
    number = _parse_number(text)
    return int(number) if number is not None and searched.kind == "int" else number


def _parse_number(text: str) -> float | None:
    return finite(float(text)) if text else None


def finite(value: float | None) -> float | None:
    """The value, or None for what JSON and plots have no place for."""
    return value if value is not None and math.isfinite(value) else None
