"""TPE on a part of the trials, once there are many."""

from __future__ import annotations

from typing import Any

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from fmtune.samplers import MostTelling, Planned, create_tpe

RANGE = FloatDistribution(0.0, 1.0)
BEST = 0.3


def _create_study(sampler: optuna.samplers.BaseSampler, ended: int, direction: str = "maximize") -> optuna.Study:
    """A study of a hill with its top at `BEST`, one in three trials of it trained to the end."""
    study = optuna.create_study(sampler=sampler, direction=direction)
    sign = 1 if direction == "maximize" else -1
    for number in range(ended):
        x = (number * 0.6180339887) % 1.0
        state = TrialState.COMPLETE if number % 3 == 0 else TrialState.PRUNED
        value = -sign * abs(x - BEST)
        steps = {1: value, 2: value} if state == TrialState.COMPLETE else {1: value}
        study.add_trial(
            create_trial(
                state=state, value=value, params={"x": x}, distributions={"x": RANGE}, intermediate_values=steps
            )
        )
    return study


def _draw(study: optuna.Study, trials: int) -> list[float]:
    """Values drawn one after the other, each one ended before the next."""
    drawn = []
    for _ in range(trials):
        trial = study.ask()
        drawn.append(trial.suggest_float("x", 0.0, 1.0))
        study.tell(trial, -abs(drawn[-1] - BEST))
    return drawn


def _bounded() -> Planned:
    return Planned({}, lambda trial: trial.number, create_tpe(0), MostTelling())


def _spy(monkeypatch: pytest.MonkeyPatch) -> list[list[FrozenTrial]]:
    """The trials that TPE counts as good, and those that it counts as bad, for each that it draws."""
    seen: list[list[FrozenTrial]] = []
    build = optuna.samplers.TPESampler._build_parzen_estimator

    def note(self: Any, study: Any, space: Any, trials: Any, handle_below: bool) -> Any:
        seen.append(list(trials))
        return build(self, study, space, trials, handle_below)

    monkeypatch.setattr(optuna.samplers.TPESampler, "_build_parzen_estimator", note)
    return seen


def test_few_trials_are_modelled_as_optuna_does() -> None:
    ours, theirs = (_draw(_create_study(sampler, 50), 20) for sampler in (_bounded(), create_tpe(0)))
    assert ours == theirs


@pytest.mark.parametrize("ended", [1000, 4000])
def test_what_is_modelled_does_not_grow_with_the_trials(ended: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = _spy(monkeypatch)
    _draw(_create_study(_bounded(), ended), 150)
    modelled = [len(good) + len(bad) for good, bad in zip(seen[::2], seen[1::2], strict=True)]
    assert len(modelled) == 150
    # 300 that were chosen, and those that have come since.
    assert max(modelled) < 300 + 100
    assert modelled[0] <= 300


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_the_best_and_the_running_trials_are_modelled(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What TPE counts as good are the very trials that it would be among all; no running trial is left out."""
    seen = _spy(monkeypatch)
    study = _create_study(_bounded(), 1000, direction)
    running = [study.ask() for _ in range(3)]
    for trial in (*running, study.ask()):
        trial.suggest_float("x", 0.0, 1.0)
    good, bad = ([trial.number for trial in trials] for trials in seen[-2:])
    complete = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
    nearest = sorted(complete, key=lambda trial: abs(trial.params["x"] - BEST))[:25]
    assert good == sorted(trial.number for trial in nearest)
    assert {trial.number for trial in running} <= set(bad)


@pytest.mark.parametrize("ended", [20, 1000])
def test_the_baseline_is_not_among_the_good_trials(ended: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no values, and better than all others it would be the first of those few."""
    seen = _spy(monkeypatch)
    study = _create_study(_bounded(), ended)
    study.ask().suggest_float("x", 0.0, 1.0)
    without = [trial.number for trial in seen[-2]]
    study = _create_study(_bounded(), ended)
    study.add_trial(create_trial(state=TrialState.COMPLETE, value=1.0))
    study.ask().suggest_float("x", 0.0, 1.0)
    assert [trial.number for trial in seen[-2]] == without != []


def test_a_search_of_many_trials_still_closes_in() -> None:
    drawn = _draw(_create_study(_bounded(), 1000), 50)
    assert sum(abs(x - BEST) < 0.05 for x in drawn) > 40
