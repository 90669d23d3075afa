"""The sections on the kept model: its classes, its mistakes and its confidence on the test split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fmtune.calibration import Calibration, Mistake
from fmtune.report import plots
from fmtune.report.document import Card, Cards, Gallery, Heading, Part, Picture, Plot, Section, Table, Text
from fmtune.report.findings import (
    confusions,
    count_mistakes,
    describe_error,
    describe_weakest,
    most_confused,
    weigh_confidence,
)
from fmtune.report.read import Run
from fmtune.report.words import percent, plural, short, surely

_NAME_LENGTH = 40
"""Letters of a class's name that a picture's caption has room for."""


def create_classes(run: Run) -> Section:
    """How well each class is told from the others."""
    if run.test is None:
        text = "No test split was measured class by class; fmtune evaluate RUN --data FILE does it for labelled images."
        return Section("classes", "Classes", [Text(text)])
    rows = run.test["per_class"]
    header = ["class", "images", "precision", "recall", "F1"]
    cells = [[r["name"], f"{r['images']:,}", *(percent(r[key]) for key in ("precision", "recall", "f1"))] for r in rows]
    weakest = describe_weakest(run.test)
    parts: list[Part] = [Text(weakest)] if weakest else []
    parts.append(Table("Precision, recall and F1 of each class on the test split", header, cells))
    return Section("classes", "Classes", [*parts, *_confusion(run.test)])


def _confusion(test: Mapping[str, Any]) -> list[Part]:
    chosen, matrix = most_confused(test["confusion"]), test["confusion"]
    caption = "Confusion matrix: rows are the true class, columns the predicted one; the more colour, the larger the "
    caption += "share of the true class."
    if len(chosen) < len(matrix):
        caption += f" The {len(chosen)} of {len(matrix)} classes with most mistakes are shown."
    figure = plots.draw_confusion([row["name"] for row in test["per_class"]], matrix, chosen)
    parts: list[Part] = [Heading("Confusion"), Plot("confusion-plot", caption, figure, "square")]
    mistakes = confusions(test)
    if mistakes:
        rows = [[true, predicted, f"{n:,}", percent(share)] for true, predicted, n, share in mistakes]
        header = ["true class", "taken for", "images", "share of the class"]
        parts.append(Table("The most frequent mistakes", header, rows))
    return parts


def create_mistakes(run: Run) -> Section:
    """The images that the model was surest of and wrong about."""
    title = "Most confident mistakes"
    if run.test is None or run.mistakes is None:
        return Section("mistakes", title, [Text(_describe_missing(run, "mistakes"))])
    if not run.mistakes:
        return Section("mistakes", title, [Text("Every image of the test split was taken for what it is.")])
    wrong, images = count_mistakes(run.test)
    text = (
        f"{wrong:,} of {plural(images, 'test image')} were taken for another class. Of these {len(run.mistakes)} the "
        "model was surest. Look for labels that are wrong and images that fit two classes, which are to be mended in "
        "the data, and for a kind of image that comes again, of which more training images would help. Rows count "
        "from 0."
    )
    return Section("mistakes", title, [Text(text), _gallery(run, run.mistakes)])


def _gallery(run: Run, mistakes: Sequence[Mistake]) -> Gallery:
    names = [short(name, _NAME_LENGTH) for name in run.classes]
    pictures = [
        Picture(
            image=mistake.image,
            alt=f"Test image of row {mistake.row}: {names[mistake.true]}, taken for {names[mistake.predicted]}",
            lines=[
                f"taken for {names[mistake.predicted]} with {surely(mistake.probability)},",
                f"is {names[mistake.true]},",
                f"row {mistake.row}",
            ],
        )
        for mistake in mistakes
    ]
    rows = [[f"row {m.row}", run.classes[m.true], run.classes[m.predicted], surely(m.probability)] for m in mistakes]
    header = ["test image", "true class", "taken for", "probability"]
    _, height, width = run.summary["dataset"]["shape"]
    return Gallery("mistakes", pictures, width, height, Table("The mistakes with most confidence", header, rows))


def create_calibration(run: Run) -> Section:
    """Whether the model's probabilities mean what they say."""
    title = "Calibration"
    if run.calibration is None:
        return Section("calibration", title, [Text(_describe_missing(run, "calibration"))])
    trust = weigh_confidence(run.calibration, run.config.optim.label_smoothing)
    cards = [
        Card("Expected calibration error", f"{100 * run.calibration.ece:.2f}", "percentage points"),
        Card("Mean confidence", percent(trust.confidence), "probability of the predicted class"),
        Card("Test accuracy", percent(trust.accuracy), "share of the predictions that are right"),
    ]
    caption = (
        f"Reliability: accuracy over confidence in {len(run.calibration.bins)} bins, with 95% intervals (Wilson). "
        "Points below the dashed line are surer than right, points above it less sure. The bars are the share of the "
        "images in each bin."
    )
    parts: list[Part] = [
        Cards(cards),
        Text(trust.text, "verdict" if trust.kind == "fair" else "warning"),
        Text(describe_error(run.calibration)),
        Plot("reliability-plot", caption, plots.draw_reliability(run.calibration.bins)),
        _bins(run.calibration),
    ]
    return Section("calibration", title, parts)


def _bins(calibration: Calibration) -> Table:
    rows = [
        [f"{100 * b.low:.1f}% to {100 * b.high:.1f}%", f"{b.images:,}", percent(b.confidence), percent(b.accuracy)]
        for b in calibration.bins
    ]
    header = ["confidence", "images", "mean confidence", "accuracy"]
    return Table("Bins of confidence", header, rows, folded="Bins as a table")


def _describe_missing(run: Run, what: str) -> str:
    if run.test is None:
        return f"There was no test split to measure {what} on."
    return f"There is no record of {what}: the run is older than it."
