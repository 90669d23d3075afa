"""A search whose driver is killed at random moments, and gone on with each time.

    FMTUNE_KILLS=20 pytest -m slow tests/test_kill.py

kills as often as that, in as many searches as it takes.
"""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import optuna
import pytest

from fmtune.run import RunFolder

KILLS = int(os.environ.get("FMTUNE_KILLS", "3"))
TRIALS, EPOCHS = 8, 3
SPACE = {
    "data": {"train": "sample", "validation": 0.9},
    "search": {"trials": TRIALS, "finalists": 0, "refit": False},
    "baseline": {"epochs": EPOCHS, "model": {"width": 4}},
    "trial": {"epochs": EPOCHS, "model": {"width": 4}, "optim": {"lr": {"log": [1e-3, 1e-1]}}},
}


def _start(space: Path, runs: Path) -> subprocess.Popen[str]:
    resume = ["--resume"] if (runs / space.stem).exists() else []
    command = [sys.executable, "-m", "fmtune.cli", "search", str(space), "--runs", str(runs), *resume]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _read_rows(folder: RunFolder) -> list[tuple[int, int]]:
    """(trial, epoch) of each whole row of history.csv, those written twice too."""
    if not folder.history.exists():
        return []
    with folder.history.open(newline="", encoding="utf-8") as file:
        return [(int(row["trial"]), int(row["epoch"])) for row in csv.DictReader(file) if all(row.values())]


def _wait_for_rows(folder: RunFolder, process: subprocess.Popen[str]) -> None:
    """Wait until an epoch has been told, or the search is over."""
    before = len(_read_rows(folder))
    while len(_read_rows(folder)) == before and process.poll() is None:
        time.sleep(0.05)


def _search_with_kills(space: Path, runs: Path, kills: int, draws: random.Random) -> int:
    """Run a search to its end, killed up to so many times; returns how often it was."""
    folder, killed = RunFolder(runs / space.stem), 0
    while True:
        before = Counter(_read_rows(folder))
        process = _start(space, runs)
        try:
            if killed < kills and draws.random() < 0.8:
                _wait_for_rows(folder, process)
            # From before the start of Ray, or from the first epoch of this attempt, to after the last trial.
            process.wait(timeout=draws.uniform(0, 6) if killed < kills else 300)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            killed += 1
        output, _ = process.communicate()
        finished = [trial for trial, epoch in before if epoch == EPOCHS]
        after = Counter(_read_rows(folder))
        # A trial that was finished is not trained again.
        assert all(after[trial, epoch] == before[trial, epoch] for trial in finished for epoch in range(1, EPOCHS + 1))
        if process.returncode != -signal.SIGKILL:
            assert process.returncode == 0, output
            return killed


def _check(folder: RunFolder, killed: int) -> None:
    """Nothing lost, nothing twice."""
    study = optuna.load_study(study_name="fmtune", storage=f"sqlite:///{folder.study}")
    states = Counter(trial.state.name for trial in study.trials)
    assert len(study.trials) == TRIALS
    assert set(states) <= {"COMPLETE", "PRUNED"}
    summary = json.loads(folder.summary.read_text(encoding="utf-8"))
    assert summary["trials"] == {"complete": states["COMPLETE"], "pruned": states["PRUNED"], "failed": 0}
    rows = Counter(_read_rows(folder))
    histories = folder.read_history()
    assert sorted(histories) == list(range(TRIALS))
    for number, epochs in histories.items():
        assert [metrics.epoch for metrics in epochs] == list(range(1, len(epochs) + 1))
        if study.trials[number].state.name == "COMPLETE":
            assert len(epochs) == EPOCHS
    # At most one epoch is trained again for each trial that was in flight at a kill.
    assert sum(rows.values()) - len(rows) <= killed * (os.cpu_count() or 1)


@pytest.mark.slow
def test_a_killed_search_loses_nothing_and_does_nothing_twice(tmp_path: Path) -> None:
    draws = random.Random(0)
    killed, searches = 0, 0
    while killed < KILLS:
        space = tmp_path / f"search{searches}.json"
        space.write_text(json.dumps(SPACE), encoding="utf-8")
        times = _search_with_kills(space, tmp_path, min(3, KILLS - killed), draws)
        _check(RunFolder(tmp_path / space.stem), times)
        killed, searches = killed + times, searches + 1
