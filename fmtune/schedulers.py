"""Tune's schedulers at work for fmtune: which trials are stopped early."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule, TrialScheduler

from fmtune.config import TrialConfig
from fmtune.failures import EndsErrors, InOrder
from fmtune.objectives import Objectives, rank_fronts
from fmtune.pickling import NotStored
from fmtune.run import TrialRecord
from fmtune.space import Space
from fmtune.training import EpochMetrics
from fmtune.trial import Task

_REDUCTION = 3
"""ASHA lets one in this many trials go on at each rung, and its rungs are as many times apart."""
_FIRST_RUNG_SHARE = 1 / 3
"""Part of the time that all trials of a search together spend on getting to a first rung of seconds."""
_MEDIAN_MIN_TRIALS = 3
"""Trials of a given epoch that the median rule wants to have seen."""


class _Fair(NotStored, EndsErrors):
    """Lets trial 0 run to its end, for it is what the others are compared with, and knows of earlier attempts."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)  # type: ignore[no-untyped-call]
        self._going_on: dict[int, TrialRecord] = {}

    def replay(self, record: TrialRecord) -> None:
        """Enter the epochs of a trial of an earlier attempt as if it had run here; of one that goes on, once it does.

        Else what it comes to late would be taken for what it came to at first.
        """
        if record.number == 0:
            return
        if record.state == "running":
            self._going_on[record.number] = record
        else:
            self._enter_epochs(Trial("replayed", trial_id=f"replayed-{record.number}", stub=True), record)

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        super().on_trial_add(tune_controller, trial)
        if (record := self._going_on.pop(trial.config["number"], None)) is not None:
            self._enter_epochs(trial, record)

    def _enter_epochs(self, trial: Trial, record: TrialRecord) -> None:
        raise NotImplementedError

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        if trial.config["number"] == 0:
            return str(TrialScheduler.CONTINUE)
        return str(super().on_trial_result(tune_controller, trial, result))

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        if trial.config["number"] != 0:
            super().on_trial_complete(tune_controller, trial, result)


class Asha(_Fair, ASHAScheduler):
    """Asynchronous successive halving (Li et al., 2020, https://arxiv.org/abs/1810.05934).

    With several brackets it is the asynchronous Hyperband of the same paper: each one has its first rung where the one
    before it has its second, and gets the share of the trials that Hyperband gives it (Li et al., 2018,
    https://arxiv.org/abs/1603.06560).
    """

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        super().on_trial_add(tune_controller, trial)
        # Ray draws the bracket anew in each process, and a resumed search would not know which it was.
        self._trial_info[trial.trial_id] = self._bracket_of(trial.config["number"])

    def _bracket_of(self, number: int) -> Any:
        last = len(self._brackets) - 1
        shares = [self._reduction_factor ** (last - i) / (last - i + 1) for i in range(last + 1)]
        return random.Random(number).choices(self._brackets, shares)[0]

    def _enter_epochs(self, trial: Trial, record: TrialRecord) -> None:
        bracket, sign = self._bracket_of(record.number), 1 if self._mode == "max" else -1
        for metrics in map(EpochMetrics.as_dict, record.history):
            value = metrics[str(self._metric)]
            if value is not None:
                bracket.on_result(trial, metrics[self._time_attr], sign * value)


class ParetoAsha(Asha):
    """ASHA for several objectives (MO-ASHA; Schmucker et al., 2021, https://arxiv.org/abs/2106.12639).

    A trial goes on from a rung unless a part of those there, all but one in `reduction_factor`, lie on better fronts
    than it does.
    """

    def __init__(self, objectives: Objectives, **options: Any) -> None:
        super().__init__(**options)
        self._objectives = objectives

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        task = Task(**trial.config)
        if task.number == 0:
            return str(TrialScheduler.CONTINUE)
        if self._stop_last_trials and result[self._time_attr] >= self._max_t:
            return str(TrialScheduler.STOP)
        stays = self._enter(task.trial_number, task.config, result)
        return str(TrialScheduler.CONTINUE if stays else TrialScheduler.STOP)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        task = Task(**trial.config)
        if task.number != 0 and self._time_attr in result:
            self._enter(task.trial_number, task.config, result)

    def _enter_epochs(self, trial: Trial, record: TrialRecord) -> None:
        for metrics in record.history:
            self._enter(record.number, record.config, metrics.as_dict())

    def _enter(self, number: int, config: TrialConfig, metrics: Mapping[str, Any]) -> bool:
        """Enter what a trial has come to into the rung that it has reached; whether it may go on."""
        for milestone, recorded in self._bracket_of(number)._rungs:
            if metrics[self._time_attr] < milestone:
                continue
            if number in recorded:
                # What it comes to now is later than what those of the lower rungs were compared by.
                return True
            recorded[number] = self._objectives.gains(config, metrics)
            fronts = rank_fronts(np.array(list(recorded.values())))
            return bool((fronts < fronts[-1]).mean() < 1 - 1 / self._reduction_factor)
        return True


class MedianRule(_Fair, MedianStoppingRule):
    """Stops trials below the median of the others' running averages (Golovin et al., 2017, Google Vizier)."""

    def _enter_epochs(self, trial: Trial, record: TrialRecord) -> None:
        # The rule looks for the last result of each trial that it knows.
        if record.history:
            self._results[trial] += [metrics.as_dict() for metrics in record.history]

    def _on_insufficient_samples(self, tune_controller: Any, trial: Trial, time: float) -> str:
        # Ray pauses such a trial for another's sake, and its function would begin from its first epoch again.
        return str(TrialScheduler.CONTINUE)


def create_scheduler(
    space: Space, earlier: Sequence[TrialRecord], slots: int, objectives: Objectives | None = None
) -> TrialScheduler:
    """Tune's scheduler by the name in `search.scheduler`, with what earlier trials of a resumed run showed.

    Args:
        space: of the search.
        earlier: trials of earlier attempts, those that go on among them.
        slots: how many trials run side by side.
        objectives: of the search, if there are several.
    """
    search = space.search
    options: dict[str, Any] = {"metric": search.metric, "mode": search.mode}
    match search.scheduler:
        case "asha" | "hyperband":
            rungs = _asha_rungs(space, slots)
            most = 1 + math.floor(math.log(rungs["max_t"] / rungs["grace_period"], _REDUCTION) + 1e-9)
            brackets = most if search.scheduler == "hyperband" else 1
            options |= {**rungs, "reduction_factor": _REDUCTION, "brackets": brackets}
            scheduler: _Fair = ParetoAsha(objectives, **options) if objectives else Asha(**options)
        case "median":
            options |= {"time_attr": "epoch", "grace_period": 1, "min_samples_required": _MEDIAN_MIN_TRIALS}
            scheduler = MedianRule(**options)
        case _:
            return InOrder()
    for record in earlier:
        scheduler.replay(record)
    return scheduler


def _asha_rungs(space: Space, slots: int) -> dict[str, Any]:
    """Where ASHA's first and last rung lie, on epochs or on seconds of training.

    The first one on seconds lies where all trials together spend a share of the time on getting there, and no trial is
    ended by the last: it ends with its last epoch.
    """
    search = space.search
    if search.rung == "epochs":
        return {"time_attr": "epoch", "grace_period": 1, "max_t": space.max_epochs}
    assert space.time_limit is not None
    first = _FIRST_RUNG_SHARE * space.time_limit * min(1.0, slots / search.trials)
    return {"time_attr": "seconds", "grace_period": first, "max_t": space.time_limit, "stop_last_trials": False}
