"""The sections on a search: its trials, what decided between them, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence

from fmtune.report import plots
from fmtune.report.document import Group, Heading, Part, Plot, Section, Table, Text
from fmtune.report.findings import describe_counts, leaders, objective_text, pareto_front, running_best
from fmtune.report.importance import measure_importance
from fmtune.report.read import STATES, Run, Trial
from fmtune.report.words import NOTHING, decimal, listing, percent, plural, scalar

_MIN_TRIALS = 3
"""Fewer make no line, and no pattern."""


def create_history(run: Run) -> Section:
    """Every trial's value, failures and all."""
    steps = running_best(run)
    caption = (
        f"Value ({run.metric}) of each trial after its last epoch; crosses were stopped early. {describe_counts(run)}."
    )
    if steps:
        caption += f" The best so far is {decimal(steps[-1][1])}, from trial {steps[-1][0]} on."
    unmeasured = sum(run.value(trial) is None for trial in run.trials)
    if unmeasured:
        caption += f" {plural(unmeasured, 'trial')} ended before a first epoch was measured, with no marker."
    keys = list(run.space.ranges)
    header = ["trial", "state", "epoch", "val_accuracy", "val_loss", "seconds", *keys]
    rows = [_trial_row(run, trial, keys) for trial in run.trials]
    parts: list[Part] = [
        Text("Hover over or tap a marker to see a trial's parameters.", "hint"),
        Plot("history-plot", caption, plots.draw_history(run)),
        *_failures(run),
        Table("All trials", header, rows, folded="All trials as a table"),
    ]
    return Section("history", "Search history", parts)


def _trial_row(run: Run, trial: Trial, keys: Sequence[str]) -> list[str]:
    name = f"{trial.number} (baseline)" if trial is run.baseline else str(trial.number)
    measured = [str(trial.epoch), decimal(trial.val_accuracy), decimal(trial.val_loss), f"{trial.seconds:.1f}"]
    values = [scalar(trial.params[key]) if key in trial.params else NOTHING for key in keys]
    return [name, STATES.get(trial.state, trial.state), *measured, *values]


def _failures(run: Run) -> list[Part]:
    failures = run.summary["failures"]
    if not failures:
        return []
    rows = [[f"trial {failure['trial']}", str(failure["cause"] or "unknown")] for failure in failures]
    return [Table("Trials that failed, and why", ["trial", "cause"], rows)]


def create_parameters(run: Run) -> Section:
    """How the searched parameters and the outcome go together."""
    if not run.space.ranges:
        text = "Every value of the space is fixed, so there are no parameters to compare."
        return Section("parameters", "Parameters", [Text(text)])
    parts: list[Part] = [Heading("Importance"), _importance(run)]
    measured = sum(run.value(trial) is not None for trial in run.searched)
    if measured < _MIN_TRIALS:
        came = f"{plural(measured, 'searched trial')} came to a value"
        parts.append(Text(f"Plots over the parameters are missing: {came}, and fewer than {_MIN_TRIALS} show nothing."))
        return Section("parameters", "Parameters", parts)
    return Section("parameters", "Parameters", [*parts, *_parallel(run), *_slices(run)])


def _importance(run: Run) -> Part:
    importance = measure_importance(run)
    if not importance.shares:
        return Text(importance.text)
    most = listing(f"{key} {percent(share)}" for key, share in list(importance.shares.items())[:3])
    figure = plots.draw_importance(importance.shares)
    return Plot("importance-plot", f"{importance.text} Largest: {most}.", figure, rows=len(importance.shares))


def _parallel(run: Run) -> list[Part]:
    best = [trial.number for trial in leaders(run)]
    caption = (
        "Each line is a trial, from its parameters down to its value; a line passes by a parameter that its trial did "
        "not have. The baseline need not lie in the space and is left out."
    )
    if best:
        shown = [*map(str, best[:8]), *([f"{len(best) - 8} more"] if len(best) > 8 else [])]
        caption += f" Best tenth: trial{'s' if len(best) > 1 else ''} {listing(shown)}."
    rows = len(run.space.ranges) + 1
    return [
        Heading("Parallel coordinates"),
        Plot("parallel-plot", caption, plots.draw_parallel(run), rows=rows, row_height=58),
    ]


def _slices(run: Run) -> list[Part]:
    text = (
        f"Value ({run.metric}) of the searched trials over each parameter; the star is the best, crosses stopped early."
    )
    drawn = [
        Plot(f"slice-{i}", _describe_slice(run, key), plots.draw_slice(run, key))
        for i, key in enumerate(run.space.ranges)
    ]
    return [Heading("Slices"), Text(text, "muted"), Group(drawn, "slices")]


def _describe_slice(run: Run, key: str) -> str:
    values = [trial.params[key] for trial in leaders(run) if key in trial.params]
    if not values:
        return f"{key}: no value among the best tenth of trials."
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) == len(values) and len(set(numbers)) > 1:
        return f"{key}: {scalar(min(numbers))} to {scalar(max(numbers))} among the best tenth of trials."
    return f"{key}: {listing(dict.fromkeys(map(scalar, values)))} among the best tenth of trials."


def create_cost(run: Run) -> Section:
    """What accuracy costs in time, and which trials were worth theirs."""
    front = pareto_front(run.trials)
    caption = "Validation accuracy over seconds of training, with the Pareto front: no trial beats one of these in "
    caption += "accuracy with as little training."
    rows = [[f"trial {t.number}", f"{t.seconds:.1f}", percent(t.val_accuracy), STATES[t.state]] for t in front]
    parts: list[Part] = [
        Plot("cost-plot", caption, plots.draw_cost(run)),
        Table("The Pareto front", ["trial", "seconds", "validation accuracy", "state"], rows),
    ]
    return Section("cost", "Accuracy over training time", parts)


def create_objectives(run: Run) -> Section:
    """The Pareto front of a search with several objectives, and which trial of it was taken."""
    others = run.space.search.objectives[1:]
    front = sorted((trial for trial in run.trials if trial.is_on_front), key=lambda trial: -(trial.val_accuracy or 0.0))
    text = "No trial beats one of these in one objective without losing in another. Taken is the best in "
    text += f"{objective_text(others[0])} of those whose accuracy is within a standard error of the best one's "
    text += "(Breiman et al., 1984)."
    header = ["trial", "validation accuracy", *map(objective_text, others)]
    rows = [
        [
            f"trial {trial.number}" + (", taken" if trial is run.best else ""),
            percent(trial.val_accuracy),
            *(f"{trial.objectives[name] or 0.0:,.0f}" for name in others),
        ]
        for trial in front
    ]
    parts: list[Part] = [Text(text), Table("The Pareto front", header, rows)]
    for name in others:
        caption = f"Validation accuracy over {objective_text(name)}."
        parts.append(Plot(f"{name}-plot", caption, plots.draw_objective(run, name)))
    return Section("objectives", "Objectives", parts)
