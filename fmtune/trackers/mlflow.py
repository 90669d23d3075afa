"""Trials as runs of MLflow, nested in one run for the whole search."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from fmtune.config import TrialConfig, flatten
from fmtune.errors import InputError, first_line
from fmtune.extras import import_extra
from fmtune.run import State
from fmtune.trackers.tracker import TrackedRun, Tracker, select_figures, select_metrics
from fmtune.training import EpochMetrics

# Read by MLflow at each request, whose own patience of many minutes would outlast most searches; and at its import.
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")

_EXPERIMENT = "fmtune"
_STATUS: dict[State, str] = {"complete": "FINISHED", "pruned": "FINISHED", "failed": "FAILED", "running": "KILLED"}
"""MLflow's words, the last for what was cut short."""


class MlflowTracker:
    """Writes to the experiment `fmtune`: a run with the name of the run folder, and a nested one for each trial."""

    name = "mlflow"

    def __init__(self, client: Any, entities: Any, experiment: str) -> None:
        self._client, self._entities, self._experiment = client, entities, experiment
        self._key = self._parent = ""
        self._trials: dict[int, str] = {}

    def start_run(self, run: TrackedRun) -> None:
        self._key = run.key
        self._parent = self._open(run.name, "search", {})

    def start_trial(self, number: int, config: TrialConfig) -> None:
        if number in self._trials:  # begun again elsewhere, after its node died
            return
        name = f"{number:05d}"
        self._trials[number] = self._open(name, name, flatten(config))

    def log_epoch(self, number: int, metrics: EpochMetrics) -> None:
        self._log_metrics(self._trials[number], select_metrics(metrics), metrics.epoch)

    def end_trial(self, number: int, state: State) -> None:
        if number not in self._trials:  # its process could not be started
            return
        run = self._trials.pop(number)
        self._client.set_tag(run, "fmtune.state", state)
        self._client.set_terminated(run, _STATUS[state])

    def end_run(self, summary: Mapping[str, Any] | None) -> None:
        for number in list(self._trials):
            self.end_trial(number, "running" if summary is None else "pruned")
        if summary is not None:
            self._log_metrics(self._parent, select_figures(summary), 0)
        self._client.set_terminated(self._parent, "KILLED" if summary is None else "FINISHED")

    def _open(self, name: str, part: str, params: Mapping[str, Any]) -> str:
        """The id of the MLflow run for a part of this run: the one of an earlier attempt, or one made anew."""
        tags = {"fmtune.key": self._key, "fmtune.part": part}
        wanted = " and ".join(f"tags.`{tag}` = '{value}'" for tag, value in tags.items())
        found = self._client.search_runs([self._experiment], wanted, max_results=1)
        if found:
            self._client.update_run(found[0].info.run_id, status="RUNNING")
            return str(found[0].info.run_id)
        if part != "search":
            tags["mlflow.parentRunId"] = self._parent
        created = str(self._client.create_run(self._experiment, run_name=name, tags=tags).info.run_id)
        if params:
            written = [self._entities.Param(key, str(value)) for key, value in params.items()]
            self._client.log_batch(created, params=written)
        return created

    def _log_metrics(self, run: str, values: Mapping[str, float], step: int) -> None:
        now = int(1000 * time.time())
        self._client.log_batch(run, [self._entities.Metric(name, value, now, step) for name, value in values.items()])


def connect_mlflow(uri: str) -> Tracker:
    """A tracker on the MLflow server or store at `uri`.

    Raises:
        InputError: MLflow is not installed, or there is no such server or store.
    """
    mlflow = import_extra("logging.mlflow", "mlflow", "mlflow-skinny", "mlflow")
    try:
        client = mlflow.MlflowClient(uri)
        experiment = client.get_experiment_by_name(_EXPERIMENT)
        number = client.create_experiment(_EXPERIMENT) if experiment is None else experiment.experiment_id
    except (mlflow.MlflowException, SQLAlchemyError, ImportError, OSError) as error:
        reason = first_line(error)
        raise InputError(f"logging.mlflow: {uri}: can't be reached ({reason}); start it, or mend the URI") from None
    return MlflowTracker(client, mlflow.entities, str(number))
