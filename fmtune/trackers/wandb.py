"""Trials as runs of Weights & Biases, in one group for the whole search."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fmtune.config import Scalar, TrialConfig, flatten
from fmtune.errors import InputError, first_line
from fmtune.extras import import_extra
from fmtune.run import State
from fmtune.trackers.tracker import TrackedRun, Tracker, select_figures, select_metrics
from fmtune.training import EpochMetrics


class WandbTracker:
    """Writes to a project: a group with the name of the run folder, of a run for each trial and one for the summary."""

    name = "wandb"

    def __init__(self, wandb: Any, project: str) -> None:
        self._wandb, self._project = wandb, project
        self._run: TrackedRun | None = None
        self._trials: dict[int, Any] = {}

    def start_run(self, run: TrackedRun) -> None:
        self._run = run

    def start_trial(self, number: int, config: TrialConfig) -> None:
        if number in self._trials:  # begun again elsewhere, after its node died
            return
        name = f"{number:05d}"
        self._trials[number] = self._open(name, name, "trial", flatten(config))

    def log_epoch(self, number: int, metrics: EpochMetrics) -> None:
        self._trials[number].log(select_metrics(metrics), step=metrics.epoch)

    def end_trial(self, number: int, state: State) -> None:
        if number not in self._trials:  # its process could not be started
            return
        run = self._trials.pop(number)
        run.summary["state"] = state
        run.finish(exit_code=0 if state in ("complete", "pruned") else 1)

    def end_run(self, summary: Mapping[str, Any] | None) -> None:
        for number in list(self._trials):
            self.end_trial(number, "running" if summary is None else "pruned")
        if summary is not None:
            assert self._run is not None
            run = self._open(self._run.name, "search", "search", {})
            run.summary.update(select_figures(summary))
            run.finish()

    def _open(self, name: str, part: str, kind: str, config: Mapping[str, Scalar]) -> Any:
        """A run of W&B's; the one of an earlier attempt goes on."""
        assert self._run is not None
        return self._wandb.init(
            project=self._project,
            group=self._run.name,
            name=name,
            id=f"{self._run.key}-{part}",
            job_type=kind,
            config=dict(config),
            dir=self._run.folder,
            resume="allow",
            reinit="create_new",
            settings=self._wandb.Settings(silent=True, console="off"),
        )


def connect_wandb(project: str) -> Tracker:
    """A tracker on a project of Weights & Biases, as its environment variables and login have it.

    Raises:
        InputError: W&B is not installed, there is no login, or its server gives no answer.
    """
    wandb = import_extra("logging.wandb", "wandb", "wandb", "wandb")
    if wandb.setup().settings.mode == "online":
        _check_login(wandb)
    return WandbTracker(wandb, project)


def _check_login(wandb: Any) -> None:
    try:
        is_known = wandb.login(prompt=False)
    except wandb.Error as error:
        reason = first_line(error)
        raise InputError(f"logging.wandb: {reason}; or set WANDB_MODE=offline, and `wandb sync` later") from None
    if not is_known:
        raise InputError("logging.wandb: no login; run `wandb login`, or set WANDB_API_KEY or WANDB_MODE=offline")
