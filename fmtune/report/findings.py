"""What the numbers of a run say: sentences and selections, with no HTML and no plots."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fmtune.calibration import Bin, Calibration
from fmtune.outlook import describe_outlook
from fmtune.paired import describe_chance
from fmtune.predict import wilson_interval
from fmtune.report.read import Run, Trial, finite
from fmtune.report.words import listing, percent, plural
from fmtune.training import EpochMetrics

_RISE = 1.02
"""Validation loss counts as turned up when it ends this much above its lowest; less is the noise of small splits."""
_FALL = 0.98
"""And as still falling when the last epoch took it below this share of the best one before."""
MATRIX_CLASSES = 60
"""Classes that a confusion matrix can show; more would be too small to see and too large to ship."""
_BY_CHANCE = 1.5
"""A calibration error up to this many times of what chance gives on average is put down to chance."""
_SCALING = (
    "that is fitted on images held out of the training (temperature scaling; Guo et al., 2017); the predicted classes "
    "stay as they are."
)
_TRUST = {
    "fair": "Well calibrated, as far as so many images can tell: the probabilities can be taken as they stand.",
    "over": "Over-confident: it is surer than it is right, so don't decide by its probabilities as they stand. Two "
    "ways to mend that: more label smoothing in the training (trial.optim.label_smoothing, here {smoothing:g}) or "
    "mixup; or dividing the logits by a temperature above 1 " + _SCALING,
    "under": "Under-confident: it is right more often than its probabilities say. Two ways to mend that: less label "
    "smoothing in the training (trial.optim.label_smoothing, here {smoothing:g}), mixup or cutmix; or dividing the "
    "logits by a temperature below 1 " + _SCALING,
    "mixed": "Too sure in some bins and not sure enough in others, so don't decide by its probabilities as they stand. "
    "One temperature for all (temperature scaling) can't mend both; try other values of label smoothing "
    "(trial.optim.label_smoothing, here {smoothing:g}).",
}


@dataclass(frozen=True)
class Diagnosis:
    """What learning curves show.

    `epoch` is where the validation loss was lowest, None without validation.
    """

    kind: Literal["overfitting", "learning", "level", "short"]
    epoch: int | None
    text: str


def diagnose(epochs: Sequence[EpochMetrics], planned: int) -> Diagnosis:
    """Over-fitting: validation loss turned up since its lowest epoch while training loss went on falling.

    Args:
        epochs: of the training.
        planned: how many it was to have; it may have been cut short.
    """
    curve = [(e.val_loss, e) for e in epochs if e.val_loss is not None and math.isfinite(e.val_loss)]
    if len(curve) < 2:
        return Diagnosis("short", None, "Too few epochs were validated to tell over-fitting from learning.")
    lowest, at = min(curve, key=lambda pair: pair[0])
    end, last = curve[-1]
    if end > _RISE * lowest and last.train_loss < at.train_loss:
        return Diagnosis("overfitting", at.epoch, _describe_overfitting(at, last, lowest, end))
    if at is last and lowest < _FALL * min(value for value, _ in curve[:-1]):
        more = "more epochs (trial.epochs)"
        if last.epoch < planned:
            more = f"it had {last.epoch} of its {planned} epochs, and more time (search.time)"
        text = f"Validation loss was still falling at the last epoch: {more} may do better."
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

    `result` and `baseline` are accuracies; intervals are of 95%, None on validation rows; `difference` is the
    `PairedDifference` of the two on the test split, as summary.json has it.
    """

    split: Literal["test", "validation"]
    result: float | None
    interval: tuple[float, float] | None
    baseline: float | None
    baseline_interval: tuple[float, float] | None
    difference: Mapping[str, Any] | None = None

    @property
    def points(self) -> float | None:
        """Percentage points gained."""
        return None if self.result is None or self.baseline is None else 100 * (self.result - self.baseline)


def weigh(run: Run) -> Gain:
    """The result and what it is compared with."""
    summary: Any = run.summary
    reference = summary["baseline"] or {"val_accuracy": None, "test_accuracy": None, "difference": None}
    if summary["test_accuracy"] is None:
        return Gain("validation", summary["val_accuracy"], None, reference["val_accuracy"], None)
    low, high = summary["test_interval"]
    images, accuracy = summary["dataset"]["test"], reference["test_accuracy"]
    around = wilson_interval(round(accuracy * images), images) if accuracy is not None else None
    return Gain("test", summary["test_accuracy"], (low, high), accuracy, around, reference["difference"])


def judge(gain: Gain) -> str | None:
    """A sentence on whether the gain is more than chance; None where both were not measured on the same test images."""
    if gain.difference is None:
        return None
    gained, lost = (plural(gain.difference[key], "test image") for key in ("gained", "lost"))
    low, high = (100 * end for end in gain.difference["interval"])
    text = (
        f"The result alone has {gained} right, the baseline alone {lost}: a gain of {gain.points:+.2f} points, 95% "
        f"interval {low:+.2f} to {high:+.2f} ({describe_chance(gain.difference['p_value'])}). "
    )
    if gain.difference["p_value"] >= 0.05:
        return text + "So few images can't rule out that this is chance; more of them would narrow the interval."
    if gain.difference["gained"] > gain.difference["lost"]:
        return text + "Chance in which images were drawn does not explain it."
    return text + "The baseline is better, by more than chance: keep the baseline's configuration."


def describe_caveats(run: Run, gain: Gain) -> list[str]:
    """What a reader must know before believing the headline."""
    summary, texts = run.summary, []
    if run.space.data.validation == "test":
        texts.append("The validation rows are the test split (data.validation: test): both say the same.")
    elif gain.split == "validation":
        chose = "" if run.is_single else " The validation accuracy also chose between trials, so expect less elsewhere."
        texts.append(f"There was no test split.{chose} Measure on images that the run has not seen: fmtune evaluate.")
    elif summary["val_accuracy"] is not None:
        chose = ", by which the search chose" if run.metric == "val_accuracy" and not run.is_single else ""
        texts.append(f"Validation accuracy{chose}: {percent(summary['val_accuracy'])}.")
    reference = summary["baseline"]
    if reference and not reference["epochs"]:
        why = f"failed ({reference['cause']})" if reference.get("cause") else "had no time to finish an epoch"
        texts.append(f"The baseline {why}, so there is nothing to compare the result with.")
    elif reference and reference["epochs"] < reference["of_epochs"]:
        done = f"{reference['epochs']} of its {reference['of_epochs']} epochs"
        why = f"failed after {done} ({reference['cause']})" if reference.get("cause") else f"had time for {done} only"
        texts.append(f"The baseline {why}, so the gain is partly one of training longer.")
    if summary["outlook"]:
        texts.append(f"Is more tuning worth it? By the trials so far, {describe_outlook(summary['outlook'])}.")
    return texts


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


def objective_text(name: str) -> str:
    """An objective as people read it."""
    return {"images_per_second": "images a second of training", "parameters": "parameters"}[name]


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


def most_confused(confusion: Sequence[Sequence[int]]) -> list[int]:
    """Classes that a matrix shows: all, or as many as it has room for, those with most mistakes."""
    missed = [sum(row) - row[i] for i, row in enumerate(confusion)]
    return sorted(sorted(range(len(missed)), key=lambda i: -missed[i])[:MATRIX_CLASSES])


def count_mistakes(test: Any) -> tuple[int, int]:
    """(images taken for another class, images) of the test split."""
    images = sum(map(sum, test["confusion"]))
    return images - sum(row[i] for i, row in enumerate(test["confusion"])), images


def describe_weakest(test: Any) -> str | None:
    """The three classes with the lowest F1, of those that the test split has; None where it has none."""
    known = sorted((row for row in test["per_class"] if row["images"]), key=lambda row: row["f1"])
    weakest = [f"{row['name']} ({percent(row['f1'])})" for row in known[:3]]
    return f"Lowest F1 on the test split: {listing(weakest)}." if weakest else None


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


def describe_data(run: Run) -> str:
    """What the run was trained and measured on."""
    data = run.summary["dataset"]
    shape = " x ".join(map(str, data["shape"]))
    rows = f"{data['train']:,} training, {data['validation']:,} validation"
    rows += f" and {data['test']:,} test images" if data["test"] is not None else " images"
    return f"{data['source']} ({data['origin']}): {rows}, {data['classes']} classes, {shape} (channels, height, width)."


@dataclass(frozen=True)
class Trust:
    """How far a model's confidence can be believed; `confidence` is its mean over the test images."""

    kind: Literal["fair", "over", "under", "mixed"]
    confidence: float
    accuracy: float
    text: str


def weigh_confidence(calibration: Calibration, smoothing: float) -> Trust:
    """Whether the model is too sure or not sure enough, and what helps; `smoothing` is that of its labels."""
    images = sum(b.images for b in calibration.bins)
    confidence = sum(b.images * (b.confidence or 0.0) for b in calibration.bins) / images
    accuracy = sum(b.images * (b.accuracy or 0.0) for b in calibration.bins) / images
    gap = confidence - accuracy
    if calibration.ece <= _BY_CHANCE * error_by_chance(calibration.bins):
        kind: Literal["fair", "over", "under", "mixed"] = "fair"
    elif abs(gap) < calibration.ece / 2:
        kind = "mixed"
    else:
        kind = "over" if gap > 0 else "under"
    return Trust(kind, confidence, accuracy, _TRUST[kind].format(smoothing=smoothing))


def describe_error(calibration: Calibration) -> str:
    """What the expected calibration error says."""
    return (
        "A calibrated model is right about nine in ten of the images that it predicts with 90%. The expected "
        "calibration error (ECE; Guo et al., 2017, arXiv:1706.04599) is how far confidence and accuracy lie apart in "
        f"each of {len(calibration.bins)} bins, on average over the test images: {100 * calibration.ece:.2f} "
        f"percentage points. Chance in which images were drawn gives a perfectly calibrated model about "
        f"{100 * error_by_chance(calibration.bins):.2f}."
    )


def error_by_chance(bins: Sequence[Bin]) -> float:
    """About the expected calibration error of a model whose every confidence is true, over images as many as these."""
    images = sum(b.images for b in bins)
    # The share of hits among n images strays from its mean c by sqrt(2 c (1 - c) / (pi n)) on average.
    strayed = [math.sqrt(2 * b.images * b.confidence * (1 - b.confidence) / math.pi) for b in bins if b.confidence]
    return sum(strayed) / images


def accuracy_interval(measured: Bin) -> tuple[float, float]:
    """95% interval of the accuracy in a bin that has images."""
    return wilson_interval(round((measured.accuracy or 0.0) * measured.images), measured.images)
