"""How much of the search's outcome each parameter explains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from fmtune.ranges import Choice, Range
from fmtune.report.read import Run, Trial
from fmtune.report.words import plural

MIN_TRIALS = 10
"""Fewer say more about chance than about parameters."""


@dataclass(frozen=True)
class Importance:
    """Shares that add up to 1, by dotted key and largest first; none where `text` says why."""

    shares: Mapping[str, float]
    text: str


def measure_importance(run: Run) -> Importance:
    """PED-ANOVA (Watanabe et al., 2023, https://arxiv.org/abs/2304.10255) over the searched trials.

    Stopped trials are compared with others at one epoch, the deepest that `MIN_TRIALS` of them reached: their last
    values are of different epochs, and leaving them out would leave out all that did badly.
    """
    epoch, compared = _find_common_epoch(run)
    if epoch is None:
        came = f"{plural(len(compared), 'searched trial')} came to a value"
        reason = f"{came}, and fewer than {MIN_TRIALS} say more about chance."
        return Importance({}, f"Parameter importance is missing: {reason}")
    values = [value for _, value in compared]
    if min(values) == max(values):
        return Importance({}, f"Parameter importance is missing: all {len(values)} trials came to the same value.")
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    with _quiet_optuna():
        shares = optuna.importance.get_param_importances(_create_study(run, compared), evaluator=evaluator)
    if not sum(shares.values()) > 0:
        return Importance({}, "Parameter importance is missing: no parameter tells the best trials from the others.")
    text = (
        f"Share of each parameter in what sets the best tenth of trials apart (PED-ANOVA), by {run.metric} at epoch "
        f"{epoch} of the {len(values)} trials that got there."
    )
    return Importance(shares, text)


def _find_common_epoch(run: Run) -> tuple[int | None, list[tuple[Trial, float]]]:
    """The deepest epoch that enough trials reached, and those trials with their values there."""
    deepest = max((trial.epoch for trial in run.searched), default=0)
    compared: list[tuple[Trial, float]] = []
    for epoch in range(deepest, 0, -1):
        compared = [(t, value) for t in run.searched if (value := t.measured_at(run.metric, epoch)) is not None]
        if len(compared) >= MIN_TRIALS:
            return epoch, compared
    return None, compared


def _create_study(run: Run, compared: Sequence[tuple[Trial, float]]) -> optuna.Study:
    study = optuna.create_study(direction="maximize" if run.larger else "minimize")
    distributions = {key: _distribution(searched) for key, searched in run.space.ranges.items()}
    for trial, value in compared:
        own = {key: distributions[key] for key in trial.params}
        study.add_trial(optuna.trial.create_trial(params=dict(trial.params), distributions=own, value=value))
    return study


def _distribution(searched: Range) -> BaseDistribution:
    if isinstance(searched, Choice):
        return CategoricalDistribution(searched.values)
    if searched.kind == "int":
        return IntDistribution(int(searched.low), int(searched.high))
    return FloatDistribution(searched.low, searched.high, log=searched.kind == "log")


@contextmanager
def _quiet_optuna() -> Iterator[None]:
    """Without a line on standard error for the study, which is none of the user's."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
