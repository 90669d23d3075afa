"""MLflow, Weights & Biases and TensorBoard: what they are told of trials, and what becomes of a run without them."""

from __future__ import annotations

import csv
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tables import sample_rows

import fmtune.trackers
from fmtune import search
from fmtune.config import LoggingConfig, TrialConfig, flatten
from fmtune.errors import InputError, SpaceError
from fmtune.result import RunResult
from fmtune.space import Space
from fmtune.trackers import Tracking, connect_trackers
from fmtune.trackers.tracker import TrackedRun
from fmtune.training import EpochMetrics

TINY: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 64,
    "model": {"depth": 10, "width": 4, "stem": "imagenet"},
    "optim": {"name": "adamw", "lr": 0.01},
}
SPACE: dict[str, Any] = {
    "data": {"validation": 0.2},
    "search": {"trials": 3, "scheduler": "none", "finalists": 0, "refit": False},
    "resources": {"cpus": 2},
    "baseline": TINY,
    "trial": TINY | {"optim": {"name": {"choice": ["adamw", "sgd"]}, "lr": {"log": [0.001, 0.1]}}},
}
SECRET = "s3cret-of-nobody"


class _Runs(ModuleType):
    """Stands in for the package wandb: keeps what runs were told, by their id."""

    Error = ConnectionError

    def __init__(self, login: bool | Exception = True) -> None:
        super().__init__("wandb")
        self.runs: dict[str, _Run] = {}
        self._login = login

    def setup(self) -> SimpleNamespace:
        return SimpleNamespace(settings=SimpleNamespace(mode="online"))

    def login(self, *, prompt: bool) -> bool:
        assert not prompt, "a search must not wait for somebody to answer"
        if isinstance(self._login, Exception):
            raise self._login
        return self._login

    def Settings(self, **settings: Any) -> dict[str, Any]:  # noqa: N802
        return settings

    def init(self, **options: Any) -> _Run:
        run = self.runs.setdefault(options["id"], _Run(options))
        assert not run.is_open, "an open run must not be opened again"
        run.is_open = True
        return run


class _Run:
    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.rows: dict[int, dict[str, float]] = {}
        self.summary: dict[str, Any] = {}
        self.exit_code: int | None = None
        self.is_open = False

    def log(self, values: dict[str, float], step: int) -> None:
        self.rows[step] = values

    def finish(self, exit_code: int = 0) -> None:
        self.exit_code, self.is_open = exit_code, False


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    pytest.importorskip("mlflow", reason="needs the package mlflow-skinny: pip install 'fmtune[mlflow]'")
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture(scope="module")
def wandb() -> Iterator[_Runs]:
    stand_in = _Runs()
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(sys.modules, "wandb", stand_in)
        patched.setenv("WANDB_API_KEY", SECRET)
        patched.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
        yield stand_in


@pytest.fixture(scope="module")
def tracked(ray_cluster: None, wandb: _Runs, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return _search(tmp_path_factory.mktemp("runs"), {"wandb": "clothes"})


def _search(runs: Path, logging: dict[str, str], resume: bool = False, trials: int = 3) -> RunResult:
    space = SPACE | {"logging": logging, "search": SPACE["search"] | {"trials": trials}}
    train, test = sample_rows("train", 20), sample_rows("test", 10)
    given, held_out = ((table.images, table.labels) for table in (train, test))
    return search(space, data=given, test=held_out, name="told", runs=runs, resume=resume)


def _history(result: RunResult, number: int) -> dict[int, dict[str, float]]:
    """The rows of history.csv, without the columns that say of which trial and epoch they are."""
    with result.folder.history.open() as file:
        rows = [row for row in csv.DictReader(file) if row["trial"] == str(number)]
    return {int(row["epoch"]): {name: float(value) for name, value in list(row.items())[2:]} for row in rows}


# The YAML


def test_the_section_survives_a_round_trip(tmp_path: Path) -> None:
    space = Space.load({"logging": {"mlflow": "http://localhost:5000", "wandb": "clothes"}})
    (tmp_path / "space.yaml").write_text(space.to_yaml())
    assert Space.load(tmp_path / "space.yaml").logging == LoggingConfig(mlflow="http://localhost:5000", wandb="clothes")
    assert Space.load({}).logging == LoggingConfig()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("logging: {mlfow: x}", "s.yaml:1: logging.mlfow: unknown key; did you mean `mlflow`?"),
        ("\nloging: {}", "s.yaml:2: loging: unknown key; did you mean `logging`?"),
        ("logging: wandb", "s.yaml:1: logging: 'wandb'; expected a mapping with keys mlflow, wandb"),
        ("logging:\n  wandb: true", "s.yaml:2: logging.wandb: True; expected a string"),
        ("logging: {mlflow: 'http://me:hidden@host'}", "s.yaml:1: logging: mlflow: a name or a password in the URI"),
    ],
)
def test_a_mistake_is_told_with_its_line(text: str, problem: str, tmp_path: Path) -> None:
    """And a password in it is not repeated."""
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(SpaceError) as caught:
        Space.load(tmp_path / "s.yaml")
    (line,) = caught.value.lines
    assert line.removeprefix(f"{tmp_path}/").startswith(problem)
    assert "hidden" not in line


# Before a run starts


@pytest.mark.parametrize(
    ("logging", "module", "problem"),
    [
        ({"mlflow": "x"}, "mlflow", "logging.mlflow: needs the package mlflow-skinny; pip install 'fmtune[mlflow]'"),
        ({"wandb": "x"}, "wandb", "logging.wandb: needs the package wandb; pip install 'fmtune[wandb]'"),
    ],
)
def test_a_missing_package_is_told_before_anything_starts(
    logging: dict[str, str], module: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError) as caught:
        _search(tmp_path, logging)
    assert caught.value.lines == (problem,)
    assert not list(tmp_path.iterdir())


def test_a_server_that_is_not_there_is_told_before_anything_starts(store: str, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(InputError) as caught:
        _search(tmp_path, {"mlflow": uri})
    (line,) = caught.value.lines
    assert line.startswith(f"logging.mlflow: {uri}: can't be reached (")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("login", "problem"),
    [
        (False, "logging.wandb: no login; run `wandb login`, or set WANDB_API_KEY or WANDB_MODE=offline"),
        (
            ConnectionError("no answer from x\n at y"),
            "logging.wandb: no answer from x; or set WANDB_MODE=offline, and `wandb sync` later",
        ),
    ],
)
def test_a_login_that_fails_is_told_before_anything_starts(
    login: bool | Exception, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", _Runs(login))
    with pytest.raises(InputError) as caught:
        _search(tmp_path, {"wandb": "clothes"})
    assert caught.value.lines == (problem,)
    assert not list(tmp_path.iterdir())


# MLflow


@pytest.mark.slow
def test_mlflow_has_a_run_for_each_trial_below_one_for_the_search(
    store: str, ray_cluster: None, tmp_path: Path
) -> None:
    """Parameters, every epoch's metrics and the test accuracy are those of the run folder; resuming adds to them."""
    mlflow = pytest.importorskip("mlflow")
    _search(tmp_path, {"mlflow": store}, trials=2)
    result = _search(tmp_path, {"mlflow": store}, trials=3, resume=True)
    client = mlflow.MlflowClient(store)
    experiment = client.get_experiment_by_name("fmtune").experiment_id
    listed = client.search_runs([experiment])
    runs = {run.info.run_name: run for run in listed}
    assert sorted(run.info.run_name for run in listed) == ["00000", "00001", "00002", "told"]
    parent = runs.pop("told")
    low, high = result.summary["test_interval"]
    assert parent.data.metrics["test_accuracy"] == result.summary["test_accuracy"]
    assert (parent.data.metrics["test_accuracy_low"], parent.data.metrics["test_accuracy_high"]) == (low, high)
    rates = result.trials.set_index("number")["params.optim.lr"]
    for number, run in enumerate(runs[f"{number:05d}"] for number in range(3)):
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.info.status == "FINISHED"
        assert run.data.tags["fmtune.state"] == "complete"
        assert float(run.data.params["optim.lr"]) == rates[number]
        assert run.data.params["epochs"] == "2"
        for metric in ("val_accuracy", "train_loss", "learning_rate"):
            logged = {entry.step: entry.value for entry in client.get_metric_history(run.info.run_id, metric)}
            assert logged == {epoch: row[metric] for epoch, row in _history(result, number).items()}


# Weights & Biases


def test_wandb_has_a_group_with_a_run_for_each_trial_and_the_summary(tracked: RunResult, wandb: _Runs) -> None:
    runs = {run.options["name"]: run for run in wandb.runs.values()}
    assert sorted(runs) == ["00000", "00001", "00002", "told"]
    assert {(run.options["project"], run.options["group"]) for run in runs.values()} == {("clothes", "told")}
    assert runs["told"].summary["test_accuracy"] == tracked.summary["test_accuracy"]
    assert runs["told"].summary["test_accuracy_low"] == tracked.summary["test_interval"][0]
    assert runs["00000"].options["config"] == flatten(Space.load(tracked.folder.space).baseline)
    rates = tracked.trials.set_index("number")["params.optim.lr"]
    for number in range(3):
        run = runs[f"{number:05d}"]
        assert run.options["config"]["optim.lr"] == rates[number]
        assert run.rows == _history(tracked, number)
        assert (run.summary, run.exit_code) == ({"state": "complete"}, 0)


def test_the_real_wandb_writes_runs_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each trial, below the folder that it is given and nowhere else, and without the key."""
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    wandb = pytest.importorskip("wandb", reason="needs the package wandb: pip install 'fmtune[wandb]'")
    key = f"{SECRET:x<40}"
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    # It is no interruption's haste that is tested.
    monkeypatch.setattr(fmtune.trackers, "_PATIENCE_OF_THE_INTERRUPTED", 120.0)
    notes: list[str] = []
    tracking = Tracking(connect_trackers(LoggingConfig(wandb="clothes")), notes.append)
    tracking.start_run(TrackedRun("told", "0a1b", tmp_path / "run"))
    for number in (0, 1):
        tracking.start_trial(number, TrialConfig())
    for epoch in (1, 2):
        for number in (0, 1):
            tracking.log_epoch(number, EpochMetrics(epoch, 1.0, 1.0, 0.5, 0.1, 10.0, 1.0))
    tracking.close()
    wandb.teardown()
    assert notes == []
    written = {path.name.rpartition("run-")[2] for path in (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")}
    assert written == {"0a1b-00000.wandb", "0a1b-00001.wandb"}
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and key.encode() in path.read_bytes()]


def test_no_credential_is_written(tracked: RunResult) -> None:
    files = [path for path in tracked.folder.path.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


# A tracker that fails


class _Failing:
    """Fails at the second epoch that it is told of."""

    name = "broken"

    def __init__(self) -> None:
        self.told: list[str] = []

    def start_run(self, run: TrackedRun) -> None:
        self.told.append("start_run")

    def start_trial(self, number: int, config: TrialConfig) -> None:
        self.told.append("start_trial")

    def log_epoch(self, number: int, metrics: EpochMetrics) -> None:
        self.told.append("log_epoch")
        if self.told.count("log_epoch") == 2:
            raise ConnectionError("the server hung up\nat length")

    def end_trial(self, number: int, state: str) -> None:
        self.told.append("end_trial")

    def end_run(self, summary: object) -> None:
        self.told.append("end_run")


def test_a_tracker_that_fails_is_noted_once_and_does_not_end_the_search(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    failing = _Failing()
    monkeypatch.setattr(sys.modules[search.__module__], "connect_trackers", lambda config: [failing])
    result = _search(tmp_path, {})
    assert result.summary["trials"] == {"complete": 3, "pruned": 0, "failed": 0}
    notes = [line for line in capfd.readouterr().out.splitlines() if "broken: " in line]
    assert [note.partition("] ")[2] for note in notes] == ["broken: the server hung up; nothing more is logged there"]
    assert "end_run" not in failing.told


def test_a_run_that_is_cut_short_is_ended(tmp_path: Path) -> None:
    """What it was told before arrives, in its order."""
    failing, notes = _Failing(), list[str]()
    tracking = Tracking([failing], notes.append)
    tracking.start_run(TrackedRun("x", "0", tmp_path))
    tracking.start_trial(0, TrialConfig())
    tracking.log_epoch(0, EpochMetrics(1, 1.0, 1.0, 0.5, 0.1, 10.0, 1.0))
    tracking.close()
    assert failing.told == ["start_run", "start_trial", "log_epoch", "end_run"]
    assert notes == []


def test_a_trial_may_begin_twice_or_end_without_a_beginning(wandb: _Runs, tmp_path: Path) -> None:
    """As trials do whose node dies: of one the tracker has one run, of the other none, and it goes on."""
    notes: list[str] = []
    tracking = Tracking(connect_trackers(LoggingConfig(wandb="project")), notes.append)
    tracking.start_run(TrackedRun("x", "twice", tmp_path))
    for _ in range(2):
        tracking.start_trial(0, TrialConfig())
    tracking.end_trial(1, "failed")
    tracking.end_trial(0, "complete")
    tracking.close()
    assert notes == []
    assert [run.exit_code for name, run in wandb.runs.items() if name.startswith("twice-")] == [0]


def test_a_server_that_gives_no_answer_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of a run that was cut short waits for it a moment; that it is a daemon, the process does not."""
    answer, notes = Event(), list[str]()
    hanging = _Failing()
    monkeypatch.setattr(hanging, "start_run", lambda run: answer.wait(60))
    monkeypatch.setattr(fmtune.trackers, "_PATIENCE_OF_THE_INTERRUPTED", 0.1)
    tracking = Tracking([hanging], notes.append)
    tracking.start_run(TrackedRun("x", "0", tmp_path))
    tracking.close()
    answer.set()
    assert notes == ["broken: no answer in 0 s; nothing more is logged there"]


# TensorBoard


def _read_hparams(folder: Path) -> tuple[dict[str, Any], list[str], dict[str, list[float]]]:
    """Hyperparameters, metrics and scalars of a folder's event files, by TensorFlow's record format."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

    values: dict[str, Any] = {}
    metrics: list[str] = []
    scalars: dict[str, list[float]] = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        content, at = path.read_bytes(), 0
        while at < len(content):
            # The length, its checksum, the event, its checksum.
            (length,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + length])
            at += 12 + length + 4
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "hparams":
                    data = HParamsPluginData.FromString(value.metadata.plugin_data.content)
                    started = data.session_start_info.hparams
                    values |= {key: getattr(one, one.WhichOneof("kind")) for key, one in started.items()}
                    metrics += [info.name.tag for info in data.experiment.metric_infos]
                else:
                    scalars.setdefault(value.tag, []).append(value.simple_value)
    return values, metrics, scalars


def test_tensorboard_compares_the_searched_values_by_val_accuracy(tracked: RunResult) -> None:
    """Those of trials.csv and no others; the metric is a scalar of the same file, so that the tab finds its value."""
    trials = tracked.trials.set_index("number")
    for number in range(3):
        values, metrics, scalars = _read_hparams(tracked.folder.ray / "search" / f"{number:05d}")
        assert values == {
            "optim.name": trials.loc[number, "params.optim.name"],
            "optim.lr": trials.loc[number, "params.optim.lr"],
        }
        assert metrics == ["ray/tune/val_accuracy", "ray/tune/val_loss"]
        for name in ("train_loss", "val_loss", "val_accuracy", "learning_rate"):
            history = [row[name] for row in _history(tracked, number).values()]
            assert scalars[f"ray/tune/{name}"] == pytest.approx(history)
