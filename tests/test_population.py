"""Population-based training: moves within ranges, who takes over what, its replay, and a whole search."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from optuna.trial import TrialState
from tables import sample_rows, write_csv
from torch import nn

import fmtune
from fmtune.checkpoint import save_training
from fmtune.config import ModelConfig, OptimConfig, TrialConfig
from fmtune.data import Classes
from fmtune.errors import FmtuneError, SpaceError
from fmtune.explore import Exploration
from fmtune.model import Pixels
from fmtune.optim import Optimization
from fmtune.population import Adoption, Population, adopt, count_segments, describe_adoption, parse_earlier
from fmtune.ranges import Choice, Interval, Range
from fmtune.run import TrialRecord
from fmtune.sources import open_place
from fmtune.space import Space
from fmtune.stored import StoredTable, read_table, write_table
from fmtune.study import ADOPTED, STUDY
from fmtune.training import EpochMetrics, TrainingState
from fmtune.trial import SharedData, Task, _train

SPACE: dict[str, Any] = {
    "search": {"trials": 11, "scheduler": "pbt", "sampler": "random"},
    "trial": {
        "epochs": 10,
        "model": {"width": {"choice": [4, 8]}},
        "optim": {"lr": {"log": [0.001, 0.1]}, "weight_decay": {"float": [0.0, 0.1]}},
    },
}


# Values


@pytest.mark.parametrize(
    "searched",
    [Interval("log", 1e-4, 1e-1), Interval("float", 0.0, 0.3), Interval("int", 0, 4), Choice((1, 2, 3))],
)
def test_moves_stay_in_the_range_and_get_about(searched: Range) -> None:
    random, value, seen = Random(0), searched.candidates[0], set()
    for _ in range(300):
        value = searched.move(value, random)
        assert searched.contains(value)
        seen.add(value)
    assert len(seen) >= 3
    if isinstance(searched, Interval) and searched.kind == "int":
        assert seen == {0, 1, 2, 3, 4}
        assert all(isinstance(value, int) for value in seen)


def test_a_number_moves_by_a_fifth_or_is_drawn_anew() -> None:
    searched, random = Interval("float", 0.0, 10.0), Random(0)
    moved = [searched.move(5.0, random) for _ in range(2000)]
    near = sum(value in (4.0, 6.0) for value in moved)
    assert 0.7 < near / len(moved) < 0.8


# The optimizer


def _train_a_little(network: nn.Linear, optimization: Optimization, steps: int) -> list[float]:
    rates = []
    for _ in range(steps):
        rates.append(optimization.learning_rate)
        optimization.minimise(network(torch.ones(4, 3)).square().mean())
    return rates


@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "constant"])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_training_goes_on_with_another_rate_momentum_and_decay(name: Any, schedule: Any) -> None:
    """The rates that follow are those of a training that had the new peak from the start; moments are kept."""
    old = OptimConfig(name=name, schedule=schedule, lr=0.01, weight_decay=0.1, momentum=0.9)
    new = OptimConfig(name=name, schedule=schedule, lr=0.03, weight_decay=0.2, momentum=0.5)
    network = nn.Linear(3, 2)
    before = Optimization(network, old, steps=12)
    _train_a_little(network, before, 6)
    saved = io.BytesIO()
    torch.save(before.state_dict(), saved)
    saved.seek(0)
    after = Optimization(network, new, steps=12)
    expected = _train_a_little(nn.Linear(3, 2), Optimization(nn.Linear(3, 2), new, steps=12), 12)[6:]
    after.load_state_dict(torch.load(saved, weights_only=True))
    (optimizer,) = after.optimizers
    state = next(iter(optimizer.state.values()))
    kept = {key: value.clone() for key, value in state.items() if isinstance(value, torch.Tensor)}
    assert kept
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.2, 0.0}
    if name == "sgd":
        assert {group["momentum"] for group in optimizer.param_groups} == {0.5}
    assert _train_a_little(network, after, 6) == pytest.approx(expected)


# Members


def _record(number: int, accuracies: list[float], lr: float = 0.01, epochs: int = 10) -> TrialRecord:
    config = TrialConfig(epochs=epochs, model=ModelConfig(width=4), optim=OptimConfig(lr=lr))
    history = [EpochMetrics(i, 1.0, 1.0, value, 0.1, 1.0, float(i)) for i, value in enumerate(accuracies, start=1)]
    return TrialRecord(number, config, {"optim.lr": lr}, "running", history, checkpoint=f"place-{number}")


def _population() -> Population:
    def value_at(record: TrialRecord, epoch: int) -> float:
        value = record.history[epoch - 1].val_accuracy
        assert value is not None
        return value

    return Population(Space.load(SPACE), value_at, lambda number, epoch: Random(number))


def test_the_last_fifth_takes_over_from_the_first() -> None:
    """Of ten members two are behind and two lead, compared after the two epochs that all have."""
    members = [_record(n, [0.1, 0.5 + n / 100, *([0.0] * (n % 2))]) for n in range(1, 11)]
    adoptions = {member.number: _population().judge(member, members) for member in members if len(member.history) == 2}
    behind = {number for number, adoption in adoptions.items() if adoption is not None}
    assert behind == {2}, "1 is behind too, but has got further than those it would be compared with at its epoch"
    adoption = adoptions[2]
    assert adoption is not None
    assert adoption.donor.number in (9, 10)
    assert adoption.config.model == adoption.donor.config.model
    assert adoption.config.optim.lr != 0.01
    assert 0.001 <= adoption.config.optim.lr <= 0.1
    assert _population().judge(members[1], members) == adoption, "the same numbers are drawn each time"


def test_fewer_than_five_members_go_on_as_they_are() -> None:
    members = [_record(n, [0.1 * n]) for n in range(1, 5)]
    assert not any(_population().judge(member, members) for member in members)


def test_nobody_takes_over_from_a_training_that_is_over() -> None:
    members = [_record(n, [0.1 * n] * (10 if n == 5 else 2)) for n in range(1, 6)]
    assert _population().judge(members[0], members) is None


def test_nobody_takes_over_from_a_training_that_is_under_way() -> None:
    """Its checkpoint may be gone before it is loaded."""
    members = [_record(n, [0.1 * n] * 2) for n in range(1, 6)]
    assert _population().judge(members[0], members, busy={5}) is None
    assert _population().judge(members[0], members, busy={4}) is not None


def test_some_members_come_to_their_ends_where_the_time_does_not_carry_all() -> None:
    waiting = [_record(number, [0.1] * epochs) for number, epochs in [(1, 4), (2, 2), (3, 2), (4, 4)]]
    assert _population().pick(waiting, is_time_for_all=True).number == 2
    assert _population().pick(waiting, is_time_for_all=False).number == 1


def test_parts_of_a_training_add_up() -> None:
    """Hand-worked: ten epochs in five parts of two; eleven trials, the baseline in one."""
    population, stops, record = _population(), [], _record(1, [])
    while len(record.history) < 10:
        stops.append(population.next_stop(record))
        record = _record(1, [0.1] * stops[-1])
    assert stops == [2, 4, 6, 8, 10]
    assert count_segments(Space.load(SPACE), 10) == 1 + 10 * 7, "one of seven epochs has seven parts"
    assert population.next_stop(_record(1, [0.1] * 3, epochs=4)) == 4


def test_what_is_taken_over_is_history_weights_and_way() -> None:
    donor, record = _record(7, [0.5, 0.6], lr=0.02), _record(3, [0.1, 0.2])
    donor.earlier = [(1, donor.config)]
    config = donor.config.model_copy(update={"optim": OptimConfig(lr=0.024)})
    adopt(record, Adoption(donor, config), {"optim.lr": 0.024})
    assert (record.config, record.params, record.checkpoint) == (config, {"optim.lr": 0.024}, "place-7")
    assert record.history == donor.history and record.history is not donor.history
    assert record.earlier == [(1, donor.config), (2, donor.config)]
    assert donor.earlier == [(1, donor.config)]
    adopted = json.loads(json.dumps(describe_adoption(record)))
    assert parse_earlier(adopted) == record.earlier
    assert (adopted["epoch"], adopted["checkpoint"]) == (2, "place-7")
    assert TrialConfig.model_validate(adopted["config"]) == config


@pytest.mark.parametrize(
    ("search", "trial", "problem"),
    [
        ({"sampler": "tpe"}, {}, "sampler tpe learns from values that stay; set sampler to random"),
        ({"objectives": ["val_accuracy", "parameters"]}, {}, "scheduler pbt compares by one metric"),
        (
            {},
            {"optim": {"lr": 0.01, "weight_decay": 0.1}},
            "pbt changes values along a training; search one of optim.lr",
        ),
    ],
)
def test_what_can_not_work_is_refused_with_the_reason(
    search: dict[str, Any], trial: dict[str, Any], problem: str
) -> None:
    with pytest.raises(SpaceError) as caught:
        Space.load(SPACE | {"search": SPACE["search"] | search, "trial": SPACE["trial"] | trial})
    assert problem in str(caught.value)


# Trainings


def _shared(folder: Path) -> SharedData:
    """Images that stay in a file, so that no Ray is needed."""
    table, file = sample_rows("train", 12), open_place(str(folder / "t.parquet"))
    write_table(file, [table])
    stored = read_table(file, memory=1)
    assert isinstance(stored, StoredTable)
    rows = np.arange(120)
    return SharedData(
        "x",
        stored,
        rows[rows % 4 > 0],
        rows[rows % 4 == 0],
        Pixels(1, (0.3,), (0.3,)),
        Classes(tuple(range(10)), tuple("0123456789")),
    )


def test_a_replay_takes_the_way_that_the_member_took(tmp_path: Path) -> None:
    """Two configurations one after the other in one task, and as two parts with a checkpoint between: bit for bit."""
    first = TrialConfig(epochs=4, batch_size=16, precision="fp32", model=ModelConfig(width=4))
    second = first.model_copy(update={"optim": OptimConfig(lr=0.005, label_smoothing=0.0)})
    shared, ends = _shared(tmp_path), []

    def keep(metrics: EpochMetrics, state: TrainingState) -> None:
        folder = tmp_path / f"{len(ends)}"
        folder.mkdir()
        save_training(folder, state.state_dict(), metrics)
        ends.append((metrics, {key: value.clone() for key, value in state.network.state_dict().items()}))

    def run(config: TrialConfig, **options: Any) -> None:
        _train(Task("x", 1, config.model_dump(), **options), shared, torch.device("cpu"), 0, 1, keep)

    run(first, until=2)
    run(second, resume_from=str(tmp_path / "1"))
    run(second, earlier=[(2, first.model_dump())])
    assert [metrics.epoch for metrics, _ in ends] == [1, 2, 3, 4, 1, 2, 3, 4]
    for (_, apart), (_, together) in zip(ends[:4], ends[4:], strict=True):
        assert all(torch.equal(apart[key], together[key]) for key in apart)
    run(first)
    assert any(not torch.equal(ends[3][1][key], ends[-1][1][key]) for key in ends[3][1])


def _space(source: Path) -> dict[str, Any]:
    """With this seed trial 3 is clearly the worst, and the best lies behind it, so that it rests when 3 is judged."""
    search = {"trials": 6, "scheduler": "pbt", "sampler": "random", "finalists": 0, "metric": "val_loss", "seed": 28}
    return {
        "data": {"train": str(source), "validation": 0.25},
        "search": search,
        "baseline": {"epochs": 1, "batch_size": 32, "model": {"width": 4}},
        "trial": {
            "epochs": 4,
            "batch_size": 16,
            "model": {"width": 4},
            "optim": {"lr": {"log": [1e-6, 0.05]}, "name": "adamw"},
        },
    }


@pytest.mark.slow
def test_a_search_breeds_and_goes_on_after_an_interruption(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All members come to their end; what one took over is in its record, in the study and in the replay."""
    source = write_csv(tmp_path / "t.csv", sample_rows("train", 20))
    on_epoch, seen = Exploration.on_epoch, 0

    def break_off(self: Exploration, task: Task, metrics: EpochMetrics) -> None:
        nonlocal seen
        on_epoch(self, task, metrics)
        seen += 1
        if seen == 12:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Exploration, "on_epoch", break_off)
        with pytest.raises(FmtuneError):
            fmtune.search(_space(source), name="pbt", runs=tmp_path)
    result = fmtune.search(_space(source), name="pbt", runs=tmp_path, resume=True)
    assert result.summary["trials"] == {"complete": 6, "pruned": 0, "failed": 0}
    assert {trial: len(epochs) for trial, epochs in result.folder.read_history().items()} == {
        0: 1,
        **dict.fromkeys(range(1, 6), 4),
    }
    study = optuna.load_study(study_name=STUDY, storage=f"sqlite:///{result.folder.study}")
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 6
    with result.folder.trials.open() as file:
        rows = list(csv.DictReader(file))
    adopted = {trial.number: trial.user_attrs[ADOPTED] for trial in study.trials if ADOPTED in trial.user_attrs}
    assert adopted
    for number, taken in adopted.items():
        assert float(rows[number]["params.optim.lr"]) == taken["config"]["optim"]["lr"]
        assert 0 < taken["epoch"] < 4
    for trial in study.trials[1:]:
        if trial.number not in adopted:
            assert float(rows[trial.number]["params.optim.lr"]) == trial.params["optim.lr"]
    assert result.summary["refit"]
