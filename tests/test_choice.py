from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fmtune.board import Board
from fmtune.choice import Chooser, _Rounds, stands_out
from fmtune.config import ResourcesConfig, TrialConfig
from fmtune.run import RunFolder, TrialRecord
from fmtune.space import Space
from fmtune.timing import Timing
from fmtune.training import EpochMetrics
from fmtune.trial import Task, create_task


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        # Means 0.90 and 0.88; the standard error is sqrt((0.0002 + 0.0002) / 2) = 0.0141.
        ([[0.89, 0.91], [0.87, 0.89]], True),
        # Means 0.90 and 0.89, by the same standard error.
        ([[0.89, 0.91], [0.88, 0.90]], False),
        # The third is not looked at, and the order does not matter.
        ([[0.5, 0.9], [0.87, 0.89], [0.89, 0.91]], True),
        # Means 0.90 and 0.8875; the standard error over four seeds is sqrt((0.000133 + 0.0000917) / 4) = 0.0075.
        ([[0.89, 0.91, 0.89, 0.91], [0.88, 0.90, 0.88, 0.89]], True),
        # One seed shows no spread.
        ([[0.9], [0.1]], False),
        ([[0.9, 0.9]], False),
    ],
)
def test_a_candidate_stands_out_by_the_standard_error_of_the_difference(
    values: list[list[float]], expected: bool
) -> None:
    assert stands_out(values) == expected


@pytest.mark.parametrize(("out", "winner"), [(set(), 1), ({1}, 2), ({1, 2}, 3), ({1, 2, 3}, 1)])
def test_a_finalist_that_failed_is_not_taken(monkeypatch: pytest.MonkeyPatch, out: set[int], winner: int) -> None:
    """Where time cut the round short too, so that there are no means to go by."""
    board = Board("", 9, "val_accuracy", True, started=0.0, deadline=None)
    for number in (1, 2, 3):
        history = [EpochMetrics(1, 0.5, 0.5, 1 - number / 10, 0.01, 1000.0, 1.0)]
        board.records[number] = TrialRecord(number, TrialConfig(epochs=1), {}, "complete", history, "somewhere")
    context: Any = SimpleNamespace(board=board, objectives=None)
    timing: Any = None
    rounds = SimpleNamespace(results=dict, failures=lambda record: ["it diverged"] if record.number in out else [])
    monkeypatch.setattr(Chooser, "_retrain_finalists", lambda self, ranked: rounds)
    monkeypatch.setattr(Chooser, "_refit", lambda self, winner: None)
    assert Chooser(context, timing, ResourcesConfig())._choose_anew().winner == winner


def test_finalists_that_all_fail_end_the_rounds(tmp_path: Path) -> None:
    """With a time to keep too: there is no training left to reckon with."""
    now = time.monotonic()
    board = Board("", 9, "val_accuracy", True, started=now, deadline=now + 3600)
    history = [EpochMetrics(1, 0.5, 0.5, 0.9, 0.01, 1000.0, 1.0)]
    leaders = [TrialRecord(number, TrialConfig(epochs=1), {}, "complete", history) for number in (1, 2)]
    timing = Timing(Space.load({"search": {"time": "1h"}}), RunFolder(tmp_path), board, 1.0, lambda: 2)

    def fresh(record: TrialRecord, round_: int, name: str) -> Task:
        return replace(create_task(0, record.number, record.config), name=name)

    rounds = _Rounds(leaders, fresh, timing, board)
    for task in rounds.next_round():
        rounds.outcomes[task.name][1].cause = "it diverged"
    assert len(rounds.outcomes) == 2
    assert rounds.next_round() == []
    assert rounds.results() == {}
