"""Trials whose process dies, and trials whose training fails."""

from __future__ import annotations

import csv
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from tables import sample_rows, write_csv

import fmtune.tuner
from fmtune import search
from fmtune.run import RunFolder

_EPOCHS = 5
_MODEL = {"depth": 10, "width": 4, "stem": "imagenet"}


def _space(source: Path, worst_rate: float, scheduler: str) -> dict[str, Any]:
    """The baseline and a trial of each of two learning rates, without finalists and refit."""
    trial = {"epochs": _EPOCHS, "batch_size": 64, "precision": "fp32", "model": _MODEL}
    return {
        "data": {"train": str(source), "validation": 0.2},
        "search": {"sampler": "grid", "scheduler": scheduler, "finalists": 0, "refit": False},
        "baseline": trial | {"optim": {"name": "adamw", "lr": 0.01}},
        "trial": trial | {"optim": {"name": "sgd", "lr": {"choice": [0.01, worst_rate]}}},
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_csv(tmp_path_factory.mktemp("source") / "train.csv", sample_rows("train", 40))


def _epochs_told(folder: RunFolder, number: int) -> list[int]:
    with folder.history.open() as file:
        return [int(row["epoch"]) for row in csv.DictReader(file) if int(row["trial"]) == number]


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["asha", "median", "none"])
def test_a_trial_whose_process_dies_goes_on_from_its_last_checkpoint(
    scheduler: str, ray_cluster: None, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The baseline's process is killed as its third epoch is told: all five are trained, and one at most twice."""
    killed = []
    tell = fmtune.tuner._Reports.on_trial_result

    def tell_and_kill(self: Any, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        tell(self, iteration, trials, trial, result, **info)
        if not killed and trial.config["number"] == 0 and result["epoch"] == 3:
            killed.append(result["pid"])
            os.kill(result["pid"], signal.SIGKILL)

    monkeypatch.setattr(fmtune.tuner._Reports, "on_trial_result", tell_and_kill)
    found = search(_space(source, 0.02, scheduler), name="killed", runs=tmp_path)
    assert len(killed) == 1
    assert found.summary["trials"]["failed"] == 0
    told = _epochs_told(found.folder, 0)
    assert sorted(set(told)) == [1, 2, 3, 4, 5]
    assert len(told) <= _EPOCHS + 1


@pytest.mark.parametrize("scheduler", ["asha", "median", "none"])
def test_an_error_of_the_training_ends_the_trial_at_once(
    scheduler: str, ray_cluster: None, source: Path, tmp_path: Path
) -> None:
    """Tune writes down each failure of a trial: there is one, with its cause, and the other trials are trained."""
    found = search(_space(source, 1e30, scheduler), name="failing", runs=tmp_path)
    (failure,) = found.summary["failures"]
    assert "training loss became nan in epoch 1" in failure["cause"]
    (errors,) = found.folder.ray.glob("search/*/error.txt")
    assert errors.read_text().count("Failure #") == 1
