"""The study that a run works on in memory, and what its file has at each moment."""

from __future__ import annotations

import shutil
from pathlib import Path

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from fmtune.study import STUDY
from fmtune.studyfile import StudyFile


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "study.db"


def _create(file: StudyFile) -> optuna.Study:
    sampler = optuna.samplers.RandomSampler(seed=0)
    return optuna.create_study(
        storage=file, sampler=sampler, study_name=STUDY, direction="maximize", load_if_exists=True
    )


def _draw(study: optuna.Study) -> optuna.Trial:
    trial = study.ask()
    trial.suggest_float("lr", 0.001, 0.1, log=True)
    trial.suggest_categorical("stem", ["small", "imagenet"])
    return trial


def _read(path: Path) -> list[FrozenTrial]:
    """The trials as any other program finds them in the file now."""
    return optuna.load_study(study_name=STUDY, storage=f"sqlite:///{path}").trials


def _contents(trials: list[FrozenTrial]) -> list[tuple[object, ...]]:
    return [
        (t.number, t.state, t.values, t.params, t.distributions, t.intermediate_values, t.user_attrs) for t in trials
    ]


def test_a_trial_is_in_the_file_whole_or_not_at_all(path: Path) -> None:
    file = StudyFile(path)
    study = _create(file)
    trial = _draw(study)
    assert _read(path) == []
    file.write_new()
    (written,) = _read(path)
    assert (written.state, written.params) == (TrialState.RUNNING, trial.params)


def test_what_becomes_of_a_trial_is_in_the_file_at_once(path: Path) -> None:
    file = StudyFile(path)
    study = _create(file)
    trial = _draw(study)
    file.write_new()
    trial.report(0.5, 1)
    assert _read(path)[0].intermediate_values == {1: 0.5}
    trial.set_user_attr("cause", "none")
    assert _read(path)[0].user_attrs == {"cause": "none"}
    study.tell(trial, 0.75)
    assert (_read(path)[0].state, _read(path)[0].value) == (TrialState.COMPLETE, 0.75)
    study.tell(_draw(study), state=TrialState.FAIL)
    assert _contents(_read(path)) == _contents(study.trials)


def test_a_killed_driver_leaves_all_that_was_written(path: Path, tmp_path: Path) -> None:
    """What lies on the disk without `close` is opened elsewhere, and gone on with."""
    file = StudyFile(path)
    study = _create(file)
    first, second = _draw(study), _draw(study)
    file.write_new()
    study.tell(first, 0.5)
    second.report(0.25, 1)
    _draw(study)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for left in tmp_path.glob("study.db*"):
        shutil.copy(left, elsewhere)
    again = StudyFile(elsewhere / "study.db")
    resumed = _create(again)
    assert _contents(resumed.trials) == _contents(study.trials[:2])
    resumed.tell(1, 0.25)
    assert _draw(resumed).number == 2
    again.write_new()
    assert [trial.state for trial in _read(elsewhere / "study.db")] == [
        TrialState.COMPLETE,
        TrialState.COMPLETE,
        TrialState.RUNNING,
    ]


def test_a_reader_disturbs_nothing(path: Path) -> None:
    """A dashboard that is open as the search ends: the log stays beside the file, for it to read on."""
    file = StudyFile(path)
    study = _create(file)
    study.tell(_draw(study), 0.5)
    reader = optuna.storages.RDBStorage(f"sqlite:///file:{path}?mode=ro&uri=true")
    with reader.engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM trials").scalar() == 1
        study.tell(_draw(study), 0.6)
        file.close()
    assert len(optuna.load_study(study_name=STUDY, storage=reader).trials) == 2
    reader.engine.dispose()
    assert len(_read(path)) == 2


def test_one_file_is_left(path: Path) -> None:
    file = StudyFile(path)
    study = _create(file)
    study.tell(_draw(study), 0.5)
    file.close()
    assert [left.name for left in path.parent.iterdir()] == ["study.db"]
    assert len(_read(path)) == 1
