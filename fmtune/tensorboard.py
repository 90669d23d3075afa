"""TensorBoard's event files, with the searched values for its HPARAMS tab."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.logger import TBXLoggerCallback

from fmtune.config import Scalar, TrialConfig
from fmtune.trial import Task

_METRICS = ("ray/tune/val_accuracy", "ray/tune/val_loss")
"""Scalars of the event files that the tab shows for each trial."""


class EventFiles(TBXLoggerCallback):
    """Ray Tune's logger, whose hyperparameters would be all of the task, and whose metrics all that was reported.

    Args:
        params_of: the searched values of a configuration, by dotted key.
    """

    def __init__(self, params_of: Callable[[TrialConfig], Mapping[str, Scalar]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._params_of = params_of

    def log_trial_end(self, trial: Trial, failed: bool = False) -> None:
        trial.evaluated_params = dict(self._params_of(Task(**trial.config).config))
        super().log_trial_end(trial, failed)

    def _try_log_hparams(self, trial: Trial, result: dict[str, Any]) -> None:
        super()._try_log_hparams(trial, {name: result[name] for name in _METRICS if name in result})
