from __future__ import annotations

from typing import Any

import optuna
import pytest
from ray.tune.experiment import Trial
from ray.tune.search import Searcher

from fmtune.errors import SpaceError
from fmtune.run import TrialRecord
from fmtune.schedulers import Asha, create_scheduler
from fmtune.space import Space
from fmtune.study import STUDY, RunTrials
from fmtune.training import EpochMetrics
from fmtune.trial import create_task
from fmtune.tuner import StudySearch


def _space(**search: Any) -> Space:
    trial = {"epochs": 9, "optim": {"lr": {"log": [0.001, 0.1]}}}
    return Space.load({"data": {"train": "sample"}, "search": {"trials": 10} | search, "trial": trial})


def _stand_in(number: int) -> Trial:
    trial = Trial("stand-in", trial_id=f"trial-{number}", stub=True)
    trial.config = {"number": number}
    return trial


def _report(scheduler: Asha, number: int, epoch: int, seconds: float, accuracy: float) -> str:
    trial = _stand_in(number)
    if trial.trial_id not in scheduler._trial_info:
        scheduler.on_trial_add(None, trial)
    result = {"epoch": epoch, "seconds": seconds, "val_accuracy": accuracy}
    return scheduler.on_trial_result(None, trial, result)


def _create(space: Space, slots: int = 1, earlier: list[TrialRecord] | None = None) -> Asha:
    scheduler = create_scheduler(space, earlier or [], slots)
    assert isinstance(scheduler, Asha)
    return scheduler


@pytest.mark.parametrize("slots", [1, 2])
def test_networks_compete_on_equal_training_time(slots: int) -> None:
    """Hand-worked: of 90 s for 10 trials, a third on the way to the first rung puts it at 3 s for each slot."""
    scheduler = _create(_space(time="90s", rung="seconds"), slots)
    first = 3.0 * slots
    assert _report(scheduler, 1, 2, first - 0.1, 0.5) == "CONTINUE"
    assert _report(scheduler, 1, 3, first + 0.1, 0.6) == "CONTINUE"
    # A slow network gets there in its first epoch, and is held against what the other had by then.
    assert _report(scheduler, 2, 1, first + 0.1, 0.55) == "STOP"
    assert _report(scheduler, 3, 1, first + 0.1, 0.65) == "CONTINUE"


def test_more_slots_than_trials_put_the_first_rung_no_later() -> None:
    """All 10 trials run at once, so that a third of the time is what each has on its way there: 30 of 90 s."""
    scheduler = _create(_space(time="90s", rung="seconds"), slots=64)
    assert _report(scheduler, 1, 1, 29.9, 0.6) == "CONTINUE"
    assert _report(scheduler, 1, 2, 30.1, 0.6) == "CONTINUE"
    assert _report(scheduler, 2, 1, 29.9, 0.5) == "CONTINUE"
    assert _report(scheduler, 2, 2, 30.1, 0.5) == "STOP"


def test_on_epochs_the_time_that_they_take_does_not_matter() -> None:
    scheduler = _create(_space())
    assert _report(scheduler, 1, 1, 1.0, 0.5) == "CONTINUE"
    assert _report(scheduler, 2, 1, 100.0, 0.6) == "CONTINUE"
    assert _report(scheduler, 3, 1, 1.0, 0.55) == "STOP"


def test_no_trial_is_ended_by_the_last_rung_of_seconds() -> None:
    scheduler = _create(_space(time="90s", rung="seconds"))
    assert _report(scheduler, 1, 8, 500.0, 0.5) == "CONTINUE"


def test_the_baseline_is_never_stopped() -> None:
    scheduler = _create(_space())
    assert _report(scheduler, 1, 1, 1.0, 0.9) == "CONTINUE"
    assert _report(scheduler, 0, 1, 1.0, 0.1) == "CONTINUE"


@pytest.mark.parametrize("rung", ["epochs", "seconds"])
def test_rungs_are_rebuilt_from_earlier_trials(rung: str) -> None:
    """What an earlier attempt's trials showed decides as if they had run here."""
    space = _space(time="90s", rung=rung)
    history = [EpochMetrics(1, 0.5, 0.5, 0.8, 0.01, 100.0, 4.0)]
    record = TrialRecord(1, space.baseline, {}, "pruned", history)
    scheduler = _create(space, earlier=[record])
    assert _report(scheduler, 2, 1, 4.0, 0.7) == "STOP"
    assert _report(_create(space), 2, 1, 4.0, 0.7) == "CONTINUE"


def _history(accuracies: list[float]) -> list[EpochMetrics]:
    return [EpochMetrics(i, 0.5, 0.5, value, 0.01, 100.0, 4.0 * i) for i, value in enumerate(accuracies, start=1)]


def test_a_trial_that_goes_on_is_held_against_others_by_what_it_came_to_at_each_rung() -> None:
    """Of 9 epochs it had 3; what it comes to in its fourth tells nothing of what others have in their first."""
    space = _space()
    record = TrialRecord(1, space.baseline, {}, "running", _history([0.3, 0.4, 0.5]))
    scheduler = _create(space, earlier=[record])
    assert _report(scheduler, 1, 4, 16.0, 0.8) == "CONTINUE"
    assert _report(scheduler, 1, 5, 20.0, 0.9) == "CONTINUE"
    assert _report(scheduler, 2, 1, 4.0, 0.35) == "CONTINUE", "more than 0.3"
    assert _report(scheduler, 2, 3, 12.0, 0.45) == "STOP", "less than 0.5"


def test_the_median_rule_knows_of_earlier_trials() -> None:
    """Three that ended and one that goes on, whose means over two epochs are 0.5, 0.6, 0.7 and 0.65."""
    space = _space(scheduler="median")
    ended = [
        TrialRecord(n, space.baseline, {}, "complete", _history([a, a])) for n, a in ((1, 0.5), (2, 0.6), (3, 0.7))
    ]
    going_on = TrialRecord(4, space.baseline, {}, "running", _history([0.6, 0.7]))
    scheduler = create_scheduler(space, [*ended, going_on], 1)

    def report(number: int, epoch: int, accuracy: float) -> str:
        trial = trials.setdefault(number, _stand_in(number))
        return scheduler.on_trial_result(None, trial, {"epoch": epoch, "val_accuracy": accuracy})

    trials = {4: _stand_in(4)}
    scheduler.on_trial_add(None, trials[4])
    assert report(4, 3, 0.1) == "CONTINUE", "its best, 0.7, counts"
    assert report(5, 1, 0.64) == "CONTINUE"
    assert report(6, 1, 0.58) == "STOP", "the median of 0.5, 0.6, 0.6, 0.64 and 0.7 is more"


def test_the_median_rule_goes_on_after_trials_without_an_epoch() -> None:
    """One failed before its first, and one was interrupted in it."""
    space = _space(scheduler="median")
    earlier = [TrialRecord(1, space.baseline, {}, "failed"), TrialRecord(2, space.baseline, {}, "running")]
    scheduler = create_scheduler(space, earlier, 1)
    trials = {number: _stand_in(number) for number in (2, 3, 4)}
    for trial in trials.values():
        scheduler.on_trial_add(None, trial)
        assert scheduler.on_trial_result(None, trial, {"epoch": 1, "val_accuracy": 0.5}) == "CONTINUE"


@pytest.mark.parametrize("time_is_left", [False, True])
def test_without_time_for_a_fresh_trial_an_interrupted_one_still_goes_on(time_is_left: bool) -> None:
    space, storage, own = _space(), optuna.storages.InMemoryStorage(), RunTrials(None)
    study = optuna.create_study(storage=storage, study_name=STUDY)
    own.ask(study)
    space.suggest(own.ask(study))
    going_on = create_task(0, 1, space.baseline, resume_from="epoch-5")
    searcher = StudySearch(space, storage, own, [going_on], lambda: time_is_left, lambda config: 0.0, started=2)
    assert searcher.suggest("a") == going_on.as_dict()
    fresh = searcher.suggest("b")
    assert fresh["number"] == 2 if time_is_left else fresh is None
    searcher.on_trial_complete("a", {"epoch": 9, "val_accuracy": 0.8})
    if not time_is_left:
        assert searcher.suggest("c") == Searcher.FINISHED


@pytest.mark.parametrize("search", [{}, {"time": "1m", "scheduler": "median"}])
def test_rungs_of_seconds_need_a_time_and_asha(search: dict[str, Any]) -> None:
    with pytest.raises(SpaceError, match=r"search: .*set time or cost, and scheduler to asha"):
        _space(rung="seconds", **search)


def _first_rungs(scheduler: Asha, numbers: range) -> dict[int, float]:
    """The epoch at which each trial is first held against others."""
    found = {}
    for number in numbers:
        scheduler.on_trial_add(None, _stand_in(number))
        found[number] = min(milestone for milestone, _ in scheduler._trial_info[f"trial-{number}"]._rungs)
    return found


def test_hyperband_gives_some_trials_a_later_first_rung() -> None:
    """Of 9 epochs, rungs at 1, 3 and 9: brackets with 3, 1.5 and 1 shares of the trials, by Hyperband's formula."""
    first = _first_rungs(_create(_space(scheduler="hyperband")), range(1, 1101))
    counts = [list(first.values()).count(rung) for rung in (1, 3, 9)]
    assert counts == [pytest.approx(expected, rel=0.15) for expected in (600, 300, 200)]
    assert first == _first_rungs(_create(_space(scheduler="hyperband")), range(1, 1101)), "a resumed search agrees"
    assert set(_first_rungs(_create(_space()), range(1, 50)).values()) == {1}


def test_hyperband_rebuilds_the_rungs_of_each_bracket() -> None:
    space = _space(scheduler="hyperband")
    first = _first_rungs(_create(space), range(1, 100))
    one, other = [number for number, rung in first.items() if rung == 3][:2]
    history = [EpochMetrics(epoch, 0.5, 0.5, 0.8, 0.01, 100.0, 4.0 * epoch) for epoch in (1, 2, 3)]
    scheduler = _create(space, earlier=[TrialRecord(one, space.baseline, {}, "pruned", history)])
    assert _report(scheduler, other, 1, 4.0, 0.1) == "CONTINUE"
    assert _report(scheduler, other, 3, 12.0, 0.7) == "STOP"
