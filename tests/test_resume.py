"""What is true of a trial when its search ends or breaks off, and what a run makes of that as it goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import ray
from tables import sample_rows, write_csv

from fmtune import search
from fmtune.checkpoint import read_json
from fmtune.errors import RunFailed, RunFolderError
from fmtune.explore import Exploration
from fmtune.run import RunFolder
from fmtune.search import RunResult, _check_folder
from fmtune.space import Space
from fmtune.timing import Timing
from fmtune.training import EpochMetrics
from fmtune.trial import Task

EPOCHS = 3


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_csv(tmp_path_factory.mktemp("source") / "train.csv", sample_rows("train", 20))


def _search(source: Path, runs: Path, trials: int, **options: Any) -> RunResult:
    """One trial after the other."""
    trial = {"epochs": EPOCHS, "batch_size": 64, "model": {"depth": 10, "width": 4, "stem": "imagenet"}}
    space = {
        "data": {"train": str(source), "validation": 0.2},
        "resources": {"cpus": ray.cluster_resources()["CPU"]},
        "search": {"trials": trials, "scheduler": "none", "sampler": "random", "finalists": 0, "refit": False},
        "baseline": trial,
        "trial": trial | {"optim": {"lr": {"log": [0.001, 0.1]}}},
    }
    return search(space, name="run", runs=runs, **options)


def _checkpoints(folder: RunFolder, trial: int) -> dict[int, Path]:
    """Those of a trial, by epoch."""
    found = folder.ray.glob(f"search*/{trial:05d}/checkpoint_*")
    return {read_json(path / "metrics.json")["epoch"]: path for path in found}


def test_a_run_that_can_t_write_ends_with_the_cause_and_goes_on(
    ray_cluster: None, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full at the baseline's last epoch.

    That is then in the history without a whole checkpoint, as a kill leaves it: it is trained again, for another
    epoch's weights would stand for it. A trial that has ended gets no epoch that was trained but never entered.
    """
    append, folder = RunFolder.append_history, RunFolder(tmp_path / "run")

    def fill(self: RunFolder, number: int, metrics: EpochMetrics) -> None:
        if metrics.epoch == EPOCHS:
            raise OSError(28, "No space left on device")
        append(self, number, metrics)

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "append_history", fill)
        with pytest.raises(RunFailed) as caught:
            _search(source, tmp_path, trials=2)
    cause, advice = caught.value.lines
    assert (
        "No space left on device" in cause and "keeps what is done; mend the cause, and go on with --resume" in advice
    )
    shutil.rmtree(_checkpoints(folder, 0)[EPOCHS])
    folder.append_history(0, EpochMetrics(EPOCHS, 0.1, 0.1, 0.999, 0.1, 1000.0, 1.0))

    result = _search(source, tmp_path, trials=2, resume=True)
    history = folder.read_history()
    assert {number: len(epochs) for number, epochs in history.items()} == {0: EPOCHS, 1: EPOCHS}
    assert history[0][-1].val_accuracy != 0.999
    assert result.summary["trials"] == {"complete": 2, "pruned": 0, "failed": 0}

    last = _checkpoints(folder, 1)[EPOCHS]
    unseen = shutil.copytree(last, last.with_name("checkpoint_000099"))
    metrics = read_json(unseen / "metrics.json")
    (unseen / "metrics.json").write_text(json.dumps(metrics | {"epoch": EPOCHS + 1}))
    result = _search(source, tmp_path, trials=3, resume=True)
    assert {number: len(epochs) for number, epochs in folder.read_history().items()} == dict.fromkeys(range(3), EPOCHS)
    assert result.summary["images_trained"] == 3 * EPOCHS * 160


def test_a_trial_that_reports_its_last_epoch_as_the_time_ends_is_complete(
    ray_cluster: None, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_epoch, is_over = Exploration.on_epoch, False

    def end(self: Exploration, task: Task, metrics: EpochMetrics) -> None:
        nonlocal is_over
        on_epoch(self, task, metrics)
        is_over = is_over or (task.number == 1 and metrics.epoch == EPOCHS)

    monkeypatch.setattr(Exploration, "on_epoch", end)
    monkeypatch.setattr(Timing, "search_is_over", lambda self: is_over)
    assert _search(source, tmp_path, trials=9).summary["trials"] == {"complete": 2, "pruned": 0, "failed": 0}


def _space(**search: Any) -> Space:
    return Space.load({"search": search, "trial": {"model": {"width": {"choice": [4, 8]}}}})


def test_a_folder_with_nothing_in_it_is_as_good_as_none(tmp_path: Path) -> None:
    """A run that was cut off before it had begun leaves one."""
    (tmp_path / "run" / "ray").mkdir(parents=True)
    (tmp_path / "run" / "space.yaml.part").touch()
    _check_folder(tmp_path / "run", _space(), resume=False)
    _check_folder(tmp_path / "none", _space(), resume=False)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(RunFolderError, match=r"something other than a run; choose another --name"):
            _check_folder(tmp_path / "run", _space(), resume)


@pytest.mark.parametrize(("before", "after"), [("random", "grid"), ("grid", "tpe")])
def test_a_search_does_not_become_a_grid_halfway(tmp_path: Path, before: str, after: str) -> None:
    """Points of a grid go by the numbers of trials, of which some have been others."""
    RunFolder.create(tmp_path / "run", _space(sampler=before).to_yaml(), "x")
    with pytest.raises(RunFolderError, match=rf"another search.sampler, to or from a grid; it had {before}"):
        _check_folder(tmp_path / "run", _space(sampler=after), resume=True)
    _check_folder(tmp_path / "run", _space(sampler=before, trials=9), resume=True)
