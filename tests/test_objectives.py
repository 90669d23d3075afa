"""Several objectives: fronts against definitions, the pick, the rungs, and a whole search."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from tables import sample_rows, write_csv

import fmtune
from fmtune.config import ModelConfig, SearchConfig, TrialConfig
from fmtune.errors import RunFolderError, SpaceError
from fmtune.objectives import Objectives, rank_fronts
from fmtune.run import TrialRecord
from fmtune.schedulers import ParetoAsha, create_scheduler
from fmtune.space import Space
from fmtune.study import STUDY
from fmtune.training import EpochMetrics
from fmtune.trial import create_task

SEARCH = SearchConfig(objectives=("val_accuracy", "parameters"))
WIDTHS = {width: 9 * width + 18 * width**2 + 21 * 56 * width**2 + 90 * width + 80 * width + 10 for width in (4, 8, 16)}
"""Parameters of the default network by width, grey images, ten classes: the stem; layer1; layer2 to layer4, each of
four times the one before; batch norms; the head."""


def _record(number: int, accuracy: float, width: int, state: Any = "complete") -> TrialRecord:
    config = TrialConfig(epochs=1, model=ModelConfig(width=width))
    return TrialRecord(number, config, {}, state, [EpochMetrics(1, 1.0, 1.0, accuracy, 0.1, 100.0, 1.0)])


def _objectives() -> Objectives:
    return Objectives(SEARCH, channels=1, classes=10)


@pytest.mark.parametrize("axes", [2, 3])
def test_fronts_are_those_of_the_definition(axes: int) -> None:
    """A point's front is one more than the highest among those that dominate it."""
    points = np.random.default_rng(0).integers(0, 6, (60, axes)).astype(float)
    fronts = rank_fronts(points)
    for point, front in zip(points, fronts, strict=True):
        dominates = (points >= point).all(axis=1) & (points > point).any(axis=1)
        assert front == (fronts[dominates].max() + 1 if dominates.any() else 0)


def test_objectives_are_measured_in_their_own_units() -> None:
    objectives = Objectives(
        SearchConfig(objectives=("val_accuracy", "parameters", "images_per_second")), channels=1, classes=10
    )
    for width, parameters in WIDTHS.items():
        record = _record(0, 0.8, width)
        assert record.last is not None
        assert objectives.measure(record.config, record.last.as_dict()) == [0.8, parameters, 100.0]
        assert objectives.gains(record.config, record.last.as_dict()) == [0.8, -parameters, 100.0]


def test_the_front_has_complete_trials_that_no_other_beats() -> None:
    """Hand-worked: 2 is as large as 1 and less accurate; 4 was stopped early; 5 failed."""
    records = [_record(0, 0.90, 16), _record(1, 0.88, 8), _record(2, 0.87, 8), _record(3, 0.80, 4)]
    records += [_record(4, 0.89, 4, "pruned"), _record(5, 0.99, 4, "failed")]
    assert [record.number for record in _objectives().find_front(records)] == [0, 1, 3]
    columns = _objectives().describe(records)
    assert [number for number, own in columns.items() if own["pareto"]] == [0, 1, 3]
    assert columns[2] == {"parameters": WIDTHS[8], "pareto": False}


@pytest.mark.parametrize(("images", "taken"), [(10_000, 0), (400, 1), (20, 3)])
def test_the_smallest_within_a_standard_error_is_taken(images: int, taken: int) -> None:
    """Hand-worked: sqrt(0.9 * 0.1 / n) is 0.003, 0.015 and 0.067; 0.889 is 0.011 below, and 0.84 is 0.06."""
    front = [_record(0, 0.90, 16), _record(1, 0.889, 8), _record(3, 0.84, 4)]
    assert _objectives().pick(front, images).number == taken


def _scheduler(**search: Any) -> ParetoAsha:
    space = Space.load(
        {
            "search": {"objectives": ["val_accuracy", "-parameters"]} | search,
            "trial": {"epochs": 9, "model": {"width": {"choice": [4, 8, 16]}}},
        }
    )
    scheduler = create_scheduler(space, [], 2, _objectives())
    assert isinstance(scheduler, ParetoAsha)
    return scheduler


def _report(scheduler: ParetoAsha, number: int, epoch: int, accuracy: float, width: int) -> str:
    task = create_task(0, number, TrialConfig(epochs=9, model=ModelConfig(width=width)))
    trial = Trial("stub", trial_id=str(number), config=task.as_dict(), stub=True)
    return scheduler.on_trial_result(None, trial, {"epoch": epoch, "val_accuracy": accuracy})


def test_a_small_network_is_not_stopped_for_its_accuracy() -> None:
    """What is beaten in all by more than two thirds of a rung goes; what no other is smaller than stays."""
    scheduler = _scheduler()
    for number in range(1, 7):
        assert _report(scheduler, number, 1, 0.80 + number / 100, 8) == TrialScheduler.CONTINUE
    assert _report(scheduler, 7, 1, 0.50, 4) == TrialScheduler.CONTINUE
    assert _report(scheduler, 8, 1, 0.70, 8) == TrialScheduler.STOP
    assert _report(scheduler, 9, 1, 0.70, 16) == TrialScheduler.STOP
    assert _report(scheduler, 0, 1, 0.10, 16) == TrialScheduler.CONTINUE, "the baseline runs to its end"
    assert _report(scheduler, 1, 2, 0.0, 8) == TrialScheduler.CONTINUE, "there is no rung at 2"


def test_a_trial_that_ends_is_entered_once() -> None:
    """Tune tells the scheduler of the last result twice."""
    scheduler = _scheduler()
    for number in range(1, 7):
        config = TrialConfig(epochs=9, model=ModelConfig(width=8))
        trial = Trial("stub", trial_id=str(number), config=create_task(0, number, config).as_dict(), stub=True)
        result = {"epoch": 9, "val_accuracy": 0.80 + number / 100}
        scheduler.on_trial_add(None, trial)
        scheduler.on_trial_result(None, trial, result)
        scheduler.on_trial_complete(None, trial, result)
    assert _report(scheduler, 8, 3, 0.70, 8) == TrialScheduler.CONTINUE, "a rung is entered where it is reached"
    assert _report(scheduler, 9, 9, 0.70, 8) == TrialScheduler.STOP


def test_a_slow_network_is_entered_at_the_rung_that_its_first_epoch_reaches_alone() -> None:
    """On seconds it passes the first rung in its first epoch, and what it comes to later says nothing there."""
    scheduler = _scheduler(rung="seconds", time="90s", trials=10)
    rungs = [recorded for _, recorded in scheduler._brackets[0]._rungs]
    trial = Trial("stub", trial_id="1", config=create_task(0, 1, TrialConfig(epochs=9)).as_dict(), stub=True)
    first = min(milestone for milestone, _ in scheduler._brackets[0]._rungs)
    for seconds, accuracy in ((3.5 * first, 0.8), (4 * first, 0.85)):
        result = {"epoch": 1, "seconds": seconds, "val_accuracy": accuracy}
        assert scheduler.on_trial_result(None, trial, result) == TrialScheduler.CONTINUE
    assert [len(recorded) for recorded in rungs][-2:] == [1, 0]


def test_a_resumed_search_finds_its_rungs_filled() -> None:
    scheduler, replayed = _scheduler(), _scheduler()
    for number in range(1, 7):
        accuracy = 0.80 + number / 100
        _report(scheduler, number, 1, accuracy, 8)
        replayed.replay(_record(number, accuracy, 8))
    for one in (scheduler, replayed):
        assert _report(one, 8, 1, 0.70, 8) == TrialScheduler.STOP


@pytest.mark.parametrize(
    ("search", "problem"),
    [
        ({"objectives": ["val_accuracy"]}, "expected val_accuracy, as search.metric is, and then others, each once"),
        ({"objectives": ["parameters", "val_accuracy"]}, "expected val_accuracy"),
        ({"objectives": ["val_accuracy", "parameters", "-parameters"]}, "each once"),
        ({"objectives": ["val_accuracy", "parameters"], "metric": "val_loss"}, "as search.metric is"),
        ({"objectives": ["val_accuracy", "parameters"], "sampler": "cmaes"}, "sampler cmaes has one objective only"),
        ({"objectives": ["val_accuracy", "parameters"], "scheduler": "median"}, "take asha, hyperband or none"),
        ({"objectives": ["val_accuracy", "size"]}, "size"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_reason(search: dict[str, Any], problem: str) -> None:
    with pytest.raises(SpaceError) as caught:
        Space.load({"search": search, "trial": {}})
    assert problem in str(caught.value)


def test_a_sign_changes_nothing() -> None:
    spaces = [
        Space.load({"search": {"objectives": ["val_accuracy", f"{sign}parameters", f"{sign}images_per_second"]}})
        for sign in ("", "-")
    ]
    assert spaces[0] == spaces[1]
    assert Space.load({"search": spaces[0].search.model_dump(mode="json")}).search == spaces[0].search


@pytest.mark.slow
def test_a_search_finds_a_front_and_takes_one_of_it(ray_cluster: None, tmp_path: Path) -> None:
    """In the study, in trials.csv, in the summary and on the page; and a finished search can be extended."""
    source = str(write_csv(tmp_path / "t.csv", sample_rows("train", 20)))
    space: dict[str, Any] = {
        "data": {"train": source, "test": source},
        "search": {"trials": 10, "objectives": ["val_accuracy", "-parameters"]},
        "resources": {"cpus": 2},
        "baseline": {"epochs": 1, "batch_size": 16, "model": {"width": 16}},
        "trial": {"epochs": 3, "batch_size": 16, "model": {"width": {"int": [2, 12]}}},
    }
    result = fmtune.search(space, name="front", runs=tmp_path)
    summary = result.summary
    assert sum(summary["trials"].values()) == 10
    assert summary["trials"]["failed"] == 0
    assert summary["finalists"] == []
    with result.folder.trials.open() as file:
        rows = list(csv.DictReader(file))
    marked = [int(row["number"]) for row in rows if row["pareto"] == "True"]
    assert sorted(point["trial"] for point in summary["front"]) == marked
    assert summary["best_trial"] in marked
    assert all(rows[number]["state"] == "complete" for number in marked)
    study = optuna.load_study(study_name=STUDY, storage=f"sqlite:///{result.folder.study}")
    assert study.directions == [optuna.study.StudyDirection.MAXIMIZE, optuna.study.StudyDirection.MINIMIZE]
    for trial, row in zip(study.trials, rows, strict=True):
        assert trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
        if trial.state == TrialState.COMPLETE:
            assert trial.values == [float(row["val_accuracy"]), float(row["parameters"])]
    page = result.folder.report.read_text()
    assert "The Pareto front" in page and 'id="parameters-plot"' in page
    alone = {key: value for key, value in space["search"].items() if key != "objectives"}
    with pytest.raises(RunFolderError, match=r"another search\.objectives; .* has \[val_accuracy, parameters\]"):
        fmtune.search(space | {"search": alone}, name="front", runs=tmp_path, resume=True)
    space["search"]["trials"] = 11
    assert sum(fmtune.search(space, name="front", runs=tmp_path, resume=True).summary["trials"].values()) == 11
