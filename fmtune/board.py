"""The state of a run under way, for views to draw and for plans to be made by."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate

from fmtune.run import TrialRecord
from fmtune.training import EpochMetrics


@dataclass
class Flight:
    """A training under way: a trial of the search, a finalist's, or the refit.

    Attributes:
        name: what it is called on the screen.
        epochs: how many it is to train.
        last: what its last epoch reported, None before the first.
    """

    name: str
    epochs: int
    last: EpochMetrics | None = None

    @property
    def is_done(self) -> bool:
        """Whether the last epoch has been reported; the training's process has yet to say that it ends."""
        return self.last is not None and self.last.epoch == self.epochs


@dataclass(frozen=True)
class Capacity:
    """What the cluster has of the resource that bounds how many trainings run side by side.

    Attributes:
        unit: `GPUs` where trainings use any, else `CPUs`.
        total: how many there are.
        each: how many one training takes, all its workers together.
    """

    unit: str
    total: float
    each: float


@dataclass
class Board:
    """The state of a run.

    Attributes:
        title: what runs, on what data, into which folder.
        trials: how many the search may start.
        metric: what decides, and whether `larger` is better.
        started: `time.monotonic()` of the command's start, less the time of earlier attempts.
        deadline: `time.monotonic()` by which it must end, None without a limit.
        phase: what is being done, in a word or two.
        records: the trials of the search, by number.
        ended: numbers of those that have ended, in the order in which they did.
        in_flight: the trainings under way, by the names of their tasks.
        capacity: what they share out among them; None before the first.
        has_baseline: whether trial 0 is one; in a single training it is not.
        broken_off: the cause of failures in a row that ended the search early.
    """

    title: str
    trials: int
    metric: str
    larger: bool
    started: float
    deadline: float | None
    phase: str = "starting"
    records: dict[int, TrialRecord] = field(default_factory=dict)
    ended: list[int] = field(default_factory=list)
    in_flight: dict[str, Flight] = field(default_factory=dict)
    capacity: Capacity | None = None
    has_baseline: bool = True
    broken_off: str | None = None
    _of_ended: tuple[int, TrialRecord | None] = field(default=(0, None), init=False)
    """How many that have ended were looked at, and the leader of them: they don't change any more."""

    def value(self, record: TrialRecord) -> float | None:
        """The deciding metric after the trial's last epoch."""
        last = record.last
        return None if last is None else getattr(last, self.metric)

    @property
    def best(self) -> TrialRecord | None:
        """The leader so far."""
        looked_at, leader = self._of_ended
        if looked_at < len(self.ended):
            fresh = [self.records[number] for number in self.ended[looked_at:]]
            looked_at, leader = looked_at + len(fresh), self._first_of([leader, *fresh])
            self._of_ended = looked_at, leader
        return self._first_of([leader, *(r for r in list(self.records.values()) if r.state == "running")])

    @property
    def baseline(self) -> TrialRecord | None:
        """What the others are compared with, once it has begun."""
        return self.records.get(0) if self.has_baseline else None

    def _first_of(self, records: Iterable[TrialRecord | None]) -> TrialRecord | None:
        sign = 1 if self.larger else -1
        measured = [
            (sign * value, -r.number, r)
            for r in records
            if r is not None and r.state != "failed" and (value := self.value(r)) is not None
        ]
        return max(measured)[2] if measured else None

    @property
    def curve(self) -> list[float]:
        """The best value after each trial that ended with one, in the order of their ends; a single training's value
        after each epoch.
        """
        if not self.has_baseline:
            epochs = [metrics.as_dict()[self.metric] for r in list(self.records.values()) for metrics in r.history]
            return [value for value in epochs if value is not None]
        ended = [self.records[number] for number in list(self.ended)]
        values = [value for r in ended if r.state != "failed" and (value := self.value(r)) is not None]
        return list(accumulate(values, max if self.larger else min))

    def count(self, state: str) -> int:
        return sum(record.state == state for record in list(self.records.values()))

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started

    @property
    def left(self) -> float | None:
        """Seconds to the deadline."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())
