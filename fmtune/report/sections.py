"""The report's sections in their order, and those that every run has."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any

from fmtune.report import plots
from fmtune.report.document import Card, Cards, Code, Group, Heading, Part, Plot, Section, Table, Text
from fmtune.report.findings import Gain, describe_best_epoch, describe_caveats, describe_counts, diagnose, judge, weigh
from fmtune.report.model_sections import create_calibration, create_classes, create_mistakes
from fmtune.report.read import Run
from fmtune.report.search_sections import create_cost, create_history, create_objectives, create_parameters
from fmtune.report.words import NOTHING, decimal, interval, percent, scalar
from fmtune.view import format_seconds


def create_sections(run: Run) -> list[Section]:
    """All sections from the top; a single training has none on a search."""
    makers: list[Callable[[Run], Section]] = [_create_result, _create_curves]
    if not run.is_single:
        makers += [create_history, create_parameters, create_cost]
        makers += [create_objectives] if run.space.search.objectives else []
    makers += [create_classes, create_mistakes, create_calibration, _create_setup]
    return [make(run) for make in makers]


# Result


def _create_result(run: Run) -> Section:
    gain = weigh(run)
    parts: list[Part] = [Cards(_cards(run, gain))]
    verdict = judge(gain)
    if verdict:
        parts.append(Text(verdict, "verdict"))
    parts += map(Text, describe_caveats(run, gain))
    return Section("result", "Result", [*parts, *_result_plot(gain), *_found(run)])


def _cards(run: Run, gain: Gain) -> list[Card]:
    summary = run.summary
    cards = [Card(f"{gain.split.capitalize()} accuracy", percent(gain.result), _interval(gain.interval))]
    if summary["baseline"] is not None:
        name = f"Baseline {gain.split} accuracy"
        cards.append(Card(name, percent(gain.baseline), _interval(gain.baseline_interval)))
    if gain.points is not None:
        cards.append(Card("Gain over the baseline", f"{gain.points:+.2f}", "percentage points"))
    count = sum(summary["trials"].values())
    cards.append(Card("Trials", f"{count:,}", describe_counts(run).partition(": ")[2]))
    cards.append(Card("Time", format_seconds(summary["seconds"]), f"{summary['images_trained']:,} images trained"))
    refit = "on training and validation rows together" if summary["refit"] else "the model kept is the trial's own"
    cards.append(Card("Refit", "yes" if summary["refit"] else "no", refit))
    return cards


def _interval(around: tuple[float, float] | None) -> str:
    return f"95% interval {interval(around)}" if around else ""


def _result_plot(gain: Gain) -> list[Part]:
    if gain.result is None or gain.baseline is None:
        return []
    rows = [("result", gain.result, gain.interval), ("baseline", gain.baseline, gain.baseline_interval)]
    return [Plot("result-plot", _describe_gain(gain), plots.draw_result(rows), "low")]


def _describe_gain(gain: Gain) -> str:
    result = f"{gain.split.capitalize()} accuracy: {percent(gain.result)} for the result, {percent(gain.baseline)} for"
    bars = "; bars are 95% intervals (Wilson)." if gain.interval else "."
    return f"{result} the baseline{bars}"


def _found(run: Run) -> list[Part]:
    """The chosen parameters beside the baseline's, and the finalists they came through."""
    parts: list[Part] = []
    if run.best and run.best.params:
        reference: Mapping[str, Any] = run.baseline.params if run.baseline else {}
        rows = [
            [key, scalar(value), scalar(reference[key]) if key in reference else NOTHING]
            for key, value in run.best.params.items()
        ]
        parts.append(Table(f"Parameters of trial {run.best.number}, the best", ["parameter", "best", "baseline"], rows))
    if run.summary["finalists"]:
        rows = [
            [f"trial {f['trial']}", decimal(f[run.metric]), ", ".join(decimal(seed[run.metric]) for seed in f["seeds"])]
            for f in run.summary["finalists"]
        ]
        caption = f"Finalists, trained anew with fresh seeds; the best mean {run.metric} was chosen"
        parts.append(Table(caption, ["finalist", "mean", "each seed"], rows))
    return parts


# Learning curves


def _create_curves(run: Run) -> Section:
    title = "Learning curves" if run.is_single else f"Learning curves of the best trial ({run.summary['best_trial']})"
    epochs = run.best.epochs if run.best else []
    if not epochs:
        return Section("curves", title, [Text("No epoch of this trial was recorded.")])
    diagnosis = diagnose(epochs, run.config.epochs)
    is_warning = diagnosis.kind == "overfitting"
    parts: list[Part] = [Text(diagnosis.text, "warning" if is_warning else "verdict")]
    if run.summary["refit"]:
        text = "The model kept was then trained once more, on training and validation rows together; these curves are "
        parts.append(Text(text + "of the trial that chose its configuration.", "muted"))
    loss = f"Loss by epoch. {describe_best_epoch(epochs)}"
    if diagnosis.epoch is not None:
        loss += f" Validation loss was lowest at epoch {diagnosis.epoch}."
    accuracy = f"Validation accuracy by epoch, {percent(epochs[-1].val_accuracy)} at the end."
    drawn = [
        Plot("loss-plot", loss, plots.draw_losses(epochs, diagnosis.epoch if is_warning else None)),
        Plot("accuracy-plot", accuracy, plots.draw_accuracy(epochs)),
    ]
    header = ["epoch", "training loss", "validation loss", "validation accuracy", "learning rate"]
    rows = [
        [str(e.epoch), decimal(e.train_loss), decimal(e.val_loss), percent(e.val_accuracy), f"{e.learning_rate:.3g}"]
        for e in epochs
    ]
    parts += [Group(drawn, "pair"), Table("Epochs", header, rows, folded="Epochs as a table")]
    return Section("curves", title, parts)


# Setup


def _create_setup(run: Run) -> Section:
    environment = run.environment
    packages = environment["packages"]
    facts = [
        [key, NOTHING if value is None else str(value)]
        for key, value in environment.items()
        if key not in ("command", "packages")
    ]
    parts: list[Part] = [
        Heading("Run it again"),
        Text("The command as it was given, and the same from the run's own resolved configuration:"),
        Code(_commands_again(run), "Commands to run it again"),
        Text("To use the model:"),
        Code(_commands_use(run), "Commands to use the model"),
        Heading("Configuration"),
        Text("space.yaml as resolved, every default written out.", "muted"),
        Code(run.yaml, "Resolved configuration"),
        Heading("Environment"),
        Table("Where it ran", ["what", "value"], [*facts, *([name, str(packages[name])] for name in packages)]),
    ]
    return Section("setup", "Configuration and environment", parts)


def _commands_again(run: Run) -> str:
    program, *arguments = run.environment["command"]
    # From Python, the command is a script's and no verb of fmtune's.
    given = ["fmtune"] if PurePath(program).name in ("fmtune", "__main__.py", "cli.py") else ["python", program]
    verb = "train" if run.is_single else "search"
    resolved = ["fmtune", verb, str(run.folder.space), "--name", f"{run.name}-again"]
    if run.folder.path.parent != PurePath("runs"):
        resolved += ["--runs", str(run.folder.path.parent)]
    return f"{shlex.join([*given, *arguments])}\n{shlex.join(resolved)}"


def _commands_use(run: Run) -> str:
    path = str(run.folder.path)
    predict = ["fmtune", "predict", path, "FILE", "-o", "out.csv"]
    return f"{shlex.join(predict)}\n{shlex.join(['fmtune', 'evaluate', path, '--data', 'FILE'])}"
