"""The run folder: what a run writes, and how it is read again."""

from __future__ import annotations

import csv
import fcntl
import importlib.metadata
import io
import os
import platform
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch

from fmtune.checkpoint import read_json, write_json
from fmtune.config import Scalar, TrialConfig
from fmtune.errors import RunFolderError
from fmtune.files import write_whole
from fmtune.training import EpochMetrics

State = Literal["running", "complete", "pruned", "failed"]
HISTORY_COLUMNS = ("trial", *(column.name for column in fields(EpochMetrics)))
_TRIAL_COLUMNS = ("number", "state", "epoch", "val_accuracy", "val_loss", "seconds")
_PACKAGES = ("fmtune", "torch", "torchvision", "ray", "optuna", "pyarrow", "numpy")


@dataclass
class TrialRecord:
    """One trial of the search, as it stands.

    Attributes:
        number: its place in the order of the study; 0 is the baseline, in a search.
        config: what it trains.
        params: the searched values among that, by dotted key.
        state: pruned ones were stopped before their last epoch.
        history: metrics of each epoch so far.
        checkpoint: path or URL of the last epoch's training state.
        cause: why it failed.
        earlier: where its configuration changed along the training, those before `config`, each with the last epoch
            that it held for.
    """

    number: int
    config: TrialConfig
    params: dict[str, Scalar]
    state: State = "running"
    history: list[EpochMetrics] = field(default_factory=list)
    checkpoint: str | None = None
    cause: str | None = None
    earlier: list[tuple[int, TrialConfig]] = field(default_factory=list)

    @property
    def last(self) -> EpochMetrics | None:
        return self.history[-1] if self.history else None

    @property
    def seconds(self) -> float:
        """Seconds of training and evaluation so far."""
        return self.last.seconds if self.last else 0.0


class RunFolder:
    """Paths and writers of `runs/NAME`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.space = path / "space.yaml"
        self.trials = path / "trials.csv"
        self.history = path / "history.csv"
        self.study = path / "study.db"
        self.best = path / "best"
        self.summary = path / "summary.json"
        self.environment = path / "environment.json"
        self.report = path / "report.html"
        self.markdown = path / "report.md"
        self.plots = path / "plots"
        self.card = self.best / "README.md"
        self.ray = path / "ray"
        self.log = path / "log.txt"
        self.clock = path / "clock.json"
        self.choice = path / "choice.json"

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Make the folder if there is none, and keep other processes from holding it.

        Raises:
            RunFolderError: one holds it, or it can't be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(f"{self.path}: can't be made ({error.strerror}); choose another --runs") from None
        # Given up with the process, whatever it dies of.
        handle = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunFolderError(f"{self.path}: another process is at this run; wait for it, or stop it") from None
            except OSError:
                pass  # some network file systems lock nothing
            yield
        finally:
            os.close(handle)

    @classmethod
    def create(cls, path: Path, space_yaml: str, fingerprint: str) -> RunFolder:
        """Make the folder and write what is known before the first trial; a run that is resumed keeps its own.

        Args:
            path: of the folder.
            space_yaml: the resolved space.
            fingerprint: of the training data.
        """
        folder = cls(path)
        folder.ray.mkdir(parents=True, exist_ok=True)
        write_whole(folder.space, space_yaml)
        if folder.history.exists():
            folder._cut_history()
            return folder
        write_json(folder.environment, {"run": uuid.uuid4().hex, "data": fingerprint} | describe_environment())
        with folder.history.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(HISTORY_COLUMNS)
        return folder

    @property
    def fingerprint(self) -> str | None:
        """Of the data that the run has trained on; None of one that has not begun, or of an older version."""
        return read_json(self.environment).get("data") if self.environment.exists() else None

    def _cut_history(self) -> None:
        """Leave out a last row that an interruption has cut short: the next would go on with its line."""
        content = self.history.read_bytes()
        with self.history.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run folder.

        Raises:
            RunFolderError: there is none at `path`.
        """
        folder = cls(path)
        if not folder.space.exists():
            raise RunFolderError(f"{path}: no run folder there; see `fmtune list`")
        return folder

    @property
    def run_id(self) -> str:
        """What tells this run from all others, 32 hexadecimal digits."""
        return str(read_json(self.environment)["run"])

    def append_history(self, number: int, metrics: EpochMetrics) -> None:
        """Add an epoch of a trial to history.csv."""
        with self.history.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow([number, *metrics.as_dict().values()])

    def read_history(self) -> dict[int, list[EpochMetrics]]:
        """The epochs of each trial; an epoch done twice, after an interruption, counts as done last."""
        history: dict[int, dict[int, EpochMetrics]] = {}
        if self.history.exists():
            with self.history.open(newline="", encoding="utf-8") as file:
                # What an interruption has cut short has no end of the line yet.
                whole = (line for line in file if line.endswith("\n"))
                for row in csv.DictReader(whole):
                    metrics = EpochMetrics(int(row["epoch"]), *(float(row[column]) for column in HISTORY_COLUMNS[2:]))
                    history.setdefault(int(row["trial"]), {})[metrics.epoch] = metrics
        return {trial: [epochs[e] for e in sorted(epochs)] for trial, epochs in history.items()}

    def write_trials(
        self,
        records: Iterable[TrialRecord],
        columns: Sequence[str],
        further: Mapping[int, Mapping[str, object]] | None = None,
    ) -> None:
        """Write trials.csv.

        Args:
            records: a row each.
            columns: the searched keys.
            further: columns to come before those, by the number of the trial, which all have the same.
        """
        further = further or {}
        names = list(next(iter(further.values()), ()))
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow([*_TRIAL_COLUMNS, *names, *(f"params.{key}" for key in columns)])
        for record in sorted(records, key=lambda record: record.number):
            last = record.last
            measured = [last.epoch, last.val_accuracy, last.val_loss] if last else [0, None, None]
            own = [further[record.number][name] for name in names]
            # An empty field is a parameter that the trial had not.
            drawn = (record.params.get(key, "") for key in columns)
            values = ["null" if value is None else value for value in drawn]
            writer.writerow([record.number, record.state, *measured, f"{record.seconds:.3f}", *own, *values])
        write_whole(self.trials, text.getvalue())

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        write_json(self.summary, summary)

    def read_summary(self) -> dict[str, Any]:
        """summary.json of a finished run.

        Raises:
            RunFolderError: the run has not finished.
        """
        if not self.summary.exists():
            raise RunFolderError(f"{self.path}: the run has not finished; go on with --resume")
        summary: dict[str, Any] = read_json(self.summary)
        return summary


def find_run(run: str | os.PathLike[str], runs: Path) -> RunFolder:
    """A run by its folder, or by its name under `runs`.

    Raises:
        RunFolderError: there is no such run.
    """
    for path in (Path(run), Path(runs, run)):
        if (path / "space.yaml").exists():
            return RunFolder.open(path)
    raise RunFolderError(f"{os.fspath(run)}: no such run, neither as a folder nor under {runs}/; see `fmtune list`")


def list_runs(runs: Path) -> list[RunFolder]:
    """The run folders under `runs`, by name."""
    return [RunFolder(path.parent) for path in sorted(runs.glob("*/space.yaml"))]


def describe_environment() -> dict[str, Any]:
    """Versions, device, git commit and command, for whoever wants to repeat the run."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "git_commit": _git_commit(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def _git_commit() -> str | None:
    """Commit of the folder that the command runs in, None outside a repository or without git."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return found.stdout.strip() if found.returncode == 0 else None
