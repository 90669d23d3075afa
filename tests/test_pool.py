"""Trials of two workers that stay up from one trial to the next."""

from __future__ import annotations

import os
import signal
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
import torch
from ray.util import placement_group_table
from safetensors.torch import save_file
from tables import sample_rows, write_csv

from fmtune import search
from fmtune.checkpoint import load_weights
from fmtune.config import AugmentConfig, DataConfig, ModelConfig, ResourcesConfig, TrialConfig
from fmtune.data import load_training_data
from fmtune.model import create_model
from fmtune.training import EpochMetrics
from fmtune.trial import SharedData, Task, create_training
from fmtune.tuner import TaskRounds, Until, run_trials

RESOURCES = ResourcesConfig(workers=2, cpus=1)
CONFIG = TrialConfig(epochs=3, batch_size=64, model=ModelConfig(width=4))


class _Watcher:
    """Keeps what it is told, and acts after each epoch."""

    def __init__(self, act: Callable[[Task, EpochMetrics], None] = lambda task, metrics: None) -> None:
        self.losses: dict[str, list[float]] = defaultdict(list)
        self.causes: dict[str, str | None] = {}
        self.checkpoints: dict[str, str] = {}
        self.workers: list[set[int]] = []
        self._act = act

    def on_start(self, task: Task) -> None:
        pass

    def on_epoch(self, task: Task, metrics: EpochMetrics) -> None:
        self.losses[task.name].append(metrics.train_loss)
        self.workers.append(_find_workers())
        self._act(task, metrics)

    def on_checkpoint(self, task: Task, folder: str) -> None:
        self.checkpoints[task.name] = folder

    def on_end(self, task: Task, cause: str | None) -> None:
        self.causes[task.name] = cause

    def on_tick(self) -> None:
        pass


def _find_workers() -> set[int]:
    """Processes of the pool."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name = (folder / "cmdline").read_bytes()
        except OSError:  # ended meanwhile
            continue
        if name.startswith(b"ray::_Worker"):
            found.add(int(folder.name))
    return found


@pytest.fixture(scope="module")
def shared(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> SharedData:
    source = write_csv(tmp_path_factory.mktemp("source") / "train.csv", sample_rows("train", 40))
    return SharedData.of(load_training_data(DataConfig(train=str(source), validation=0.2)))


def _run(shared: SharedData, watcher: _Watcher, folder: Path, configs: list[TrialConfig]) -> None:
    tasks = [Task(f"task{i}", seed=i, trial=config.model_dump()) for i, config in enumerate(configs)]
    run_trials(
        shared,
        RESOURCES,
        TaskRounds(lambda: tasks),
        len(tasks),
        name="pool",
        storage=str(folder),
        watcher=watcher,
        until=Until(lambda: False),
        pooled=True,
    )


def test_workers_stay_up_from_trial_to_trial_and_nothing_is_left(shared: SharedData, tmp_path: Path) -> None:
    watcher = _Watcher()
    _run(shared, watcher, tmp_path, [CONFIG] * 3)
    assert watcher.causes == dict.fromkeys(("task0", "task1", "task2"))
    assert [len(losses) for losses in watcher.losses.values()] == [3, 3, 3]
    assert len(watcher.workers[0]) == 2
    assert all(workers == watcher.workers[0] for workers in watcher.workers)
    assert all(Path(folder).is_dir() for folder in watcher.checkpoints.values())
    assert len(watcher.checkpoints) == 3
    assert all(group["state"] == "REMOVED" for group in placement_group_table().values())


def test_two_workers_train_as_one_does(shared: SharedData, tmp_path: Path) -> None:
    """Same seed, same order, same augmentation, batch norm over the whole batch: the same first epoch but for rounding.

    Batches are of 45 and 46, so that parts differ in size. Muon would magnify the rounding, as later epochs do.
    """
    changes = {
        "batch_size": 50,
        "precision": "fp32",
        "augment": AugmentConfig(flip=True, translate=2),
        "optim": CONFIG.optim.model_copy(update={"name": "adamw"}),
    }
    config = CONFIG.model_copy(update=changes)
    watcher = _Watcher()
    _run(shared, watcher, tmp_path, [config])
    task = Task("alone", seed=0, trial=config.model_dump())
    alone = create_training(task, shared, torch.device("cpu"), rank=0, workers=1, distribute=None)
    loss = alone.run_epoch().train_loss
    assert watcher.losses["task0"][0] == pytest.approx(loss, abs=1e-3)


def test_two_workers_keep_frozen_stages_until_they_thaw(shared: SharedData, tmp_path: Path) -> None:
    start = {name: value.clone() for name, value in create_model(ModelConfig(width=4), 1, 10).state_dict().items()}
    save_file(start, tmp_path / "start.safetensors")
    frozen = ModelConfig(width=4, pretrained=str(tmp_path / "start.safetensors"), freeze=2)
    models = [frozen, frozen.model_copy(update={"unfreeze_epoch": 2})]
    watcher = _Watcher()
    _run(shared, watcher, tmp_path, [CONFIG.model_copy(update={"epochs": 2, "model": model}) for model in models])
    assert watcher.causes == dict.fromkeys(("task0", "task1"))
    kept, thawed = (load_weights(Path(watcher.checkpoints[name])) for name in ("task0", "task1"))
    for name in start:
        if name.split(".")[0] in ("conv1", "bn1", "layer1") and not name.endswith("num_batches_tracked"):
            assert torch.equal(kept[name], start[name]), name
            assert not torch.equal(thawed[name], start[name]), name
    assert not torch.equal(kept["layer4.0.conv1.weight"], start["layer4.0.conv1.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("is_training", [False, True])
def test_a_killed_worker_is_replaced_and_the_training_goes_on_as_if_it_had_lived(
    is_training: bool, shared: SharedData, tmp_path: Path
) -> None:
    """The same losses as without a kill: the epoch is done again from the checkpoint before it.

    Between epochs the first worker dies; within one it is the last, and its death shows in the first one's error.
    """

    def kill(task: Task, metrics: EpochMetrics) -> None:
        if metrics.epoch != 1:
            return
        pids = sorted(_find_workers())
        if is_training:
            Timer(0.1, os.kill, (pids[-1], signal.SIGKILL)).start()
        else:
            os.kill(pids[0], signal.SIGKILL)

    undisturbed, disturbed = _Watcher(), _Watcher(kill)
    _run(shared, undisturbed, tmp_path / "undisturbed", [CONFIG])
    _run(shared, disturbed, tmp_path / "disturbed", [CONFIG])
    assert disturbed.causes == {"task0": None}
    assert disturbed.workers[-1].isdisjoint(disturbed.workers[0])
    assert disturbed.losses["task0"] == pytest.approx(undisturbed.losses["task0"], rel=1e-4)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_fails_the_trial_at_once_and_the_next_one_runs(
    shared: SharedData, tmp_path: Path
) -> None:
    watcher = _Watcher()
    diverging = CONFIG.model_copy(
        update={"precision": "fp32", "optim": CONFIG.optim.model_copy(update={"name": "sgd", "lr": 1e30})}
    )
    _run(shared, watcher, tmp_path, [diverging, CONFIG])
    assert "loss" in (watcher.causes["task0"] or "")
    assert watcher.causes["task1"] is None
    assert len(watcher.losses["task1"]) == 3


@pytest.mark.slow
def test_a_search_of_two_workers_a_trial_ends_with_every_trial_accounted_for(ray_cluster: None, tmp_path: Path) -> None:
    """Stopped early or complete, each once, with every epoch told once."""
    source = write_csv(tmp_path / "train.csv", sample_rows("train", 40))
    trial: dict[str, Any] = {"epochs": 3, "batch_size": 64, "model": {"width": 4}}
    space = {
        "data": {"train": str(source), "validation": 0.2},
        "search": {"trials": 4, "finalists": 0, "refit": False},
        "resources": {"workers": 2, "cpus": 1},
        "baseline": trial,
        "trial": trial | {"optim": {"lr": {"log": [1e-3, 1e-1]}}},
    }
    result = search(space, name="two", runs=tmp_path)
    counts = result.summary["trials"]
    assert counts["failed"] == 0
    assert counts["complete"] + counts["pruned"] == 4
    rows = result.folder.history.read_text(encoding="utf-8").splitlines()[1:]
    assert len(rows) == sum(map(len, result.folder.read_history().values()))
