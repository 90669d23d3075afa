"""Several objectives at once: what trials come to, which of them no other beats, and which of those is taken."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmtune.config import ModelConfig, SearchConfig, TrialConfig
from fmtune.model import count_parameters, create_model
from fmtune.run import TrialRecord


class Objectives:
    """The objectives of a search, accuracy first.

    Args:
        search: names them.
        channels: of the images.
        classes: that a network tells apart.
    """

    def __init__(self, search: SearchConfig, channels: int, classes: int) -> None:
        self.names: list[str] = list(search.objectives)
        self._signs = [1 if mode == "max" else -1 for mode in search.modes]
        self._count = cache(lambda model: count_parameters(create_model(model, channels, classes)))

    def measure(self, config: TrialConfig, metrics: Mapping[str, Any]) -> list[float]:
        """What a trial comes to after an epoch, objective by objective."""
        return [self._count_parameters(config.model) if n == "parameters" else float(metrics[n]) for n in self.names]

    def gains(self, config: TrialConfig, metrics: Mapping[str, Any]) -> list[float]:
        """The same with signs by which more is better."""
        return [sign * value for sign, value in zip(self._signs, self.measure(config, metrics), strict=True)]

    def find_front(self, records: Sequence[TrialRecord]) -> list[TrialRecord]:
        """Those of the trials with a result that no other beats in one objective without losing in another.

        Trials that were stopped early are left out where any ran to its end.
        """
        measured = [record for record in records if record.state != "failed" and record.last]
        complete = [record for record in measured if record.state == "complete"] or measured
        if not complete:
            return []
        is_beaten = find_beaten(np.array([self._gains_of(record) for record in complete]))
        return [record for record, beaten in zip(complete, is_beaten, strict=True) if not beaten]

    def pick(self, front: Sequence[TrialRecord], images: int) -> TrialRecord:
        """The trial to take of a front, by the one-standard-error rule (Breiman et al., 1984, CART, section 3.4.3).

        Of those whose accuracy is within a standard error of the best one's, on so many validation images, it is the
        best in the second objective.
        """
        gains = {record.number: self._gains_of(record) for record in front}
        best = max(accuracy for accuracy, *_ in gains.values())
        error = math.sqrt(best * (1 - best) / images)
        near = [record for record in front if gains[record.number][0] >= best - error]
        return max(near, key=lambda record: (*gains[record.number][1:], gains[record.number][0]))

    def describe(self, records: Sequence[TrialRecord]) -> dict[int, dict[str, object]]:
        """Columns for trials.csv by the trial's number: the objectives but accuracy, and whether it is on the front."""
        front = {record.number for record in self.find_front(records)}
        found: dict[int, dict[str, object]] = {}
        for record in records:
            values = self.measure(record.config, record.last.as_dict()) if record.last else [None] * len(self.names)
            columns: dict[str, object] = dict(zip(self.names[1:], values[1:], strict=True))
            found[record.number] = columns | {"pareto": record.number in front}
        return found

    def _count_parameters(self, model: ModelConfig) -> int:
        # What weights it starts from and how many of them are kept does not change their number.
        return self._count(model.model_copy(update={"pretrained": None, "freeze": 0, "unfreeze_epoch": None}))

    def _gains_of(self, record: TrialRecord) -> list[float]:
        assert record.last is not None
        return self.gains(record.config, record.last.as_dict())


def find_beaten(points: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which of the points (N, K) another is at least equal to everywhere and better than somewhere; more is better."""
    return np.array([((points >= point).all(axis=1) & (points > point).any(axis=1)).any() for point in points])


def rank_fronts(points: NDArray[np.float64]) -> NDArray[np.int64]:
    """The front (N,) of each point (N, K), of which more is better on each axis.

    Front 0 has those that no other beats; each further one has those that none does once the fronts before it are taken
    away (Deb et al., 2002, https://doi.org/10.1109/4235.996017).
    """
    fronts = np.full(len(points), -1)
    left, front = np.arange(len(points)), 0
    while len(left):
        is_beaten = find_beaten(points[left])
        fronts[left[~is_beaten]] = front
        left, front = left[is_beaten], front + 1
    return fronts
