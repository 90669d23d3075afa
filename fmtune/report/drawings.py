"""The main plots as PNGs, for where no script runs.

Matplotlib takes a second to import, so import this where something is drawn.
"""

from __future__ import annotations

import base64
import io
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from fmtune.calibration import Mistake
from fmtune.report.findings import accuracy_interval, diagnose, most_confused, pareto_front, running_best
from fmtune.report.plots import WRITTEN_CLASSES
from fmtune.report.read import STATES, Run, Trial, finite
from fmtune.report.words import short, surely
from fmtune.training import EpochMetrics

_INK, _MUTED, _LINE, _STOPPED = "#1b2127", "#55606b", "#d3d9df", "#6b7580"
_ACCENT, _SECOND, _GOOD, _BAD = "#0b5fc0", "#b04a00", "#1a7434", "#b3261e"
_HEAT = "#f1f5fa", "#74abf0"
"""Colours of style.css, in light."""
_STYLE: dict[Any, Any] = {
    "savefig.dpi": 144,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "text.color": _INK,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "legend.frameon": False,
    # A class may be called "$x$".
    "text.parse_math": False,
}
_MARKERS = {"complete": ("o", _ACCENT), "pruned": ("x", _STOPPED), "failed": ("v", _BAD), "running": (".", _STOPPED)}
_WIDE, _SQUARE = (7.0, 4.2), (7.0, 6.6)
"""Inches."""
_COLUMNS = 6
"""Pictures side by side among the mistakes."""

Draw = Callable[[Run, Figure], None]


def write_drawings(run: Run, folder: Path) -> list[Path]:
    """Write `NAME.png` for each plot that the run has something for, named as on the page; returns the paths."""
    folder.mkdir(exist_ok=True)
    paths = []
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # Classes may have names in letters that the font lacks; the tables beside the plots have them.
        warnings.filterwarnings("ignore", "Glyph .* missing from|Matplotlib currently does not support")
        for name, draw in _choose(run).items():
            figure = Figure(_WIDE, layout="constrained")
            FigureCanvasAgg(figure)
            draw(run, figure)
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1])
    return paths


def _choose(run: Run) -> dict[str, Draw]:
    chosen: dict[str, Draw] = {}
    if run.best and run.best.epochs:
        chosen |= {"loss": _draw_loss, "accuracy": _draw_accuracy}
    if not run.is_single:
        chosen |= {"history": _draw_history, "cost": _draw_cost}
    if run.test:
        chosen["confusion"] = _draw_confusion
    if run.mistakes:
        chosen["mistakes"] = _draw_mistakes
    if run.calibration:
        chosen["reliability"] = _draw_reliability
    return chosen


# Learning curves


def _draw_loss(run: Run, figure: Figure) -> None:
    epochs = _epochs(run)
    axes = _create_axes(figure, "epoch", "loss")
    _plot_curve(axes, epochs, "train_loss", "training", _SECOND, "--")
    _plot_curve(axes, epochs, "val_loss", "validation", _ACCENT, "-")
    diagnosis = diagnose(epochs, run.config.epochs)
    if diagnosis.kind == "overfitting" and diagnosis.epoch is not None:
        axes.axvline(diagnosis.epoch, color=_INK, linestyle=":", linewidth=1, label="lowest validation loss")
    _add_legend(figure)


def _draw_accuracy(run: Run, figure: Figure) -> None:
    axes = _create_axes(figure, "epoch", "validation accuracy")
    _plot_curve(axes, _epochs(run), "val_accuracy", "validation", _ACCENT, "-")


def _epochs(run: Run) -> Sequence[EpochMetrics]:
    return run.best.epochs if run.best else []


def _plot_curve(axes: Axes, epochs: Sequence[EpochMetrics], column: str, name: str, color: str, line: str) -> None:
    values = [_number(epoch.as_dict()[column]) for epoch in epochs]
    axes.plot([epoch.epoch for epoch in epochs], values, line, marker="o", markersize=4, color=color, label=name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _number(value: float | None) -> float:
    """NaN, which leaves a gap, for what is not there or not finite."""
    known = finite(value)
    return math.nan if known is None else known


# Search


def _draw_history(run: Run, figure: Figure) -> None:
    axes = _create_axes(figure, "trial", run.metric)
    steps = running_best(run)
    if steps:
        steps.append((run.trials[-1].number, steps[-1][1]))
        axes.step(*zip(*steps, strict=True), where="post", color=_GOOD, label="best so far")
    _plot_trials(axes, run, lambda trial: trial.number, run.value)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _add_legend(figure)


def _draw_cost(run: Run, figure: Figure) -> None:
    axes = _create_axes(figure, "seconds of training", "validation accuracy")
    front = [(trial.seconds, _number(trial.val_accuracy)) for trial in pareto_front(run.trials)]
    if front:
        axes.step(*zip(*front, strict=True), ":", where="post", color=_GOOD, label="Pareto front")
    _plot_trials(axes, run, lambda trial: trial.seconds, lambda trial: trial.val_accuracy)
    _add_legend(figure)


def _plot_trials(axes: Axes, run: Run, x: Callable[[Trial], float], y: Callable[[Trial], float | None]) -> None:
    """A marker for each trial by the way that it ended, one for the baseline and one for the best."""
    groups = [
        (STATES[state], [t for t in run.searched if t.state == state and t is not run.best], marker, color, 30)
        for state, (marker, color) in _MARKERS.items()
    ]
    groups.append(("baseline", [run.baseline] if run.baseline else [], "D", _SECOND, 45))
    groups.append(("best", [run.best] if run.best and run.best is not run.baseline else [], "*", _GOOD, 140))
    for name, trials, marker, color, size in groups:
        shown = [trial for trial in trials if y(trial) is not None]
        if shown:
            values = [_number(y(trial)) for trial in shown]
            axes.scatter(list(map(x, shown)), values, s=size, c=color, marker=marker, label=name, zorder=3)


# The kept model


def _draw_confusion(run: Run, figure: Figure) -> None:
    matrix = np.array(run.test["confusion"] if run.test else [])
    chosen = most_confused(matrix.tolist())
    names = [short(run.classes[i], 14) for i in chosen]
    counts = matrix[np.ix_(chosen, chosen)]
    shares = counts / np.maximum(matrix.sum(axis=1)[chosen], 1)[:, None]
    figure.set_size_inches(_SQUARE)
    axes = _create_axes(figure, "predicted", "true")
    axes.grid(False)
    heat = LinearSegmentedColormap.from_list("heat", _HEAT)
    cells = axes.pcolormesh(shares, cmap=heat, vmin=0, vmax=1, edgecolors="white", linewidth=min(1, 10 / len(chosen)))
    axes.set_aspect("equal")
    axes.invert_yaxis()
    size = "small" if len(chosen) <= WRITTEN_CLASSES else 5
    middles = np.arange(len(chosen)) + 0.5
    axes.set_xticks(middles, names, rotation=60, ha="right", rotation_mode="anchor", fontsize=size)
    axes.set_yticks(middles, names, fontsize=size)
    if len(chosen) > WRITTEN_CLASSES:
        figure.colorbar(cells, label="share of the true class", shrink=0.8)
        return
    for (i, j), count in np.ndenumerate(counts):
        axes.text(j + 0.5, i + 0.5, f"{count}", ha="center", va="center", fontsize="small")


_TALLEST = 3
"""Height over width of a picture that the sheet of mistakes makes room for; one that is taller is drawn smaller."""


def _draw_mistakes(run: Run, figure: Figure) -> None:
    mistakes = run.mistakes or []
    lines = math.ceil(len(mistakes) / _COLUMNS)
    _, height, width = run.summary["dataset"]["shape"]
    figure.set_size_inches(8.4, lines * (0.7 + 1.3 * min(height / width, _TALLEST)))
    places = list(figure.subplots(lines, _COLUMNS, squeeze=False).flat)
    for axes in places:
        axes.axis("off")
    for axes, mistake in zip(places, mistakes, strict=False):
        _draw_mistake(axes, run.classes, mistake)


def _draw_mistake(axes: Axes, classes: Sequence[str], mistake: Mistake) -> None:
    with Image.open(io.BytesIO(base64.b64decode(mistake.image))) as picture:
        axes.imshow(picture.convert("RGB"))
    predicted, true = short(classes[mistake.predicted], 14), short(classes[mistake.true], 14)
    axes.set_title(f"{predicted} {surely(mistake.probability)}\nis {true}\nrow {mistake.row}", fontsize=7)


def _draw_reliability(run: Run, figure: Figure) -> None:
    bins = run.calibration.bins if run.calibration else []
    filled = [b for b in bins if b.images]
    images = sum(b.images for b in filled)
    axes = _create_axes(figure, "confidence, %", "accuracy, %")
    middles, shares = [50 * (b.low + b.high) for b in filled], [100 * b.images / images for b in filled]
    axes.bar(middles, shares, 90 / len(bins), color=_STOPPED, alpha=0.4, label="share of images")
    axes.plot([0, 100], [0, 100], "--", color=_SECOND, label="perfectly calibrated")
    x, y = [100 * _number(b.confidence) for b in filled], np.array([100 * _number(b.accuracy) for b in filled])
    low, high = 100 * np.array([accuracy_interval(b) for b in filled]).T
    # Rounding may put an interval's end beside a share of 0 or 1 by a hair.
    errors = np.maximum([y - low, high - y], 0)
    axes.errorbar(x, y, errors, marker="o", color=_ACCENT, ecolor=_INK, capsize=3, label="accuracy")
    axes.set(xlim=(0, 100), ylim=(0, 103))
    _add_legend(figure)


def _add_legend(figure: Figure) -> None:
    """Above the plot, where it hides nothing."""
    figure.legend(loc="outside upper left", ncols=6, fontsize="small", columnspacing=1.2, handletextpad=0.5)


def _create_axes(figure: Figure, x: str, y: str) -> Axes:
    axes = figure.add_subplot()
    axes.set(xlabel=x, ylabel=y)
    return axes
