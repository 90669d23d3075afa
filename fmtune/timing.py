"""The budget of wall-clock time: what is left, and what must be set aside for the end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from fmtune.board import Board
from fmtune.checkpoint import read_json, write_json
from fmtune.run import RunFolder, TrialRecord
from fmtune.space import Space

_ENDING_SHARE = 0.5
"""Part of the time that finalists and refit may be set aside at most."""
_ROUND_SHARE = 0.1
"""Part of the time that a round of finalists may take at most: a search finds more by going on than by a longer one
(`benchmarks/README.md`)."""
_PHASE_SECONDS = 8.0
"""Seconds that a phase takes beside training: processes start and import torch."""
_SERIAL_SHARE = 0.5
"""Part of a step that more threads don't make faster. Refits on two have taken 0.63 to 0.71 of a trial's time on one,
which is a part of 0.42 at most; smaller networks gain less, and a refit that does not end in time is lost."""
_CLOSING_SECONDS = 12.0
"""Seconds set aside for the test split, the report and the end of Ray."""
_CLOCK_SECONDS = 1.0
"""Seconds between notes of the time used."""


class Timing:
    """Plans a run within its time.

    Args:
        space: of the run.
        folder: keeps the time that earlier attempts have used.
        board: whose deadline and records are looked at.
        rows_ratio: rows of the refit over rows of a trial.
        slots: asks how many trials run side by side.
        refit_threads: threads of the refit to each of a trial's.
    """

    def __init__(
        self,
        space: Space,
        folder: RunFolder,
        board: Board,
        rows_ratio: float,
        slots: Callable[[], int],
        refit_threads: float = 1.0,
    ) -> None:
        self._search, self._limit, self._folder, self._board = space.search, space.time_limit, folder, board
        # Amdahl (1967).
        self._refit_ratio = rows_ratio * (_SERIAL_SHARE + (1 - _SERIAL_SHARE) / refit_threads)
        self._slots = slots
        self._saved = 0.0
        self._reserve = 0.0
        self._next_reckoning = 0.0

    def search_is_over(self) -> bool:
        """Whether the time left is needed for finalists, refit and closing."""
        return self._search_seconds() <= 0

    def can_begin(self) -> bool:
        """Whether the time left carries the cheapest trial of the space so far, begun anew, to its end.

        Before one has come to its end any trial is better than none, and its first epoch is enough.
        """
        if self._limit is None:
            return True
        is_enough = full_seconds if self._has_whole() else (lambda record: record.history[0].seconds)
        return self._search_seconds() > min(map(is_enough, self._drawn()), default=0.0)

    def can_carry(self, unfinished: Sequence[TrialRecord], more: int = 0) -> bool:
        """Whether the time left carries these trials, and so many fresh ones, side by side to their ends.

        One without an epoch yet is reckoned as the others of the space are on average; before any has one there is
        nothing to reckon with, and time for all.
        """
        if self._limit is None:
            return True
        drawn = [full_seconds(record) for record in self._drawn()]
        if not drawn:
            return True
        fresh = more + sum(not record.history for record in unfinished)
        further = sum(full_seconds(record) - record.seconds for record in unfinished if record.history)
        return further + fresh * fmean(drawn) <= self._slots() * self._search_seconds()

    def those_that_can_end(self, unfinished: Sequence[TrialRecord]) -> list[TrialRecord]:
        """The trials that may go on by `can_go_on`, and those without an epoch yet."""
        if self._limit is None:
            return list(unfinished)
        has_whole, left = self._has_whole(), self._search_seconds()
        return [
            record
            for record in unfinished
            if not record.history
            or _seconds_needed(record.config.epochs, len(record.history), record.seconds, has_whole) <= left
        ]

    def can_go_on(self, epochs: int, epoch: int, seconds: float) -> bool:
        """Whether the time left carries a trial of so many epochs, `seconds` long up to `epoch`, to its end.

        What is cut short can't be chosen where others have come to their end. Before one has, the next epoch is enough.
        """
        return _seconds_needed(epochs, epoch, seconds, self._has_whole()) <= self._search_seconds()

    def _drawn(self) -> list[TrialRecord]:
        """Trials of the space that have an epoch."""
        records = list(self._board.records.values())
        # The baseline has epochs of its own, so that what it takes tells nothing of the others.
        return [record for record in records if record.history and record is not self._board.baseline]

    def _has_whole(self) -> bool:
        """Whether a trial has come to its end."""
        return any(record.state == "complete" for record in list(self._board.records.values()))

    def _search_seconds(self) -> float:
        """Seconds left for the search itself.

        Tune asks at every turn whether the search is over: a twentieth of the time goes into reckoning at most.
        """
        if self._board.left is None or self._limit is None:
            return math.inf
        started = time.monotonic()
        if started >= self._next_reckoning:
            self._reserve = self._reckon_reserve(self._limit)
            self._next_reckoning = started + 20 * (time.monotonic() - started)
        return self._board.left - self._reserve

    def _reckon_reserve(self, limit: float) -> float:
        """Seconds to set aside of the `limit` for finalists, refit and closing, by the trials that lead now.

        Those of them that get to their end will be the finalists.
        """
        leaders = self._find_leaders()
        if not leaders:
            # Without a trial to choose there is nothing to set time aside for.
            return 0.0
        refit, finalists = self.refit_seconds(leaders), self._finalists_seconds(leaders)
        # What would take too much of the time is left out: the search itself finds more. Trials take a while to end.
        reserves = (refit + finalists + _PHASE_SECONDS if finalists else refit, refit, 0.0)
        return _CLOSING_SECONDS + next(seconds for seconds in reserves if seconds <= _ENDING_SHARE * limit)

    def is_late(self, reserve: float = 0.0) -> bool:
        """Whether only `reserve` seconds and the closing are left."""
        return self._board.left is not None and self._board.left < reserve + _CLOSING_SECONDS

    def rounds_are_worth_it(self, leaders: Sequence[TrialRecord]) -> bool:
        """Whether training the leaders once more is a small enough part of the whole time."""
        return self._limit is None or self._round_seconds(leaders) <= _ROUND_SHARE * self._limit

    def has_round(self, leaders: Sequence[TrialRecord], is_first: bool) -> bool:
        """Whether there is time to train each of the leaders once more before the refit."""
        if self._board.left is None:
            return True
        reserve = self.refit_seconds(leaders) + (_PHASE_SECONDS if is_first else 0.0)
        return self._board.left - _CLOSING_SECONDS - reserve > self._round_seconds(leaders)

    def refit_seconds(self, leaders: Sequence[TrialRecord]) -> float:
        """Seconds that a refit of the slowest of these takes; 0 without a refit."""
        if not self._search.refit or not leaders:
            return 0.0
        return _PHASE_SECONDS + self._refit_ratio * max(map(full_seconds, leaders))

    def save_clock(self) -> None:
        """Note the time used, once a second at most, so that a resumed run counts it."""
        if time.monotonic() - self._saved > _CLOCK_SECONDS:
            write_clock(self._folder, self._board.elapsed)
            self._saved = time.monotonic()

    def _find_leaders(self) -> list[TrialRecord]:
        records = list(self._board.records.values())
        # A result without its checkpoint can't be chosen yet.
        measured = [r for r in records if r.state != "failed" and r.checkpoint and self._board.value(r) is not None]
        measured.sort(key=lambda r: self._board.value(r) or 0.0, reverse=self._board.larger)
        return measured[: max(1, self._search.retrained)]

    def _finalists_seconds(self, leaders: Sequence[TrialRecord]) -> float:
        if len(leaders) < 2 or not self.rounds_are_worth_it(leaders):
            return 0.0
        return _PHASE_SECONDS + self._round_seconds(leaders)

    def _round_seconds(self, leaders: Sequence[TrialRecord]) -> float:
        """Seconds that one more training of each takes, side by side."""
        return math.ceil(len(leaders) / self._slots()) * max(map(full_seconds, leaders))


def _seconds_needed(epochs: int, epoch: int, seconds: float, has_whole: bool) -> float:
    """Seconds that a trial, `seconds` long up to `epoch`, still takes to come to something: where others have come to
    their ends its own, else an epoch more."""
    further = epochs - epoch if has_whole else min(1, epochs - epoch)
    return further * seconds / epoch


def full_seconds(record: TrialRecord) -> float:
    """Seconds of the trial to its last epoch, by the rate of those that it has done."""
    return record.seconds / max(1, len(record.history)) * record.config.epochs


def read_clock(folder: RunFolder) -> float:
    """Seconds that earlier attempts at the run have used."""
    return float(read_json(folder.clock)["seconds"]) if folder.clock.exists() else 0.0


def is_finished(folder: RunFolder, space: Space) -> bool:
    """Whether a run has done all that it is asked for: its last attempt came to its end, and was asked for the same."""
    return folder.clock.exists() and read_json(folder.clock).get("finished") == _describe_asked(space)


def write_clock(folder: RunFolder, seconds: float, finished: Space | None = None) -> None:
    """Note the time used, and with a run that has come to its end what it was asked for."""
    asked = {} if finished is None else {"finished": _describe_asked(finished)}
    write_json(folder.clock, {"seconds": round(seconds, 3), **asked})


def _describe_asked(space: Space) -> dict[str, Any]:
    return {"search": space.search.model_dump(mode="json"), "seconds": space.time_limit}
