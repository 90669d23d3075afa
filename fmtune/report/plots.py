"""The figures, as Plotly's JSON.

Colours are names of style.css, such as `--accent`: page.js puts in what they stand for, in light and in dark. A trace's
`customdata` are trial numbers, for which page.js puts in the hover texts that `hover_texts` gives once for all plots.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fmtune.calibration import Bin
from fmtune.ranges import Choice, Range
from fmtune.report.findings import accuracy_interval, leaders, objective_text, pareto_front, running_best
from fmtune.report.markup import plot_text
from fmtune.report.read import STATES, Run, Trial, finite
from fmtune.report.words import decimal, percent, scalar, short
from fmtune.training import EpochMetrics

Figure = dict[str, Any]
"""`data` and `layout` as plotly.js takes them."""
_MARKERS = {
    "complete": {"symbol": "circle", "size": 9, "color": "--accent"},
    "pruned": {"symbol": "x", "size": 7, "color": "--stopped"},
    "failed": {"symbol": "triangle-down", "size": 9, "color": "--bad"},
    "running": {"symbol": "circle-open", "size": 9, "color": "--stopped"},
}
_BASELINE_MARKER = {"symbol": "diamond", "size": 11, "color": "--second"}
_BEST_MARKER = {"symbol": "star", "size": 16, "color": "--good", "line": {"width": 1, "color": "--paper"}}
_CROWD = 50
"""Lines of parallel coordinates from which on they must be faint to be seen through."""
WRITTEN_CLASSES = 12
"""Classes up to which the matrix has room for numbers on a phone."""


def hover_texts(run: Run) -> dict[int, str]:
    """What each trial's markers say: number, state, value and all parameters."""
    return {trial.number: _hover_text(run, trial) for trial in run.trials}


def _hover_text(run: Run, trial: Trial) -> str:
    name = f"trial {trial.number}" + (" (baseline)" if trial is run.baseline else "")
    name += " (best)" if trial is run.best else ""
    lines = [
        f"<b>{name}</b>, {plot_text(STATES.get(trial.state, trial.state))}",
        f"{run.metric} {decimal(run.value(trial))} at epoch {trial.epoch}, {trial.seconds:.1f} s",
        *(plot_text(f"{key} = {short(scalar(value), 40)}") for key, value in trial.params.items()),
    ]
    return "<br>".join(lines)


def draw_result(rows: Sequence[tuple[str, float, tuple[float, float] | None]]) -> Figure:
    """Accuracies with their 95% intervals, the first row on top."""
    colors = ["--accent", "--second"][: len(rows)]
    values = [100 * value for _, value, _ in rows]
    error = _error_bars(values, [around for *_, around in rows]) | {"width": 8}
    trace = _scatter(values, [name for name, *_ in rows], mode="markers", error_x=error)
    trace |= {"marker": {"size": 13, "color": colors}, "hovertemplate": "%{y}: %{x:.2f}%<extra></extra>"}
    axes = {"xaxis": {"title": {"text": "accuracy, %"}}, "yaxis": {"autorange": "reversed", "type": "category"}}
    return _figure([trace], showlegend=False, **axes)


def draw_losses(epochs: Sequence[EpochMetrics], lowest: int | None) -> Figure:
    """Training and validation loss by epoch, with a line where validation was lowest."""
    traces = [
        _curve(epochs, "train_loss", "training", "--second", "dash"),
        _curve(epochs, "val_loss", "validation", "--accent", "solid"),
    ]
    figure = _figure(traces, hovermode="x unified", **_epoch_axes(epochs, "loss"))
    if lowest is not None:
        line = {"color": "--ink", "width": 1, "dash": "dot"}
        shape = {"type": "line", "x0": lowest, "x1": lowest, "y0": 0, "y1": 1, "yref": "paper", "line": line}
        figure["layout"]["shapes"] = [shape]
        figure["layout"]["annotations"] = [_note(lowest, 1.0, " lowest", yref="paper", xanchor="left")]
    return figure


def draw_accuracy(epochs: Sequence[EpochMetrics]) -> Figure:
    """Validation accuracy by epoch."""
    traces = [_curve(epochs, "val_accuracy", "validation", "--accent", "solid")]
    return _figure(traces, hovermode="x unified", showlegend=False, **_epoch_axes(epochs, "validation accuracy"))


def _epoch_axes(epochs: Sequence[EpochMetrics], name: str) -> dict[str, dict[str, Any]]:
    axes = _axes("epoch", name)
    axes["xaxis"] |= _whole(len(epochs))
    return axes


def _curve(epochs: Sequence[EpochMetrics], column: str, name: str, color: str, dash: str) -> dict[str, Any]:
    values = [finite(epoch.as_dict()[column]) for epoch in epochs]
    trace = _scatter([epoch.epoch for epoch in epochs], values, name=name, mode="lines+markers")
    trace |= {"line": {"color": color, "dash": dash, "width": 2}, "marker": {"size": 6}}
    return trace | {"hovertemplate": "%{y:.4f}"}


def draw_history(run: Run) -> Figure:
    """The value of each trial by its number, and the best so far."""
    traces = [_running_best_line(run), *_trial_traces(run, lambda t: t.number, run.value)]
    axes = _axes("trial", run.metric)
    axes["xaxis"] |= _whole(len(run.trials))
    return _figure(traces, **axes)


def _running_best_line(run: Run) -> dict[str, Any]:
    steps = running_best(run)
    if steps:
        steps.append((run.trials[-1].number, steps[-1][1]))
    line = {"shape": "hv", "color": "--good", "width": 2}
    trace = _scatter([x for x, _ in steps], [y for _, y in steps], name="best so far", mode="lines")
    return trace | {"line": line, "hoverinfo": "skip"}


def draw_cost(run: Run) -> Figure:
    """Accuracy over seconds of training, and the Pareto front."""
    front = pareto_front(run.trials)
    line = {"shape": "hv", "color": "--good", "width": 2, "dash": "dot"}
    x, y = [trial.seconds for trial in front], [trial.val_accuracy for trial in front]
    edge = _scatter(x, y, name="Pareto front", mode="lines") | {"line": line, "hoverinfo": "skip"}
    traces = [edge, *_trial_traces(run, lambda t: t.seconds, lambda t: t.val_accuracy)]
    return _figure(traces, **_axes("seconds of training", "validation accuracy"))


def draw_objective(run: Run, name: str) -> Figure:
    """Accuracy over another objective, and the Pareto front of all objectives."""
    front = sorted((trial.objectives[name] or 0.0, trial.val_accuracy) for trial in run.trials if trial.is_on_front)
    line = {"color": "--good", "width": 2, "dash": "dot"}
    edge = _scatter([x for x, _ in front], [y for _, y in front], name="Pareto front", mode="lines")
    traces = [
        edge | {"line": line, "hoverinfo": "skip"},
        *_trial_traces(run, lambda t: t.objectives[name], lambda t: t.val_accuracy),
    ]
    return _figure(traces, **_axes(objective_text(name), "validation accuracy"))


def _trial_traces(run: Run, x: Any, y: Any) -> list[dict[str, Any]]:
    """A trace for each way of ending, one for the baseline and one for the best."""
    groups: list[tuple[str, list[Trial], Mapping[str, Any]]] = [
        (STATES[state], [t for t in run.searched if t.state == state and t is not run.best], marker)
        for state, marker in _MARKERS.items()
    ]
    groups.append(("baseline", [run.baseline] if run.baseline else [], _BASELINE_MARKER))
    groups.append(("best", [run.best] if run.best and run.best is not run.baseline else [], _BEST_MARKER))
    return [_markers(name, trials, x, y, marker) for name, trials, marker in groups if trials]


def _markers(name: str, trials: Iterable[Trial], x: Any, y: Any, marker: Mapping[str, Any]) -> dict[str, Any]:
    shown = [trial for trial in trials if y(trial) is not None]
    trace = _scatter([x(trial) for trial in shown], [y(trial) for trial in shown], name=name, mode="markers")
    return trace | {"marker": dict(marker), "customdata": [trial.number for trial in shown]}


def draw_importance(shares: Mapping[str, float]) -> Figure:
    """A bar for each parameter, the largest on top."""
    names = [plot_text(key) for key in shares]
    trace = {
        "type": "bar",
        "orientation": "h",
        "x": [100 * share for share in shares.values()],
        "y": names,
        "marker": {"color": "--accent"},
        "texttemplate": "%{x:.0f}%",
        "textposition": "outside",
        "cliponaxis": False,
        "hoverinfo": "skip",
    }
    # Room to the right of the longest bar for its number.
    end = 118 * max(shares.values())
    axes = {"xaxis": {"title": {"text": "share, %"}, "range": [0, end]}, "yaxis": {"autorange": "reversed"}}
    return _figure([trace], showlegend=False, **axes)


def draw_slice(run: Run, key: str) -> Figure:
    """The value of each searched trial over one parameter."""
    searched = run.space.ranges[key]
    trials = [trial for trial in run.searched if key in trial.params]
    groups = [
        (STATES[state], [t for t in trials if t.state == state and t is not run.best], marker)
        for state, marker in _MARKERS.items()
    ]
    groups.append(("best", [t for t in trials if t is run.best], _BEST_MARKER))
    traces = [_markers(name, g, lambda t: _place(t, key, searched), run.value, m) for name, g, m in groups if g]
    axes = _axes(plot_text(key), run.metric)
    axes["xaxis"] |= _slice_axis(searched)
    return _figure(traces, showlegend=False, **axes)


def _place(trial: Trial, key: str, searched: Range) -> Any:
    """Where a trial stands on a parameter's axis: the value, or the position among choices."""
    value = trial.params[key]
    return searched.values.index(value) if isinstance(searched, Choice) else value


def _slice_axis(searched: Range) -> dict[str, Any]:
    if isinstance(searched, Choice):
        # Positions, not names: two different names may read the same once they are shortened.
        names = [plot_text(short(scalar(value), 14)) for value in searched.values]
        return {"tickvals": list(range(len(names))), "ticktext": names, "range": [-0.5, len(names) - 0.5]}
    if searched.kind == "log":
        return {"type": "log", "tickformat": "~g", "tickvals": log_ticks(searched.low, searched.high)}
    return _whole(searched.high - searched.low) if searched.kind == "int" else {}


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high`: powers of ten, and more between them where those are fewer than three."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for mantissas in ((1,), (1, 3)):
        ticks = [float(f"{m}e{k}") for k in decades for m in mantissas if low <= float(f"{m}e{k}") <= high]
        if len(ticks) >= 3:
            return ticks
    return [float(f"{m}e{k}") for k in decades for m in (1, 2, 5) if low <= float(f"{m}e{k}") <= high]


def draw_parallel(run: Run) -> Figure:
    """Parallel coordinates, an axis a row so that a phone has room for them: parameters, and the value last."""
    keys = list(run.space.ranges)
    values = [value for trial in run.searched if (value := run.value(trial)) is not None]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    best = leaders(run)
    others = [trial for trial in run.searched if trial not in best]
    traces = [
        _parallel_lines(run, others, (low, high), "other trials", "--stopped", 0.5 if len(others) <= _CROWD else 0.3),
        _parallel_lines(run, best, (low, high), "best tenth", "--accent", 1.0),
    ]
    notes = [note for row, key in enumerate(keys) for note in _axis_notes(row, key, run.space.ranges[key])]
    notes += _row_notes(len(keys), run.metric, {0.0: decimal(low), 1.0: decimal(high)})
    lines = [_row_line(row) for row in range(len(keys) + 1)]
    hidden = {"visible": False, "fixedrange": True}
    axes = {"xaxis": hidden | {"range": [-0.03, 1.03]}, "yaxis": hidden | {"range": [len(keys) + 0.5, -0.6]}}
    return _figure(traces, annotations=notes, shapes=lines, **axes)


def _parallel_lines(
    run: Run, trials: Iterable[Trial], ends: tuple[float, float], name: str, color: str, opacity: float
) -> dict[str, Any]:
    """One trace of all the trials' lines, with a gap after each."""
    x: list[float | None] = []
    y: list[int | None] = []
    numbers: list[int | None] = []
    for trial in trials:
        points = _parallel_points(run, trial, ends)
        x += [*(point for _, point in points), None]
        y += [*(row for row, _ in points), None]
        numbers += [*(trial.number for _ in points), None]
    trace = _scatter(x, y, name=name, mode="lines+markers", customdata=numbers)
    return trace | {"opacity": opacity, "line": {"color": color, "width": 1.5}, "marker": {"size": 6, "color": color}}


def _parallel_points(run: Run, trial: Trial, ends: tuple[float, float]) -> list[tuple[int, float]]:
    """(row, position from 0 to 1) on the axes of the parameters that the trial had, and on the value's."""
    points = [
        (row, _position(trial.params[key], searched))
        for row, (key, searched) in enumerate(run.space.ranges.items())
        if key in trial.params
    ]
    if (value := run.value(trial)) is not None:
        low, high = ends
        points.append((len(run.space.ranges), (value - low) / (high - low) if high > low else 0.5))
    return points


def _position(value: Any, searched: Range) -> float:
    """A value's place between the ends of its range, from 0 to 1."""
    if isinstance(searched, Choice):
        return searched.values.index(value) / (len(searched.values) - 1)
    if searched.kind == "log":
        return math.log(value / searched.low) / math.log(searched.high / searched.low)
    return float((value - searched.low) / (searched.high - searched.low))


def _axis_notes(row: int, key: str, searched: Range) -> list[dict[str, Any]]:
    if isinstance(searched, Choice):
        last = len(searched.values) - 1
        return _row_notes(row, key, {i / last: short(scalar(value), 12) for i, value in enumerate(searched.values)})
    return _row_notes(row, key, {0.0: scalar(searched.low), 1.0: scalar(searched.high)})


def _row_notes(row: int, name: str, ticks: Mapping[float, str]) -> list[dict[str, Any]]:
    """A row's name above its line, and what its places mean below."""
    notes = [_note(0, row, f"<b>{plot_text(name)}</b>", xanchor="left", yanchor="bottom", yshift=7)]
    for place, text in ticks.items():
        anchor = "left" if place == 0 else "right" if place == 1 else "center"
        notes.append(_note(place, row, plot_text(text), xanchor=anchor, yanchor="top", yshift=-5))
    return notes


def _row_line(row: int) -> dict[str, Any]:
    line = {"color": "--line", "width": 1}
    return {"type": "line", "layer": "below", "x0": 0, "x1": 1, "y0": row, "y1": row, "line": line}


def draw_confusion(names: Sequence[str], confusion: Sequence[Sequence[int]], chosen: Sequence[int]) -> Figure:
    """Rows true, columns predicted; colour is the share of the true class's images."""
    totals = [max(sum(confusion[i]), 1) for i in chosen]
    counts = [[confusion[i][j] for j in chosen] for i in chosen]
    labels = [plot_text(short(names[i], 14)) for i in chosen]
    trace = {
        "type": "heatmap",
        "z": [[100 * n / total for n in row] for row, total in zip(counts, totals, strict=True)],
        "hovertext": [
            [_describe_cell(names[i], names[j], confusion[i][j], total) for j in chosen]
            for i, total in zip(chosen, totals, strict=True)
        ],
        "hoverinfo": "text",
        "zmin": 0,
        "zmax": 100,
        "colorscale": [[0, "--heat-low"], [1, "--heat-high"]],
        "colorbar": {"title": {"text": "%"}, "thickness": 10, "outlinewidth": 0},
        "xgap": 1,
        "ygap": 1,
    }
    if len(chosen) <= WRITTEN_CLASSES:
        ink = {"color": "--ink"}
        trace |= {"text": counts, "texttemplate": "%{text}", "textfont": ink, "showscale": False}
    ticks = {"tickvals": list(range(len(labels))), "ticktext": labels, "showgrid": False}
    axes = {
        "xaxis": ticks | {"title": {"text": "predicted", "standoff": 12}, "tickangle": -60},
        "yaxis": ticks | {"title": {"text": "true", "standoff": 12}, "autorange": "reversed"},
    }
    return _figure([trace], showlegend=False, **axes)


def _describe_cell(true: str, predicted: str, images: int, total: int) -> str:
    lines = f"true: {plot_text(short(true, 40))}", f"predicted: {plot_text(short(predicted, 40))}"
    return "<br>".join([*lines, f"{images} of {total} images ({100 * images / total:.1f}%)"])


def draw_reliability(bins: Sequence[Bin]) -> Figure:
    """Accuracy over confidence in each bin, beside a perfectly calibrated model's, and each bin's share of images."""
    filled = [b for b in bins if b.images]
    images = sum(b.images for b in filled)
    texts = [_describe_bin(b) for b in filled]
    spread = {
        "type": "bar",
        "name": "share of images",
        "x": [50 * (b.low + b.high) for b in filled],
        "y": [100 * b.images / images for b in filled],
        "width": 90 / len(bins),
        "marker": {"color": "--stopped", "opacity": 0.4},
    }
    ends = [0, 100]
    line = {"color": "--second", "dash": "dash", "width": 2}
    ideal = _scatter(ends, ends, name="perfectly calibrated", mode="lines") | {"line": line, "hoverinfo": "skip"}
    x, y = [100 * (b.confidence or 0.0) for b in filled], [100 * (b.accuracy or 0.0) for b in filled]
    error = _error_bars(y, [accuracy_interval(b) for b in filled]) | {"width": 4}
    points = _scatter(x, y, name="accuracy", mode="lines+markers", error_y=error)
    points |= {"line": {"color": "--accent", "width": 2}, "marker": {"size": 9}}
    hover = {"hovertext": texts, "hoverinfo": "text"}
    axes = _axes("confidence, %", "accuracy, %")
    axes["xaxis"] |= {"range": ends}
    axes["yaxis"] |= {"range": [0, 103]}
    return _figure([spread | hover, ideal, points | hover], **axes)


def _describe_bin(measured: Bin) -> str:
    lines = (
        f"<b>confidence {100 * measured.low:.1f}% to {100 * measured.high:.1f}%</b>",
        f"{measured.images:,} images, mean confidence {percent(measured.confidence)}",
        f"accuracy {percent(measured.accuracy)}",
    )
    return "<br>".join(lines)


# Parts


def _figure(traces: Sequence[dict[str, Any]], **layout: Any) -> Figure:
    return {"data": list(traces), "layout": layout}


def _whole(span: float) -> dict[str, Any]:
    """Ticks of an axis of whole numbers; Plotly would halve a short one."""
    return {"dtick": 1} if span <= 10 else {}


def _axes(x: str, y: str) -> dict[str, dict[str, Any]]:
    return {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}}


def _error_bars(values: Sequence[float], intervals: Sequence[tuple[float, float] | None]) -> dict[str, Any]:
    """From values in percent to the ends of their intervals, which are shares of 1."""
    pairs = list(zip(values, intervals, strict=True))
    return {
        "type": "data",
        "symmetric": False,
        "array": [100 * around[1] - value if around else 0 for value, around in pairs],
        "arrayminus": [value - 100 * around[0] if around else 0 for value, around in pairs],
        "color": "--ink",
        "thickness": 2,
    }


def _scatter(x: Sequence[Any], y: Sequence[Any], **more: Any) -> dict[str, Any]:
    return {"type": "scatter", "x": list(x), "y": list(y), **more}


def _note(x: float, y: float, text: str, **more: Any) -> dict[str, Any]:
    return {"x": x, "y": y, "text": text, "showarrow": False, "bgcolor": "--paper", "borderpad": 0, **more}
