"""What the numbers of a run say: sentences and selections, with no HTML and no plots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fmtune.predict import wilson_interval
from fmtune.report.read import Run, Trial, finite
from fmtune.report.words import percent, plural
from fmtune.training import EpochMetrics

_RISE = 1.02
"""Validation loss counts as turned up when it ends this much above its lowest; less is the noise of small splits."""
_FALL = 0.98
"""And as still falling when the last epoch took it below this share of the best one before."""


@dataclass(frozen=True)
class Diagnosis:
    """What learning curves show.

    `epoch` is where the validation loss was lowest, None without validation.
    """

    kind: Literal["overfitting", "learning", "level", "short"]
    epoch: int | None
    text: str


def diagnose(epochs: Sequence[EpochMetrics]) -> Diagnosis:
    """Over-fitting: validation loss turned up since its lowest epoch while training loss went on falling."""
    curve = [(e.val_loss, e) for e in epochs if e.val_loss is not None and math.isfinite(e.val_loss)]
    if len(curve) < 2:
        return Diagnosis("short", None, "Too few epochs were validated to tell over-fitting from learning.")
    lowest, at = min(curve, key=lambda pair: pair[0])
    end, last = curve[-1]
    if end > _RISE * lowest and last.train_loss < at.train_loss:
        return Diagnosis("overfitting", at.epoch, _describe_overfitting(at, last, lowest, end))
    if at is last and lowest < _FALL * min(value for value, _ in curve[:-1]):
        text = "Validation loss was still falling at the last epoch: more epochs (trial.epochs) may do better."
        return Diagnosis("learning", at.epoch, text)
    return Diagnosis("level", at.epoch, "No over-fitting: validation loss stays near its lowest to the end.")


def _describe_overfitting(at: EpochMetrics, last: EpochMetrics, lowest: float, end: float) -> str:
    return (
        f"Over-fitting from epoch {at.epoch} on: validation loss turns up, from {lowest:.4f} to {end:.4f} at epoch "
        f"{last.epoch}, while training loss falls from {at.train_loss:.4f} to {last.train_loss:.4f}. What helps, most "
        "first: more images, or stronger trial.augment (translate, erase, mixup or cutmix); more "
        "trial.optim.weight_decay or label_smoothing; fewer epochs (about "
        f"{at.epoch}); a smaller trial.model.width; model.pretrained weights."
    )


@dataclass(frozen=True)
class Gain:
    """The kept model against the baseline, on the test split if both were measured there, else on validation rows.

    `result` and `baseline` are accuracies; intervals are of 95%, None on validation rows.
    """

    split: Literal["test", "validation"]
    result: float | None
    interval: tuple[float, float] | None
    baseline: float | None
    baseline_interval: tuple[float, float] | None

    @property
    def points(self) -> float | None:
        """Percentage points gained."""
        return None if self.result is None or self.baseline is None else 100 * (self.result - self.baseline)


def weigh(run: Run) -> Gain:
    """The result and what it is compared with."""
    summary: Any = run.summary
    reference = summary["baseline"] or {"val_accuracy": None, "test_accuracy": None}
    if summary["test_accuracy"] is None:
        return Gain("validation", summary["val_accuracy"], None, reference["val_accuracy"], None)
    low, high = summary["test_interval"]
    images, accuracy = summary["dataset"]["test"], reference["test_accuracy"]
    around = wilson_interval(round(accuracy * images), images) if accuracy is not None else None
    return Gain("test", summary["test_accuracy"], (low, high), accuracy, around)


def judge(gain: Gain) -> str | None:
    """A sentence on whether the gain is more than chance; None without a baseline or intervals."""
    if gain.points is None or gain.interval is None or gain.baseline_interval is None:
        return None
    if gain.interval[0] > gain.baseline_interval[1]:
        return "The two 95% intervals do not overlap: chance in which images were drawn does not explain the gain."
    if gain.interval[1] < gain.baseline_interval[0]:
        return "The baseline is better, and the two 95% intervals do not overlap: keep the baseline's configuration."
    return (
        "The two 95% intervals overlap: this many test images can't rule out that the difference is chance. "
        "More test images would narrow the intervals."
    )


def running_best(run: Run) -> list[tuple[int, float]]:
    """(number, value) of each trial that set a new best; trials stopped early count only if none ran to its end."""
    measured = [(trial, value) for trial in run.trials if (value := run.value(trial)) is not None]
    complete = [pair for pair in measured if pair[0].state == "complete"]
    records: list[tuple[int, float]] = []
    for trial, value in complete or measured:
        if not records or run.is_better(value, records[-1][1]):
            records.append((trial.number, value))
    return records


def pareto_front(trials: Sequence[Trial]) -> list[Trial]:
    """Trials that no other beats in accuracy with as little training time, cheapest first."""
    usable = [(trial.seconds, -trial.val_accuracy, trial) for trial in trials if trial.val_accuracy is not None]
    front: list[Trial] = []
    best = -math.inf
    for _, negative, trial in sorted(usable, key=lambda entry: entry[:2]):
        if -negative > best:
            best = -negative
            front.append(trial)
    return front


def leaders(run: Run, share: float = 0.1) -> list[Trial]:
    """The best tenth of the searched trials that were measured, one at least; complete trials first."""
    measured = [(value, trial) for trial in run.searched if (value := run.value(trial)) is not None]
    ordered = sorted(measured, key=lambda p: (p[1].state == "complete", p[0] if run.larger else -p[0]), reverse=True)
    return [trial for _, trial in ordered[: math.ceil(share * len(ordered))]]


def confusions(test: Any, count: int = 10) -> list[tuple[str, str, int, float]]:
    """(true name, predicted name, images, share of the true class) of the most frequent mistakes."""
    names, matrix = [row["name"] for row in test["per_class"]], test["confusion"]
    wrong = [
        (names[i], names[j], number, number / sum(line))
        for i, line in enumerate(matrix)
        for j, number in enumerate(line)
        if i != j and number
    ]
    return sorted(wrong, key=lambda entry: -entry[2])[:count]


def describe_counts(run: Run) -> str:
    """How many trials ended which way."""
    counts = run.summary["trials"]
    text = f"{counts['complete']} complete, {counts['pruned']} stopped early"
    text += f", {counts['failed']} failed" if counts["failed"] else ""
    return f"{plural(sum(counts.values()), 'trial')}: {text}"


def describe_best_epoch(epochs: Sequence[EpochMetrics]) -> str:
    """The last epoch's figures in a sentence."""
    if not epochs:
        return "No epoch was finished."
    last = epochs[-1]
    text = f"After epoch {last.epoch}: training loss {last.train_loss:.4f}"
    loss, accuracy = finite(last.val_loss), finite(last.val_accuracy)
    if loss is not None and accuracy is not None:
        text += f", validation loss {loss:.4f}, validation accuracy {percent(accuracy)}"
    return text + "."
