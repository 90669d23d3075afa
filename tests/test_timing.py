"""What the time that is left allows: margins are minutes, so that no machine is too slow for them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fmtune.board import Board
from fmtune.config import TrialConfig
from fmtune.run import RunFolder, State, TrialRecord
from fmtune.space import Space
from fmtune.timing import Timing
from fmtune.training import EpochMetrics

EPOCHS = 5


def create_timing(
    folder: Path, left: float, search: Mapping[str, Any], *records: TrialRecord, refit_threads: float = 1.0
) -> Timing:
    """The timing of a run with `left` seconds to go."""
    now = time.monotonic()
    board = Board("", 99, "val_accuracy", True, started=now, deadline=now + left)
    board.records = {record.number: record for record in records}
    space = Space.load({"search": {"time": "1h", **search}, "trial": {"epochs": EPOCHS}})
    return Timing(space, RunFolder(folder), board, 1.0, lambda: 2, refit_threads)


def create_record(number: int, epochs: int, state: State, accuracy: float = 0.9) -> TrialRecord:
    """A trial whose epochs have taken a minute each."""
    record = TrialRecord(number, TrialConfig(epochs=EPOCHS), {}, state, checkpoint="somewhere")
    for epoch in range(1, epochs + 1):
        record.history.append(EpochMetrics(epoch, 0.5, 0.5, accuracy, 0.01, 1000.0, 60.0 * epoch))
    return record


WHOLE, PART = create_record(1, EPOCHS, "complete"), create_record(2, 2, "running", accuracy=0.8)
SHORT_BASELINE = TrialRecord(0, TrialConfig(epochs=2), {}, "complete", create_record(0, 2, "complete").history)
FRESH = create_record(3, 0, "running")
ALONE = {"refit": False, "finalists": 0}


@pytest.mark.parametrize(
    ("left", "records", "can"),
    [
        (30, [], True),
        (120, [PART], True),  # an epoch more is something to choose
        (50, [PART], False),
        (250, [WHOLE, PART], False),  # what can't come to its end can't be chosen any more
        (400, [WHOLE, PART], True),
        (250, [SHORT_BASELINE, PART], False),  # others take longer than it did
        (30, [SHORT_BASELINE], True),
    ],
)
def test_a_trial_is_begun_only_if_it_can_come_to_something(
    tmp_path: Path, left: float, records: list[TrialRecord], can: bool
) -> None:
    assert create_timing(tmp_path, left, ALONE, *records).can_begin() == can


@pytest.mark.parametrize(
    ("left", "records", "can"),
    [(120, [PART], True), (50, [PART], False), (120, [WHOLE, PART], False), (250, [WHOLE, PART], True)],
)
def test_a_trial_goes_on_only_while_it_can_come_to_something(
    tmp_path: Path, left: float, records: list[TrialRecord], can: bool
) -> None:
    timing = create_timing(tmp_path, left, ALONE, *records)
    assert timing.can_go_on(EPOCHS, epoch=2, seconds=120.0) == can


@pytest.mark.parametrize(
    ("records", "more", "can"),
    [
        ([], 9, True),  # nothing to reckon with
        ([PART], 1, True),  # three minutes and five, of 776 s in both slots together
        ([PART, PART, PART], 0, True),
        ([PART, PART, PART], 1, False),
        ([PART, FRESH, FRESH], 0, False),  # what has no epoch yet takes as long as the others
        ([PART, SHORT_BASELINE], 1, True),
        ([PART, SHORT_BASELINE], 2, False),  # the baseline's short epochs tell nothing of the others
    ],
)
def test_a_population_is_as_large_as_the_time_carries(
    tmp_path: Path, records: list[TrialRecord], more: int, can: bool
) -> None:
    timing = create_timing(tmp_path, 400, ALONE, *records)
    assert timing.can_carry(records, more) == can
    slow = create_record(9, 1, "running")
    assert timing.those_that_can_end([FRESH, slow]) == ([FRESH] if WHOLE in records else [FRESH, slow])


@pytest.mark.parametrize(("left", "can"), [(1100, True), (800, False)])
def test_time_for_finalists_and_refit_is_set_aside(tmp_path: Path, left: float, can: bool) -> None:
    """A round of both leaders side by side, and the refit, take five minutes each; three epochs more take three."""
    others = [create_record(number, EPOCHS, "complete") for number in (3, 4)]
    timing = create_timing(tmp_path, left, {"finalists": 2}, PART, *others)
    assert timing.can_go_on(EPOCHS, epoch=2, seconds=120.0) == can
    assert timing.has_round(others, is_first=True)


@pytest.mark.parametrize(("threads", "seconds"), [(1, 308), (2, 233), (16, 167.375)])
def test_a_refit_is_reckoned_by_the_threads_that_it_has(tmp_path: Path, threads: int, seconds: float) -> None:
    """Half of five minutes is shared out among them, and eight seconds go to the start."""
    timing = create_timing(tmp_path, 1000, {}, WHOLE, refit_threads=threads)
    assert timing.refit_seconds([WHOLE]) == pytest.approx(seconds)


@pytest.mark.parametrize(("time", "worth"), [("1h", True), ("40m", False)])
def test_a_round_of_finalists_that_takes_more_than_a_tenth_of_the_time_is_left_out(
    tmp_path: Path, time: str, worth: bool
) -> None:
    """Then no time is set aside for it either: a round of both side by side takes five minutes, the refit as many."""
    others = [create_record(number, EPOCHS, "complete") for number in (3, 4)]
    timing = create_timing(tmp_path, 700, {"finalists": 2, "time": time}, PART, *others)
    assert timing.rounds_are_worth_it(others) == worth
    assert timing.can_go_on(EPOCHS, epoch=2, seconds=120.0) == (not worth)


def test_without_a_limit_there_is_time_for_everything(tmp_path: Path) -> None:
    board = Board("", 99, "val_accuracy", True, started=time.monotonic(), deadline=None)
    board.records = {1: WHOLE}
    timing = Timing(Space.load({"trial": {"epochs": EPOCHS}}), RunFolder(tmp_path), board, 1.0, lambda: 1)
    assert timing.can_begin() and timing.can_go_on(EPOCHS, 2, 120.0) and timing.has_round([WHOLE], is_first=True)
