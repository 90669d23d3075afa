"""Searches end to end, on a few hundred images."""

from __future__ import annotations

import csv
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import optuna
import pyarrow.parquet as pq
import pytest
import ray
import torch
from rich.console import Console
from tables import sample_rows, write_csv

import fmtune.choice
import fmtune.summary
import fmtune.view
from fmtune import evaluate, load, predict, search, train
from fmtune.board import Board
from fmtune.calibration import measure_calibration
from fmtune.checkpoint import load_metrics, read_json
from fmtune.choice import Chooser
from fmtune.data import measure_pixels
from fmtune.errors import InputError, RunFailed, RunFolderError, SpaceError
from fmtune.model import count_parameters
from fmtune.readers import Table
from fmtune.run import RunFolder, TrialRecord
from fmtune.search import RunResult
from fmtune.training import EpochMetrics

TINY: dict[str, Any] = {
    "epochs": 3,
    "batch_size": 64,
    "model": {"depth": 10, "width": 4, "stem": "imagenet"},
    "optim": {"name": "adamw", "lr": 0.01},
}


def _space(source: Path, **sections: Any) -> dict[str, Any]:
    """One trial at a time: each that runs beside another has a process of its own, which imports torch."""
    space: dict[str, Any] = {
        "data": {"train": str(source), "validation": 0.2},
        "resources": {"cpus": 2},
        "search": {"trials": 4, "scheduler": "none", "finalists": 2, "try": [{"optim": {"lr": 0.0125}}]},
        "baseline": TINY,
        "trial": TINY | {"optim": {"name": {"choice": ["adamw", "sgd"]}, "lr": {"log": [0.001, 0.1]}}},
    }
    for name, values in sections.items():
        space[name] = space[name] | values if isinstance(space.get(name), dict) else values
    return space


def _study(folder: RunFolder) -> optuna.Study:
    return optuna.load_study(study_name="fmtune", storage=f"sqlite:///{folder.study}")


def _contents(folder: RunFolder) -> dict[Path, bytes]:
    """Every file of a run folder but its clock."""
    files = [path for path in folder.path.rglob("*") if path.is_file() and path != folder.clock]
    return {path: path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_csv(tmp_path_factory.mktemp("source") / "train.csv", sample_rows("train", 40))


@pytest.fixture(scope="module")
def test_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a test split will be, once a search has chosen."""
    return tmp_path_factory.mktemp("test") / "test.csv"


@pytest.fixture(scope="module")
def result(ray_cluster: None, source: Path, test_source: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """A search of four trials whose test file is not there before the chosen model is saved, nor read a second time."""
    save_model = fmtune.summary.save_model

    def save_then_reveal(*args: Any) -> None:
        save_model(*args)
        write_csv(test_source, sample_rows("test", 30))

    load_test_split = fmtune.summary.load_test_split

    def load_then_hide(*args: Any) -> Any:
        loaded = load_test_split(*args)
        patched.setattr(fmtune.summary, "load_test_split", None)
        return loaded

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fmtune.summary, "save_model", save_then_reveal)
        patched.setattr(fmtune.summary, "load_test_split", load_then_hide)
        # However far the leader is ahead, finalists are retrained.
        patched.setattr(fmtune.choice, "_CLEAR_ERRORS", math.inf)
        space = _space(source, data={"test": str(test_source)}, resources={"cpus": 1})
        return search(space, name="four", runs=tmp_path_factory.mktemp("runs"))


def test_a_search_reads_the_test_split_only_after_its_choice(result: RunResult) -> None:
    """It would have failed on the missing file; instead the summary has a test accuracy of 300 images."""
    assert result.summary["dataset"]["test"] == 300
    correct = result.summary["test_accuracy"] * 300
    assert correct == pytest.approx(round(correct))


def test_the_reloaded_model_has_the_recorded_accuracy(result: RunResult, test_source: Path) -> None:
    measured = evaluate(result.folder.path, str(test_source)).as_dict()
    assert measured["accuracy"] == result.summary["test_accuracy"]
    assert measured["loss"] == result.summary["test_loss"]
    assert measured["interval"] == result.summary["test_interval"]


def test_calibration_and_mistakes_are_those_of_the_saved_model(
    result: RunResult, test_source: Path, tmp_path: Path
) -> None:
    """Against the probabilities that predict writes for the test split."""
    predict(result.folder.path, str(test_source), tmp_path / "out.parquet")
    table = pq.read_table(tmp_path / "out.parquet")
    probabilities = np.stack([table.column(f"probability_{i}").to_numpy() for i in range(10)], axis=1)
    predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    labels = sample_rows("test", 30).labels
    test = read_json(result.folder.best / "metrics.json")["test"]
    expected = measure_calibration(confidence, predicted == labels)
    assert test["calibration"]["ece"] == pytest.approx(expected.ece)
    assert [entry["images"] for entry in test["calibration"]["bins"]] == [b.images for b in expected.bins]
    wrong = sorted(np.flatnonzero(predicted != labels), key=lambda row: -confidence[row])[:24]
    assert [(m["row"], m["true"], m["predicted"]) for m in test["mistakes"]] == [
        (row, labels[row], predicted[row]) for row in wrong
    ]
    assert set(test) == {"accuracy", "interval", "loss", "per_class", "confusion", "calibration", "mistakes"}


def test_the_card_counts_the_parameters_of_the_saved_model(result: RunResult) -> None:
    count = count_parameters(load(result.folder.path).network)
    assert f"({count:,} parameters, stem imagenet)" in result.folder.card.read_text(encoding="utf-8")


def test_a_search_learns(result: RunResult) -> None:
    """Chance is 0.1."""
    assert result.summary["test_accuracy"] > 0.3
    assert result.summary["baseline"]["test_accuracy"] > 0.2


def test_the_gain_over_the_baseline_is_that_of_the_same_images(result: RunResult) -> None:
    """The difference of the accuracies is that of the images which one alone has right."""
    summary = result.summary
    baseline = summary["baseline"]
    paired, images = baseline["difference"], summary["dataset"]["test"]
    assert paired["difference"] == pytest.approx(summary["test_accuracy"] - baseline["test_accuracy"])
    assert paired["gained"] - paired["lost"] == round(images * paired["difference"])
    low, high = paired["interval"]
    assert low < paired["difference"] < high
    assert 0 <= paired["p_value"] <= 1


def test_the_run_folder_is_complete(result: RunResult) -> None:
    folder = result.folder
    names = {str(path.relative_to(folder.path)) for path in folder.path.rglob("*") if path.is_file()}
    assert {
        "space.yaml",
        "environment.json",
        "trials.csv",
        "history.csv",
        "study.db",
        "summary.json",
        "report.html",
        "report.md",
        "plots/reliability.png",
        "best/README.md",
        "best/model.safetensors",
        "best/config.json",
        "best/classes.json",
        "best/metrics.json",
    } <= names
    assert any("events.out.tfevents" in name for name in names)


def test_trials_study_and_history_agree(result: RunResult) -> None:
    with result.folder.trials.open() as file:
        trials = list(csv.DictReader(file))
    history = result.folder.read_history()
    study = _study(result.folder)
    assert [int(row["number"]) for row in trials] == [0, 1, 2, 3]
    assert result.summary["trials"] == {"complete": 4, "pruned": 0, "failed": 0}
    for row, trial in zip(trials, study.trials, strict=True):
        assert row["state"] == "complete"
        assert trial.state == optuna.trial.TrialState.COMPLETE
        epochs = history[trial.number]
        assert [epoch.epoch for epoch in epochs] == [1, 2, 3]
        assert float(row["val_accuracy"]) == epochs[-1].val_accuracy == trial.value
    # The baseline lies outside the ranges; the others have drawn each.
    assert study.trials[0].params == {}
    assert all(set(trial.params) == {"optim.name", "optim.lr"} for trial in study.trials[1:])
    assert trials[1]["params.optim.name"] == study.trials[1].params["optim.name"]
    # The first searched trial takes the value that it is to try, and draws the other.
    assert study.trials[1].params["optim.lr"] == 0.0125


def test_the_winner_is_the_finalist_with_the_best_mean(result: RunResult) -> None:
    finalists = result.summary["finalists"]
    assert len(finalists) == 2
    seeds = {len(finalist["seeds"]) for finalist in finalists}
    assert len(seeds) == 1
    assert 2 <= seeds.pop() <= 5
    means = [fmean(seed["val_accuracy"] for seed in finalist["seeds"]) for finalist in finalists]
    best = finalists[means.index(max(means))]
    assert result.summary["best_trial"] == best["trial"]
    assert result.summary["val_accuracy"] == pytest.approx(max(means))


def test_the_refit_has_seen_all_rows(result: RunResult) -> None:
    """400 rows, a fifth of which were held out of the trials: 4 trials and the finalists on 320, the refit on all."""
    assert result.summary["refit"]
    retrained = sum(len(finalist["seeds"]) for finalist in result.summary["finalists"])
    assert result.summary["images_trained"] == 3 * ((4 + retrained) * 320 + 400)
    seen = load(result.folder.path).pixels
    assert seen == measure_pixels(sample_rows("train", 40).images)


class _Witness:
    """A view that keeps what is under way whenever the board may have changed."""

    def __init__(self, board: Board, console: Console) -> None:
        self.board = board
        self.seen: set[str] = set()
        self.most = 0

    def __enter__(self) -> _Witness:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def note(self, line: str) -> None:
        pass

    def on_end(self, record: TrialRecord) -> None:
        assert self.board.ended[-1] == record.number

    def refresh(self) -> None:
        self.seen |= {flight.name for flight in self.board.in_flight.values()}
        self.most = max(self.most, len(self.board.in_flight))


@pytest.mark.slow
def test_the_board_knows_what_is_under_way(
    ray_cluster: None, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trials, finalists and refit by name, no more of them than Ray has CPUs, and in the end none."""
    witnesses: list[_Witness] = []
    monkeypatch.setattr(
        sys.modules["fmtune.search"], "create_view", lambda *of: witnesses.append(_Witness(*of)) or witnesses[0]
    )
    monkeypatch.setattr(fmtune.choice, "_CLEAR_ERRORS", math.inf)
    search(_space(source, search={"trials": 3}), name="seen", runs=tmp_path)
    (witness,) = witnesses
    finalists = {name for name in witness.seen if name.startswith("finalist-")}
    assert witness.seen - finalists == {"trial 0", "trial 1", "trial 2", "refit"}
    assert {name.split("-")[1] for name in finalists} < {"00000", "00001", "00002"}
    assert len(finalists) in (4, 6, 8, 10)  # two leaders, from two to five seeds each
    assert witness.board.capacity is not None
    assert 1 <= witness.most <= ray.cluster_resources()["CPU"]
    assert witness.board.in_flight == {}
    assert sorted(witness.board.ended) == [0, 1, 2]


def test_of_each_trial_the_last_checkpoint_is_kept_alone(result: RunResult) -> None:
    trials = [folder for folder in (result.folder.ray / "search").iterdir() if folder.is_dir()]
    assert len(trials) == 4
    for folder in trials:
        (kept,) = folder.glob("checkpoint_*")
        assert load_metrics(kept) is not None


def test_a_taken_folder_is_refused_and_left_alone(result: RunResult, source: Path) -> None:
    before = result.folder.summary.read_bytes()
    with pytest.raises(RunFolderError, match=r"the run folder exists; go on with --resume"):
        search(_space(source), name="four", runs=result.folder.path.parent)
    assert result.folder.summary.read_bytes() == before


def test_resuming_with_other_trials_is_refused(result: RunResult, source: Path) -> None:
    space = _space(source, data={"test": "x"})
    with pytest.raises(RunFolderError, match=r"--resume with another `data`"):
        search(space, name="four", runs=result.folder.path.parent, resume=True)


def test_without_time_for_more_trials_a_finished_search_keeps_its_model(
    result: RunResult, source: Path, test_source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the same trials the leader's own weights would be taken, for finalists and refit there is no time either."""
    before = result.folder.read_summary()
    weights = (result.folder.best / "model.safetensors").read_bytes()
    space = _space(source, data={"test": str(test_source)}, search={"trials": 6, "time": 1.0})
    search(space, name="four", runs=result.folder.path.parent, resume=True)
    assert "no time is left for more trials" in capsys.readouterr().out
    assert (result.folder.best / "model.safetensors").read_bytes() == weights
    assert before["refit"] and before["finalists"]
    after = result.folder.read_summary()
    # The table comes from the cache now.
    assert {key for key in before if before[key] != after[key]} <= {"dataset", "seconds"}


def test_going_on_with_other_rows_is_refused(result: RunResult, source: Path, test_source: Path) -> None:
    """As a file that has changed in its place gives, or a stand-in."""
    space = _space(source, data={"test": str(test_source)}, search={"trials": 6})
    rows = source.read_bytes()
    write_csv(source, sample_rows("train", 41))
    try:
        with pytest.raises(RunFolderError, match=r"--resume with other data than it has trained on"):
            search(space, name="four", runs=result.folder.path.parent, resume=True)
    finally:
        source.write_bytes(rows)


def test_two_processes_are_not_at_one_run(result: RunResult, source: Path, test_source: Path) -> None:
    """The second is refused, and what the first writes stays as it is."""
    space = _space(source, data={"test": str(test_source)}, search={"trials": 6})
    before = _contents(result.folder)
    with result.folder.held(), pytest.raises(RunFolderError, match=r"another process is at this run"):
        search(space, name="four", runs=result.folder.path.parent, resume=True)
    assert _contents(result.folder) == before


def test_a_last_row_of_the_history_that_was_cut_short_is_left_out(tmp_path: Path) -> None:
    """What a full disk or a loss of power leaves; the epoch that comes next has a line of its own."""
    folder = RunFolder.create(tmp_path / "run", "", "x")
    epochs = [EpochMetrics(i, 0.5, 0.5, 0.9, 0.01, 1000.0, 1.5 * i) for i in (1, 2)]
    for metrics in epochs:
        folder.append_history(1, metrics)
    whole = folder.history.read_bytes()
    for cut in range(1, len(whole.splitlines(keepends=True)[-1])):
        folder.history.write_bytes(whole[:-cut])
        assert folder.read_history() == {1: epochs[:1]}
    RunFolder.create(tmp_path / "run", "", "x").append_history(1, epochs[1])
    assert folder.read_history() == {1: epochs}


def test_more_trials_extend_a_finished_search(
    result: RunResult, source: Path, test_source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The four are not run again: their history keeps its rows. Asked for no more, it stays as it is."""
    before = result.folder.history.read_text()
    space = _space(source, data={"test": str(test_source)}, search={"trials": 6, "finalists": 0, "refit": False})
    extended = search(space, name="four", runs=result.folder.path.parent, resume=True)
    after = extended.folder.history.read_text()
    assert after.startswith(before)
    assert len(after.splitlines()) == len(before.splitlines()) + 2 * 3
    assert extended.summary["trials"] == {"complete": 6, "pruned": 0, "failed": 0}
    trials = _study(extended.folder).trials
    assert [trial.number for trial in trials] == list(range(6))
    # None is drawn a second time.
    assert len({trial.params["optim.lr"] for trial in trials[1:]}) == 5

    before_again = _contents(extended.folder)
    capsys.readouterr()
    again = search(space, name="four", runs=result.folder.path.parent, resume=True)
    assert "four has finished; for more of it raise search.trials" in capsys.readouterr().out
    assert again.summary == extended.folder.read_summary()
    assert _contents(extended.folder) == before_again


@pytest.mark.slow
def test_a_trial_that_was_cut_off_while_its_values_were_drawn_is_not_trained(
    ray_cluster: None, source: Path, tmp_path: Path
) -> None:
    """As if the driver had been killed between two of its values: it is failed in the study, and others are trained."""
    space = _space(source, search={"trials": 2, "finalists": 0, "refit": False, "try": []})
    first = search(space, name="half", runs=tmp_path)
    _study(first.folder).ask().suggest_categorical("optim.name", ["adamw", "sgd"])
    space["search"]["trials"] = 3
    found = search(space, name="half", runs=tmp_path, resume=True)
    assert found.summary["trials"] == {"complete": 3, "pruned": 0, "failed": 0}
    trials = _study(found.folder).trials
    assert [trial.state.name for trial in trials] == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE"]
    assert trials[2].user_attrs["cause"] == "interrupted before it began"


@pytest.mark.slow
def test_a_finalist_that_fails_is_out(
    ray_cluster: None, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The leader's fresh seeds make its training fail: the other finalist is taken, and what it died of is said."""
    monkeypatch.setattr(fmtune.choice, "_CLEAR_ERRORS", math.inf)
    fresh_task = Chooser._fresh_task
    leader = None

    def spoil(self: Chooser, record: TrialRecord, round_: int, name: str) -> Any:
        nonlocal leader
        leader = record.number if leader is None else leader
        task = fresh_task(self, record, round_, name)
        if record.number != leader:
            return task
        diverging = record.config.optim.model_copy(update={"name": "sgd", "lr": 1e30})
        config = record.config.model_copy(update={"precision": "fp32", "optim": diverging})
        return replace(task, trial=config.model_dump())

    monkeypatch.setattr(Chooser, "_fresh_task", spoil)
    notes: list[str] = []
    monkeypatch.setattr(fmtune.view._LineView, "note", lambda self, line: notes.append(line))
    found = search(_space(source, search={"trials": 3, "refit": False}), name="out", runs=tmp_path)
    (finalist,) = found.summary["finalists"]
    assert found.summary["best_trial"] == finalist["trial"] != leader
    assert len(finalist["seeds"]) == 1
    assert [line for line in notes if line.startswith(f"trial {leader} failed from a fresh seed, and is out: ")]


def test_asha_stops_trials_early(ray_cluster: None, source: Path, tmp_path: Path) -> None:
    """Learning rates over six decades at one slot: some are stopped, which the study calls pruned."""
    space = _space(
        source,
        search={"trials": 8, "scheduler": "asha", "finalists": 0, "refit": False},
        trial=TINY | {"optim": {"name": "sgd", "lr": {"log": [1e-7, 0.1]}}},
    )
    found = search(space, name="asha", runs=tmp_path)
    states = [trial.state.name for trial in _study(found.folder).trials]
    assert states.count("PRUNED") == found.summary["trials"]["pruned"] > 0
    assert states.count("COMPLETE") == found.summary["trials"]["complete"] > 0
    assert states[0] == "COMPLETE", "the baseline is never stopped by others"


def test_a_failing_trial_is_recorded_with_its_cause_and_the_search_goes_on(
    ray_cluster: None, source: Path, tmp_path: Path
) -> None:
    """A learning rate of 1e30 overflows in the first steps. Going on with the run adds nothing, and forgets nothing."""
    space = _space(
        source,
        search={"trials": 60, "sampler": "grid", "finalists": 0, "refit": False, "try": []},
        trial=TINY | {"precision": "fp32", "optim": {"name": "sgd", "lr": {"choice": [0.01, 1e30]}}},
    )
    found = search(space, name="fails", runs=tmp_path)
    # The baseline, and each point of the grid once.
    assert found.summary["trials"] == {"complete": 2, "pruned": 0, "failed": 1}
    failure = found.summary["failures"][0]
    assert "training loss became nan in epoch 1 at step" in failure["cause"]
    assert failure["config"]["optim"]["lr"] == 1e30
    trials = _study(found.folder).trials
    assert [trial.state.name for trial in trials] == ["COMPLETE", "COMPLETE", "FAIL"]
    assert trials[2].user_attrs["cause"] == failure["cause"]
    space["search"]["trials"] = 61
    again = search(space, name="fails", runs=tmp_path, resume=True)
    assert again.summary["failures"] == found.summary["failures"]
    assert again.summary["trials"] == found.summary["trials"]


@pytest.mark.slow
def test_a_search_whose_every_trial_fails_says_why(ray_cluster: None, source: Path, tmp_path: Path) -> None:
    failing = TINY | {"precision": "fp32", "optim": {"name": "sgd", "lr": 1e30}}
    with pytest.raises(RunFailed) as raised:
        search(_space(source, baseline=failing, trial=failing, search={"try": []}), name="fails", runs=tmp_path)
    assert raised.value.lines[0] == "none of 4 trials came to a result"
    assert "training loss became nan" in raised.value.lines[1]


def test_the_same_seed_gives_the_same_trials_and_weights(ray_cluster: None, source: Path, tmp_path: Path) -> None:
    space = _space(source, search={"trials": 3, "finalists": 0, "refit": False})
    first, second = (search(space, name=name, runs=tmp_path) for name in ("first", "second"))
    params = [[trial.params for trial in _study(found.folder).trials] for found in (first, second)]
    assert params[0] == params[1]
    weights = [(found.folder.best / "model.safetensors").read_bytes() for found in (first, second)]
    assert weights[0] == weights[1]


def test_a_training_is_one_trial_without_a_baseline(ray_cluster: None, source: Path, tmp_path: Path) -> None:
    found = train({"data": {"train": str(source), "validation": 0.2}, "trial": TINY}, name="one", runs=tmp_path)
    assert found.summary["trials"] == {"complete": 1, "pruned": 0, "failed": 0}
    assert found.summary["baseline"] is None
    assert found.summary["test_accuracy"] is None
    assert found.summary["images_trained"] == 3 * 320


def test_a_training_may_validate_on_the_test_split(ray_cluster: None, source: Path, tmp_path: Path) -> None:
    """All rows are trained on, and validation and test accuracy are of the same images."""
    test = write_csv(tmp_path / "test.csv", sample_rows("test", 20))
    data = {"train": str(source), "test": str(test), "validation": "test", "resize": 32}
    found = train({"data": data, "trial": TINY | {"precision": "fp32"}}, name="on-test", runs=tmp_path)
    assert found.summary["images_trained"] == 3 * 400
    assert found.summary["dataset"]["validation"] == 200
    assert found.summary["test_accuracy"] == found.summary["val_accuracy"]


def test_a_search_on_the_test_split_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(SpaceError, match=r"data\.validation: a search that validates on the test split"):
        search(_space(source, data={"validation": "test"}), name="x", runs=tmp_path)
    assert not (tmp_path / "x").exists()


def test_a_training_of_ranges_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(SpaceError, match=r"trial\.optim\.name, trial\.optim\.lr: ranges"):
        train(_space(source), name="x", runs=tmp_path)


@pytest.mark.slow
def test_two_workers_train_one_model_by_ddp(
    ray_cluster: None, source: Path, test_source: Path, result: RunResult, tmp_path: Path
) -> None:
    """Every row is seen once an epoch, and what the two save is one network with the published names."""
    space = {
        "data": {"train": str(source), "test": str(test_source), "validation": 0.2},
        "resources": {"workers": 2, "cpus": 1},
        "trial": TINY,
    }
    found = train(space, name="two", runs=tmp_path)
    assert found.summary["trials"] == {"complete": 1, "pruned": 0, "failed": 0}
    assert [epoch.epoch for epoch in found.folder.read_history()[0]] == [1, 2, 3]
    assert evaluate(found.folder.path, str(test_source)).evaluation.accuracy == found.summary["test_accuracy"] > 0.2


def _count_ddp_workers() -> int:
    """Processes of Ray Train that this Ray has started so far."""
    return sum(actor["ActorClassName"] == "RayTrainWorker" for actor in ray._private.state.actors().values())


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_a_ddp_trial_at_once(ray_cluster: None, source: Path, tmp_path: Path) -> None:
    """It is no death of a worker, after which two more would be started: three times."""
    before = _count_ddp_workers()
    failing = TINY | {"precision": "fp32", "optim": {"name": "sgd", "lr": 1e30}}
    space = {"data": {"train": str(source)}, "resources": {"workers": 2, "cpus": 1}, "trial": failing}
    with pytest.raises(RunFailed) as raised:
        train(space, name="two", runs=tmp_path)
    assert raised.value.lines[0] == "none of 1 trials came to a result"
    cause = r"cause: fmtune\.errors\.NonFiniteLoss: training loss became nan in epoch 1 at step \d+"
    assert re.fullmatch(cause, raised.value.lines[1])
    assert _count_ddp_workers() == before + 2


@pytest.mark.parametrize("sampler", ["random", "cmaes", "gp"])
def test_every_sampler_searches_on_loss_with_the_median_rule(
    sampler: str, ray_cluster: None, source: Path, tmp_path: Path
) -> None:
    """The lowest loss wins, no trial is left running, and none is restarted: its epochs are told once."""
    changes = {"trials": 5, "sampler": sampler, "metric": "val_loss", "scheduler": "median", "finalists": 0}
    found = search(_space(source, search=changes | {"refit": False}), name=sampler, runs=tmp_path)
    with found.folder.trials.open() as file:
        trials = list(csv.DictReader(file))
    complete = [float(row["val_loss"]) for row in trials if row["state"] == "complete"]
    assert found.summary["val_loss"] == min(complete)
    rows = found.folder.history.read_text().splitlines()[1:]
    assert len(rows) == sum(map(len, found.folder.read_history().values()))
    assert not [trial for trial in _study(found.folder).trials if not trial.state.is_finished()]


def test_colour_images_are_searched_and_predicted(ray_cluster: None, tmp_path: Path) -> None:
    """Red and blue squares, with the shape of a row given."""
    rng = np.random.default_rng(0)
    labels = np.arange(120) % 2
    images = rng.integers(0, 60, (120, 8, 8, 3), dtype=np.uint8)
    images[labels == 0, :, :, 0] += 150
    images[labels == 1, :, :, 2] += 150
    source = write_csv(tmp_path / "colour.csv", Table(images.reshape(120, 1, 1, -1), labels))
    data = {"train": str(source), "test": str(source), "shape": [8, 8, 3], "validation": 0.2}
    space = _space(source, data=data, search={"trials": 2, "finalists": 0, "try": []}, trial=TINY | {"epochs": 10})
    found = search(space, name="colour", runs=tmp_path)
    assert found.summary["dataset"]["shape"] == [3, 8, 8]
    assert found.summary["test_accuracy"] > 0.9
    assert evaluate(found.folder.path, str(source)).evaluation.accuracy == found.summary["test_accuracy"]


@pytest.mark.slow
def test_the_time_bounds_the_run(ray_cluster: None, source: Path, tmp_path: Path) -> None:
    """Of 10,000 trials as many are started as the time allows; it is this property, not a duration, that is tested."""
    found = search(_space(source, search={"trials": 10_000, "time": 30.0}), name="brief", runs=tmp_path)
    assert 1 <= sum(found.summary["trials"].values()) < 10_000
    assert "running" not in found.folder.trials.read_text()


def test_what_no_trial_could_have_is_refused(ray_cluster: None, source: Path, tmp_path: Path) -> None:
    """The name stays free, and a folder that is there keeps all that is in it but for the time used."""
    refusal = r"resources: a trial wants 4096 CPU, and this machine has"
    search_little = {"trials": 2, "finalists": 0, "refit": False, "try": []}
    with pytest.raises(InputError, match=refusal):
        search(_space(source, search=search_little, resources={"cpus": 4096}), name="big", runs=tmp_path)
    assert list(tmp_path.iterdir()) == []
    found = search(_space(source, search=search_little), name="big", runs=tmp_path)
    before = _contents(found.folder)
    with pytest.raises(InputError, match=refusal):
        more = search_little | {"trials": 3}
        search(_space(source, search=more, resources={"cpus": 4096}), name="big", runs=tmp_path, resume=True)
    assert _contents(found.folder) == before


def test_a_training_starts_from_weights_with_stages_frozen(
    ray_cluster: None, result: RunResult, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the head alone in training, all else is bit for bit what the run of that name ended with, and it is said."""
    model = TINY["model"] | {"pretrained": "four", "freeze": 5}
    space = {"data": {"train": str(source), "validation": 0.2}, "trial": TINY | {"model": model}}
    found = train(space, name="frozen", runs=result.folder.path.parent)
    before, after = (load(run.folder.path).network.state_dict() for run in (result, found))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"fc.weight", "fc.bias"}
    assert f"four: {len(before)} tensors loaded" in capsys.readouterr().out
