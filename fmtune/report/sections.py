"""The page's sections, each with its plots."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from fmtune.report import plots
from fmtune.report.findings import (
    Gain,
    confusions,
    describe_best_epoch,
    describe_counts,
    diagnose,
    judge,
    leaders,
    pareto_front,
    running_best,
    weigh,
)
from fmtune.report.importance import measure_importance
from fmtune.report.markup import Html, details, element, join, table
from fmtune.report.plots import MATRIX_CLASSES, Figure
from fmtune.report.read import STATES, Run, Trial
from fmtune.report.words import NOTHING, decimal, listing, percent, plural, scalar
from fmtune.view import format_seconds


@dataclass(frozen=True)
class Section:
    """A part of the page; `plots` are the figures by the ids of their places in `body`."""

    name: str
    title: str
    body: Html
    plots: Mapping[str, Figure] = field(default_factory=dict)


def create_sections(run: Run) -> list[Section]:
    """All sections from the top; a single training has none on a search."""
    makers: list[Callable[[Run], Section]] = [_result, _curves]
    if not run.is_single:
        makers += [_history, _parameters, _cost]
    makers += [_classes, _setup]
    return [make(run) for make in makers]


# Result


def _result(run: Run) -> Section:
    gain = weigh(run)
    parts = [element("dl", *_cards(run, gain), class_="cards")]
    verdict = judge(gain)
    if verdict:
        parts.append(element("p", verdict, class_="verdict"))
    parts += [element("p", text) for text in _caveats(run, gain)]
    figures = _result_plot(gain)
    if figures:
        parts.append(_plot("result-plot", _describe_gain(gain), "low"))
    parts += _found(run)
    return Section("result", "Result", join(parts), figures)


def _cards(run: Run, gain: Gain) -> list[Html]:
    summary = run.summary
    cards = [_card(f"{gain.split.capitalize()} accuracy", percent(gain.result), _interval(gain.interval))]
    if summary["baseline"] is not None:
        name = f"Baseline {gain.split} accuracy"
        cards.append(_card(name, percent(gain.baseline), _interval(gain.baseline_interval)))
    if gain.points is not None:
        cards.append(_card("Gain over the baseline", f"{gain.points:+.2f}", "percentage points"))
    count = sum(summary["trials"].values())
    cards.append(_card("Trials", f"{count:,}", describe_counts(run).partition(": ")[2]))
    cards.append(_card("Time", format_seconds(summary["seconds"]), f"{summary['images_trained']:,} images trained"))
    refit = "on training and validation rows together" if summary["refit"] else "the model kept is the trial's own"
    cards.append(_card("Refit", "yes" if summary["refit"] else "no", refit))
    return cards


def _card(name: str, value: str, note: str) -> Html:
    small = [element("small", note)] if note else []
    return element("div", element("dt", name), element("dd", value, *small))


def _interval(interval: tuple[float, float] | None) -> str:
    return f"95% interval {percent(interval[0])} to {percent(interval[1])}" if interval else ""


def _caveats(run: Run, gain: Gain) -> list[str]:
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
    if reference and reference["epochs"] < reference["of_epochs"]:
        done = f"{reference['epochs']} of its {reference['of_epochs']} epochs"
        texts.append(f"The baseline had time for {done} only, so the gain is partly one of training longer.")
    return texts


def _result_plot(gain: Gain) -> dict[str, Figure]:
    rows = [("result", gain.result, gain.interval), ("baseline", gain.baseline, gain.baseline_interval)]
    known = [(name, value, around) for name, value, around in rows if value is not None]
    return {"result-plot": plots.draw_result(known)} if len(known) == len(rows) else {}


def _describe_gain(gain: Gain) -> str:
    result = f"{gain.split.capitalize()} accuracy: {percent(gain.result)} for the result, {percent(gain.baseline)} for"
    bars = "; bars are 95% intervals (Wilson)." if gain.interval else "."
    return f"{result} the baseline{bars}"


def _found(run: Run) -> list[Html]:
    """The chosen parameters beside the baseline's, and the finalists they came through."""
    parts = []
    if run.best and run.best.params:
        reference: Mapping[str, Any] = run.baseline.params if run.baseline else {}
        rows = [
            [key, scalar(value), scalar(reference[key]) if key in reference else NOTHING]
            for key, value in run.best.params.items()
        ]
        parts.append(table(f"Parameters of trial {run.best.number}, the best", ["parameter", "best", "baseline"], rows))
    if run.summary["finalists"]:
        rows = [
            [f"trial {f['trial']}", decimal(f[run.metric]), ", ".join(decimal(seed[run.metric]) for seed in f["seeds"])]
            for f in run.summary["finalists"]
        ]
        caption = f"Finalists, trained anew with fresh seeds; the best mean {run.metric} was chosen"
        parts.append(table(caption, ["finalist", "mean", "each seed"], rows))
    return parts


# Learning curves


def _curves(run: Run) -> Section:
    title = "Learning curves" if run.is_single else f"Learning curves of the best trial ({run.summary['best_trial']})"
    epochs = run.best.epochs if run.best else []
    if not epochs:
        return Section("curves", title, element("p", "No epoch of this trial was recorded."))
    diagnosis = diagnose(epochs)
    is_warning = diagnosis.kind == "overfitting"
    parts = [element("p", diagnosis.text, class_="verdict warning" if is_warning else "verdict")]
    if run.summary["refit"]:
        text = "The model kept was then trained once more, on training and validation rows together; these curves are "
        parts.append(element("p", text + "of the trial that chose its configuration.", class_="muted"))
    loss = f"Loss by epoch. {describe_best_epoch(epochs)}"
    if diagnosis.epoch is not None:
        loss += f" Validation loss was lowest at epoch {diagnosis.epoch}."
    accuracy = f"Validation accuracy by epoch, {percent(epochs[-1].val_accuracy)} at the end."
    parts.append(element("div", _plot("loss-plot", loss), _plot("accuracy-plot", accuracy), class_="pair"))
    header = ["epoch", "training loss", "validation loss", "validation accuracy", "learning rate"]
    rows = [
        [str(e.epoch), decimal(e.train_loss), decimal(e.val_loss), percent(e.val_accuracy), f"{e.learning_rate:.3g}"]
        for e in epochs
    ]
    parts.append(details("Epochs as a table", table("Epochs", header, rows)))
    lowest = diagnosis.epoch if is_warning else None
    figures = {"loss-plot": plots.draw_losses(epochs, lowest), "accuracy-plot": plots.draw_accuracy(epochs)}
    return Section("curves", title, join(parts), figures)


# Search


def _history(run: Run) -> Section:
    steps = running_best(run)
    caption = (
        f"Value ({run.metric}) of each trial after its last epoch; crosses were stopped early. {describe_counts(run)}."
    )
    if steps:
        caption += f" The best so far is {decimal(steps[-1][1])}, from trial {steps[-1][0]} on."
    unmeasured = sum(run.value(trial) is None for trial in run.trials)
    if unmeasured:
        caption += f" {plural(unmeasured, 'trial')} ended before a first epoch was measured, with no marker."
    hint = element("p", "Hover over or tap a marker to see a trial's parameters.", class_="muted")
    parts = [hint, _plot("history-plot", caption), *_failures(run)]
    keys = list(run.space.ranges)
    rows = [_trial_row(run, trial, keys) for trial in run.trials]
    header = ["trial", "state", "epoch", "val_accuracy", "val_loss", "seconds", *keys]
    parts.append(details("All trials as a table", table("All trials", header, rows)))
    return Section("history", "Search history", join(parts), {"history-plot": plots.draw_history(run)})


def _trial_row(run: Run, trial: Trial, keys: Sequence[str]) -> list[str]:
    name = f"{trial.number} (baseline)" if trial is run.baseline else str(trial.number)
    measured = [str(trial.epoch), decimal(trial.val_accuracy), decimal(trial.val_loss), f"{trial.seconds:.1f}"]
    values = [scalar(trial.params[key]) if key in trial.params else NOTHING for key in keys]
    return [name, STATES.get(trial.state, trial.state), *measured, *values]


def _failures(run: Run) -> list[Html]:
    failures = run.summary["failures"]
    if not failures:
        return []
    rows = [[f"trial {failure['trial']}", str(failure["cause"] or "unknown")] for failure in failures]
    return [table("Trials that failed, and why", ["trial", "cause"], rows)]


def _parameters(run: Run) -> Section:
    if not run.space.ranges:
        text = "Every value of the space is fixed, so there are no parameters to compare."
        return Section("parameters", "Parameters", element("p", text))
    importance = measure_importance(run)
    parts, figures = [element("h3", "Importance")], {}
    if importance.shares:
        most = listing(f"{key} {percent(share)}" for key, share in list(importance.shares.items())[:3])
        parts.append(_plot("importance-plot", f"{importance.text} Largest: {most}.", rows=len(importance.shares)))
        figures["importance-plot"] = plots.draw_importance(importance.shares)
    else:
        parts.append(element("p", importance.text))
    parts += [*_parallel(run), *_slices(run)]
    figures["parallel-plot"] = plots.draw_parallel(run)
    figures |= {f"slice-{i}": plots.draw_slice(run, key) for i, key in enumerate(run.space.ranges)}
    return Section("parameters", "Parameters", join(parts), figures)


def _parallel(run: Run) -> list[Html]:
    best = [trial.number for trial in leaders(run)]
    caption = (
        "Each line is a trial, from its parameters down to its value; a line passes by a parameter that its trial did "
        "not have. The baseline need not lie in the space and is left out."
    )
    if best:
        shown = [*map(str, best[:8]), *([f"{len(best) - 8} more"] if len(best) > 8 else [])]
        caption += f" Best tenth: trial{'s' if len(best) > 1 else ''} {listing(shown)}."
    rows = len(run.space.ranges) + 1
    return [element("h3", "Parallel coordinates"), _plot("parallel-plot", caption, rows=rows, row_height=58)]


def _slices(run: Run) -> list[Html]:
    text = (
        f"Value ({run.metric}) of the searched trials over each parameter; the star is the best, crosses stopped early."
    )
    drawn = [_plot(f"slice-{i}", _describe_slice(run, key)) for i, key in enumerate(run.space.ranges)]
    return [element("h3", "Slices"), element("p", text, class_="muted"), element("div", *drawn, class_="slices")]


def _describe_slice(run: Run, key: str) -> str:
    values = [trial.params[key] for trial in leaders(run) if key in trial.params]
    if not values:
        return f"{key}: no value among the best tenth of trials."
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) == len(values) and len(set(numbers)) > 1:
        return f"{key}: {scalar(min(numbers))} to {scalar(max(numbers))} among the best tenth of trials."
    return f"{key}: {listing(dict.fromkeys(map(scalar, values)))} among the best tenth of trials."


def _cost(run: Run) -> Section:
    front = pareto_front(run.trials)
    caption = "Validation accuracy over seconds of training, with the Pareto front: no trial beats one of these in "
    caption += "accuracy with as little training."
    rows = [[f"trial {t.number}", f"{t.seconds:.1f}", percent(t.val_accuracy), STATES[t.state]] for t in front]
    parts = [_plot("cost-plot", caption)]
    parts.append(table("The Pareto front", ["trial", "seconds", "validation accuracy", "state"], rows))
    return Section("cost", "Accuracy over training time", join(parts), {"cost-plot": plots.draw_cost(run)})


# Classes


def _classes(run: Run) -> Section:
    title = "Classes"
    if run.test is None:
        text = "No test split was measured class by class; fmtune evaluate RUN --data FILE does it for labelled images."
        return Section("classes", title, element("p", text))
    rows = run.test["per_class"]
    header = ["class", "images", "precision", "recall", "F1"]
    cells = [[r["name"], f"{r['images']:,}", *(percent(r[key]) for key in ("precision", "recall", "f1"))] for r in rows]
    known = sorted((row for row in rows if row["f1"] is not None), key=lambda row: row["f1"])
    parts = []
    if known:
        weakest = listing(f"{row['name']} ({percent(row['f1'])})" for row in known[:3])
        parts.append(element("p", f"Lowest F1 on the test split: {weakest}."))
    parts.append(table("Precision, recall and F1 of each class on the test split", header, cells))
    chosen = _most_confused(run.test["confusion"])
    parts += _confusion_parts(run.test, chosen)
    figure = plots.draw_confusion([row["name"] for row in rows], run.test["confusion"], chosen)
    return Section("classes", title, join(parts), {"confusion-plot": figure})


def _most_confused(confusion: Sequence[Sequence[int]]) -> list[int]:
    """Classes that the matrix shows: all, or as many as it has room for, those with most mistakes."""
    missed = [sum(row) - row[i] for i, row in enumerate(confusion)]
    return sorted(sorted(range(len(missed)), key=lambda i: -missed[i])[:MATRIX_CLASSES])


def _confusion_parts(test: Mapping[str, Any], chosen: Sequence[int]) -> list[Html]:
    caption = "Confusion matrix: rows are the true class, columns the predicted one; the more colour, the larger the "
    caption += "share of the true class."
    if len(chosen) < len(test["confusion"]):
        caption += f" The {len(chosen)} of {len(test['confusion'])} classes with most mistakes are shown."
    parts = [element("h3", "Confusion"), _plot("confusion-plot", caption, "square")]
    mistakes = confusions(test)
    if mistakes:
        rows = [[true, predicted, f"{n:,}", percent(share)] for true, predicted, n, share in mistakes]
        header = ["true class", "taken for", "images", "share of the class"]
        parts.append(table("The most frequent mistakes", header, rows))
    return parts


# Setup


def _setup(run: Run) -> Section:
    environment = run.environment
    packages = environment["packages"]
    facts = [
        [key, NOTHING if value is None else str(value)]
        for key, value in environment.items()
        if key not in ("command", "packages")
    ]
    parts = [
        element("h3", "Run it again"),
        element("p", "The command as it was given, and the same from the run's own resolved configuration:"),
        _code(_commands_again(run), "Commands to run it again"),
        element("p", "To use the model:"),
        _code(_commands_use(run), "Commands to use the model"),
        element("h3", "Configuration"),
        element("p", "space.yaml as resolved, every default written out.", class_="muted"),
        _code(run.yaml, "Resolved configuration"),
        element("h3", "Environment"),
        table("Where it ran", ["what", "value"], [*facts, *([name, str(packages[name])] for name in packages)]),
    ]
    return Section("setup", "Configuration and environment", join(parts))


def _commands_again(run: Run) -> str:
    program, *arguments = run.environment["command"]
    # From Python, the command is a script's and no verb of fmtune's.
    given = ["fmtune"] if PurePath(program).name in ("fmtune", "__main__.py", "cli.py") else ["python", program]
    verb = "train" if run.is_single else "search"
    resolved = ["fmtune", verb, str(run.folder.space), "--name", f"{run.name}-again"]
    return f"{shlex.join([*given, *arguments])}\n{shlex.join(resolved)}"


def _commands_use(run: Run) -> str:
    path = str(run.folder.path)
    predict = ["fmtune", "predict", path, "FILE", "-o", "out.csv"]
    return f"{shlex.join(predict)}\n{shlex.join(['fmtune', 'evaluate', path, '--data', 'FILE'])}"


def _code(text: str, name: str) -> Html:
    return element("pre", element("code", text), tabindex=0, role="region", aria_label=name)


def _plot(name: str, caption: str, size: str = "", rows: int = 0, row_height: int = 30) -> Html:
    """The place of a figure; what it shows is said in words beside it."""
    style = f"height: {rows * row_height + 90}px" if rows else None
    classes = f"plot plotly-graph-div {size}".strip()
    place = element("div", id=name, class_=classes, style=style, role="img", aria_label=caption)
    return element("figure", place, element("figcaption", caption))
