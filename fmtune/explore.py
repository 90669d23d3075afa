"""The search phase: trials proposed, trained, stopped early, and recorded as they go."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from pydantic import ValidationError

from fmtune.board import Flight
from fmtune.config import TrialConfig
from fmtune.context import RunContext
from fmtune.population import Adoption, Population, adopt, count_segments, describe_adoption, parse_earlier
from fmtune.probe import count_operations
from fmtune.room import count_slots, measure_capacity
from fmtune.run import State, TrialRecord
from fmtune.schedulers import create_scheduler
from fmtune.seeds import derive_seed
from fmtune.study import ADOPTED, CAUSE, STUDY, RunTrials, fail, keep_attribute, open_storage, tell
from fmtune.timing import Timing
from fmtune.training import EpochMetrics
from fmtune.trial import Task, task_name
from fmtune.tuner import PopulationSearch, StudySearch, Until, run_trials

_BASELINE_SHARE = 0.25
"""Part of the time that the baseline may take."""
_ENDING_SECONDS = 20.0
"""Seconds for a trial that has trained its last epoch to end in, its checkpoint on the way to the storage."""
_SAME_FAILURES = 5
"""Failures of one cause in a row that end the search: the next trial would fail as well."""
_STATES: dict[TrialState, State] = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
}


class Exploration:
    """The trials of a search; watches them and keeps board, study and run folder in step."""

    def __init__(self, context: RunContext, timing: Timing) -> None:
        self._context, self._timing, self._board = context, timing, context.board
        self._records = context.board.records
        self._failures: list[str] = []
        self._started: set[int] = set()
        self._over_since: float | None = None
        self._trials = _TrialsFile(context)
        self._own = RunTrials(None if context.space.search.storage is None else context.folder.run_id)
        self._study: optuna.Study

    def run(self) -> None:
        """Run trials until there are enough of them, or the rest of the time is needed for what follows."""
        context = self._context
        context.board.phase = "searching" if context.board.has_baseline else "training"
        with open_storage(context.space, context.folder) as storage:
            self._restore(storage)
            self._run_trials(storage)
            self._close_running()
            if context.space.search.storage is not None and context.objectives is None:
                self._note_others()

    def _run_trials(self, storage: optuna.storages.BaseStorage) -> None:
        """Run those that were interrupted and fresh ones, so far as number and time allow."""
        context = self._context
        earlier = [record for record in self._records.values() if record.state != "running"]
        interrupted = [record for record in self._records.values() if record.state == "running"]
        searcher = self._create_searcher(storage, [context.task_of(record) for record in interrupted])
        self._study = searcher.study
        self._board.capacity = measure_capacity(context.space.resources)
        remaining = self._count_tasks(len(earlier))
        if remaining <= 0:
            return
        if self._timing.search_is_over():
            context.view.note("no time is left for more trials; search.time bounds all attempts together")
            return
        slots = count_slots(context.space.resources)
        run_trials(
            context.shared,
            context.space.resources,
            searcher,
            remaining,
            name=context.experiment_name("search"),
            storage=context.storage.place,
            watcher=self,
            params_of=context.space.params_of,
            until=Until(self._is_over, self._ends_early),
            scheduler=create_scheduler(context.space, list(self._records.values()), slots, context.objectives),
            pooled=not context.space.is_single,
            can_grow=context.can_grow,
        )

    def _create_searcher(self, storage: optuna.storages.BaseStorage, interrupted: Sequence[Task]) -> StudySearch:
        context = self._context
        options: dict[str, Any] = {
            "space": context.space,
            "storage": storage,
            "own": self._own,
            "has_time": self._timing.can_begin,
            "cost": lambda config: count_operations(config, context.data),
            "started": len(self._records),
            "objectives": context.objectives,
        }
        if context.space.search.scheduler != "pbt":
            return StudySearch(interrupted=interrupted, **options)
        seed = self._own.seed_of(context.space.search.seed)
        population = Population(
            context.space, self._value_at, lambda number, epoch: Random(derive_seed(seed, number, epoch))
        )
        return PopulationSearch(population, self._timing, self._records, context.task_of, self._adopt, **options)

    def _count_tasks(self, ended: int) -> int:
        """How many tasks Tune may be given, when so many trials have ended."""
        space = self._context.space
        remaining = space.trials - ended
        return count_segments(space, space.max_epochs) if remaining and space.search.scheduler == "pbt" else remaining

    def _value_at(self, record: TrialRecord, epoch: int) -> float:
        """What decides, of a trial after an epoch; more is better."""
        value = record.history[epoch - 1].as_dict()[self._board.metric] or 0.0
        return value if self._board.larger else -value

    def _adopt(self, record: TrialRecord, adoption: Adoption) -> None:
        """Enter what a member of a population takes over into its record, the run folder and the study."""
        adopt(record, adoption, self._context.space.params_of(adoption.config))
        for metrics in record.history:
            self._context.folder.append_history(record.number, metrics)
        number = self._own.study_number(record.number)
        keep_attribute(self._study, number, ADOPTED, describe_adoption(record))
        self._trials.has_changed()
        at = f"epoch {len(record.history)}"
        self._context.view.note(f"trial {record.number} goes on from trial {adoption.donor.number} at {at}")

    def on_start(self, task: Task) -> None:
        record = self._record_of(task)
        self._board.in_flight[task.name] = Flight(f"trial {record.number}", record.config.epochs, record.last)
        self._trials.has_changed()
        if record.number not in self._started:
            self._started.add(record.number)
            self._context.tracking.start_trial(record.number, task.config)

    def on_epoch(self, task: Task, metrics: EpochMetrics) -> None:
        number = task.trial_number
        record = self._records[number]
        # A resumed trial repeats the epoch whose checkpoint was not yet written.
        record.history = [*(earlier for earlier in record.history if earlier.epoch < metrics.epoch), metrics]
        self._board.in_flight[task.name].last = metrics
        self._context.folder.append_history(number, metrics)
        self._context.tracking.log_epoch(number, metrics)
        self._context.view.refresh()

    def on_checkpoint(self, task: Task, folder: str) -> None:
        self._records[task.trial_number].checkpoint = self._context.storage.place_of(folder)

    def on_end(self, task: Task, cause: str | None) -> None:
        record = self._record_of(task)
        if cause is None and task.until is not None and 0 < len(record.history) < record.config.epochs:
            # A part of a training, which goes on.
            self._board.in_flight.pop(task.name, None)
            return
        record.cause = cause if record.history or cause else "ended without a result"
        if record.cause:
            record.state = "failed"
            fail(self._study, self._own.study_number(record.number), record.cause)
            self._count_failure(record.cause)
        else:
            self._failures.clear()
            record.state = "complete" if len(record.history) == record.config.epochs else "pruned"
        self._board.ended.append(record.number)
        self._board.in_flight.pop(task.name, None)
        self._trials.has_changed()
        self._context.view.on_end(record)
        self._context.tracking.end_trial(record.number, record.state)

    def on_tick(self) -> None:
        self._context.check_interrupt()
        self._timing.save_clock()
        self._trials.write_if_due()

    def _record_of(self, task: Task) -> TrialRecord:
        """The trial's record, made here if it has none: a trial whose process can't be started ends without a start."""
        number = task.trial_number
        if number not in self._records:
            self._records[number] = TrialRecord(number, task.config, self._context.space.params_of(task.config))
        return self._records[number]

    def _restore(self, storage: optuna.storages.BaseStorage) -> None:
        """Enter the trials of earlier attempts into the board; interrupted ones are `running` there."""
        history = self._context.folder.read_history()
        try:
            study = optuna.load_study(study_name=STUDY, storage=storage)
        except KeyError:  # no study yet
            return
        folders = self._context.storage.list_trials("search")
        for trial in self._own.restore(study):
            number = self._own.number_of(trial)
            config = self._config_of(number, trial)
            if config is None:
                if not trial.state.is_finished():
                    fail(study, trial.number, "interrupted before it began")
                continue
            record = TrialRecord(number, config, self._context.space.params_of(config), _STATES[trial.state])
            record.history = history.get(number, [])
            record.cause = trial.user_attrs.get(CAUSE)
            adopted = trial.user_attrs.get(ADOPTED)
            record.earlier = parse_earlier(adopted) if adopted else []
            self._restore_checkpoint(record, folders.get(task_name(number), []), adopted)
            self._end_if_done(record, trial, study)
            self._records[number] = record
            if record.state != "running":
                self._board.ended.append(number)

    def _config_of(self, number: int, trial: FrozenTrial) -> TrialConfig | None:
        """None where the driver was killed while the trial's values were drawn: it has some of them, or none."""
        space = self._context.space
        if number == 0:
            return space.baseline
        if ADOPTED in trial.user_attrs:
            return TrialConfig.model_validate(trial.user_attrs[ADOPTED]["config"])
        try:
            config = space.trial_config(trial.params)
        except ValidationError:
            return None
        return config if set(space.params_of(config)) == set(trial.params) else None

    def _restore_checkpoint(
        self, record: TrialRecord, folders: Sequence[str], adopted: Mapping[str, Any] | None
    ) -> None:
        """Find the trial's last checkpoint, and let the history of one that goes on end with the epoch of that.

        An epoch may have been trained that was not yet entered, or entered before its checkpoint was whole. A trial has
        no checkpoint of its own yet after what it adopted where it was cut off before the epoch that follows.
        """
        is_open = record.state == "running"
        found = self._context.storage.find_checkpoint(folders, last=None if is_open else len(record.history))
        if adopted is not None and (found is None or found[1].epoch <= adopted["epoch"]):
            record.checkpoint, reached = adopted["checkpoint"], adopted["epoch"]
        elif found is not None:
            record.checkpoint, metrics = found
            reached = metrics.epoch
            if is_open and reached > len(record.history):
                record.history.append(metrics)
                self._context.folder.append_history(record.number, metrics)
        else:
            reached = 0
        if is_open:
            record.history = [metrics for metrics in record.history if metrics.epoch <= reached]

    def _end_if_done(self, record: TrialRecord, trial: FrozenTrial, study: optuna.Study) -> None:
        """Count a trial that was cut off after its last epoch as complete, in the study too."""
        value = self._board.value(record)
        if record.state != "running" or len(record.history) < record.config.epochs or value is None:
            return
        tell(study, trial.number, self._values(record), is_done=True)
        self._context.tracking.start_trial(record.number, record.config)
        self._context.tracking.end_trial(record.number, "complete")
        record.state = "complete"

    def _values(self, record: TrialRecord) -> list[float]:
        """What a trial has come to, objective by objective."""
        assert record.last is not None
        metrics, objectives = record.last.as_dict(), self._context.objectives
        return objectives.measure(record.config, metrics) if objectives else [metrics[self._board.metric] or 0.0]

    def _is_over(self) -> bool:
        """Whether the time is up, or trial after trial dies of one cause.

        A trial that has trained its last epoch is waited for a little: once Tune stops everything it reports no more
        ends, and one that is recovered after the death of its process may take for ever.
        """
        if not (self._timing.search_is_over() or self._board.broken_off is not None):
            return False
        now = time.monotonic()
        self._over_since = self._over_since or now
        is_ending = any(flight.is_done for flight in self._board.in_flight.values())
        return not is_ending or now - self._over_since > _ENDING_SECONDS

    def _count_failure(self, cause: str) -> None:
        # Causes of a kind differ in their figures, such as the step of a loss that is not finite.
        self._failures.append(re.sub(r"\d+", "#", cause))
        recent = self._failures[-_SAME_FAILURES:]
        if len(recent) == _SAME_FAILURES and len(set(recent)) == 1 and self._board.broken_off is None:
            self._board.broken_off = cause
            self._context.view.note(f"the last {_SAME_FAILURES} trials died of one cause; the search ends")

    def _ends_early(self, task: Task, result: dict[str, float]) -> bool:
        """Whether no time is left for more of a trial."""
        epoch, seconds = int(result["epoch"]), result["seconds"]
        if not self._timing.can_go_on(task.config.epochs, epoch, seconds):
            return True
        return self._baseline_is_over(task, result)

    def _baseline_is_over(self, task: Task, result: dict[str, float]) -> bool:
        """Whether the baseline's next epoch would take it over its share of the time."""
        limit = self._context.space.time_limit
        if task.number != 0 or limit is None or not self._context.board.has_baseline:
            return False
        return result["seconds"] * (1 + 1 / result["epoch"]) > _BASELINE_SHARE * limit

    def _close_running(self) -> None:
        """Count trials that the end of the time cut off as stopped early, here and in the study."""
        for trial in self._study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            if self._own.has(trial):
                self._study.tell(trial.number, state=TrialState.PRUNED)
        self._board.in_flight.clear()
        for record in self._records.values():
            if record.state == "running":
                record.state = "pruned"
                self._board.ended.append(record.number)
        self._trials.write()

    def _note_others(self) -> None:
        """Tell of another run of the study where that has come to a better value."""
        best, board = self._board.best, self._board
        finished = self._study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
        values = [trial.value for trial in finished if trial.value is not None and not self._own.has(trial)]
        if values and best is not None:
            value, own = max(values) if board.larger else min(values), board.value(best)
            if own is None or (value > own if board.larger else value < own):
                self._context.view.note(f"another run of the study has come to {board.metric} {value:.4f}")


class _TrialsFile:
    """Keeps trials.csv up to date, with a twentieth of the time at most: it is written whole each time."""

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self._is_stale = False
        self._next = 0.0

    def has_changed(self) -> None:
        self._is_stale = True
        self.write_if_due()

    def write_if_due(self) -> None:
        if self._is_stale and time.monotonic() >= self._next:
            self.write()

    def write(self) -> None:
        started = time.monotonic()
        context, records = self._context, list(self._context.board.records.values())
        further = context.objectives.describe(records) if context.objectives else None
        context.folder.write_trials(records, list(context.space.ranges), further)
        ended = time.monotonic()
        self._is_stale, self._next = False, ended + 19 * (ended - started)


def rank(records: Sequence[TrialRecord], metric: str, larger: bool) -> list[TrialRecord]:
    """Trials with a result and its weights, best first: those trained to their end before those stopped."""

    def key(record: TrialRecord) -> tuple[bool, int, float]:
        assert record.last is not None
        value = record.last.as_dict()[metric]
        assert value is not None
        return (
            record.state == "complete",
            record.last.epoch if record.state != "complete" else 0,
            value if larger else -value,
        )

    usable = [record for record in records if record.state != "failed" and record.last and record.checkpoint]
    return sorted(usable, key=key, reverse=True)
