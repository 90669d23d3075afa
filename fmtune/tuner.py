"""Ray Tune at work for fmtune: the searchers, the stopper, and one call that runs trials."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Protocol, cast

import optuna
from ray import tune
from ray.tune.error import TuneError
from ray.tune.experiment import Trial
from ray.tune.integration.ray_train import CHECKPOINT_PATH_KEY
from ray.tune.logger import JsonLoggerCallback
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from fmtune.config import ResourcesConfig, Scalar, TrialConfig, flatten
from fmtune.failures import DEATHS, InOrder, find_cause, is_error_of_training
from fmtune.objectives import Objectives
from fmtune.pickling import NotStored
from fmtune.pool import PooledTrial
from fmtune.population import Adoption, Population
from fmtune.room import count_slots
from fmtune.run import TrialRecord
from fmtune.samplers import STARTUP_TRIALS, create_sampler
from fmtune.seeds import derive_seed
from fmtune.space import Space
from fmtune.study import STUDY, RunTrials, id_of, keep_value, tell
from fmtune.studyfile import StudyFile
from fmtune.tensorboard import EventFiles
from fmtune.timing import Timing
from fmtune.training import EpochMetrics
from fmtune.trial import SharedData, Task, create_task, run_trial, trial_resources, worker_resources

_SAMPLER = 1_000_000_000
"""Stands for the sampler where trials have their number, in the derivation of seeds."""


class Watcher(Protocol):
    """What is told of the trials as they run."""

    def on_start(self, task: Task) -> None: ...

    def on_epoch(self, task: Task, metrics: EpochMetrics) -> None: ...

    def on_checkpoint(self, task: Task, folder: str) -> None: ...

    def on_end(self, task: Task, cause: str | None) -> None: ...

    def on_tick(self) -> None: ...


class StudySearch(NotStored, OptunaSearch):
    """Ray's OptunaSearch over a `Space`: trial 0 is the baseline, interrupted trials come before fresh ones.

    `has_time` is asked before each fresh trial; without it none is begun any more. `cost` of a training
    orders the random trials that the sampler starts from; so many trials of the run have been started before.

    An Optuna trial ends COMPLETE where it reached its last epoch, PRUNED where it was stopped before, FAIL (by
    `study.fail`) where it died.
    """

    def __init__(
        self,
        space: Space,
        storage: optuna.storages.BaseStorage,
        own: RunTrials,
        interrupted: Sequence[Task],
        has_time: Callable[[], bool],
        cost: Callable[[TrialConfig], float],
        started: int,
        objectives: Objectives | None = None,
    ) -> None:
        seed = own.seed_of(space.search.seed)
        plan = space.planned(STARTUP_TRIALS, cost, seed)
        # A search that goes on must not draw again what it has drawn.
        sampler = create_sampler(space, derive_seed(seed, _SAMPLER, started), plan, own.number_of)
        super().__init__(
            space=space.suggest,
            metric=objectives.names if objectives else space.search.metric,
            mode=list(space.search.modes) if objectives else space.search.mode,
            sampler=sampler,
            storage=storage,
            study_name=STUDY,
        )
        # What Tune looks for in each result; the number of parameters is none of it.
        self._metric, self._mode = space.search.metric, space.search.mode
        self._searched, self._own, self._objectives = space, own, objectives
        self._interrupted = list(interrupted)
        self._has_time = has_time
        self._tasks: dict[str, Task] = {}
        self._running: dict[str, Task] = {}
        self._asked: dict[int, optuna.Trial] = {}
        self._reported: dict[str, int] = {}

    @property
    def study(self) -> optuna.Study:
        return cast(optuna.Study, self._ot_study)

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """Tune's configuration of the next trial, or its word for no more."""
        task = self._next_task()
        if task is None:
            # Ray's type of the method leaves out the marker that its documentation asks for.
            return None if self._running else Searcher.FINISHED  # type: ignore[return-value]
        self._ot_trials[trial_id] = self._trial_of(task.trial_number)
        self._tasks[trial_id] = self._running[trial_id] = task
        return task.as_dict()

    def _trial_of(self, number: int) -> optuna.Trial:
        """The study's side of a trial of the run; that of an earlier attempt is made anew."""
        if number not in self._asked:
            self._asked[number] = optuna.trial.Trial(self.study, id_of(self.study, self._own.study_number(number)))
        return self._asked[number]

    def _next_task(self) -> Task | None:
        """What is to be trained next; None if that depends on what is being trained, or there is nothing more."""
        if self._interrupted:
            return self._interrupted.pop(0)
        return self._create_task() if self._has_time() else None

    def _create_task(self) -> Task:
        """The task of a trial that the study is asked for."""
        space, asked = self._searched, self._own.ask(self.study)
        number = self._own.number_of(asked)
        self._asked[number] = asked
        if number == 0 and not space.is_single:
            asked.set_user_attr("baseline", True)
        config = space.baseline if number == 0 else space.trial_config(space.suggest(asked))
        if isinstance(self._storage, StudyFile):
            self._storage.write_new()
        return create_task(space.search.seed, number, config)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self._report(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        task, asked = self._tasks[trial_id], self._ot_trials[trial_id]
        self._running.pop(trial_id, None)
        if error or not result or self.metric not in result:
            # Tune does not tell a searcher what a trial died of: `fail` ends it.
            return
        # Tune keeps the result that a trial is stopped at from `on_trial_result`.
        self._report(trial_id, result)
        is_done = result["epoch"] == task.config.epochs
        if task.until is not None and not is_done:
            # A part of a training, which goes on.
            return
        values = self._objectives.measure(task.config, result) if self._objectives else [result[self.metric]]
        tell(self.study, asked.number, values, is_done=is_done)

    def _report(self, trial_id: str, result: dict[str, Any]) -> None:
        # Optuna has no place for the values in between of several objectives.
        if self._objectives is None and self._reported.get(trial_id) != result["epoch"]:
            # Not by Optuna's `report`, which leaves a step as it is that was trained before, and is again after a kill.
            keep_value(self._ot_trials[trial_id], result["epoch"], result[self.metric])
            self._reported[trial_id] = result["epoch"]

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a run is resumed from its study and its history, not from pickled objects."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a run is resumed from its study and its history")


class PopulationSearch(StudySearch):
    """Proposes the trainings of a population part by part: new members first, as many as the time carries.

    Args:
        population: says who trains next and how far, and what a member takes over before it.
        timing: tells what there is time for.
        records: the trials by number.
        task_of: makes the task of a trial, from its last checkpoint on.
        on_adoption: enters into a trial's record what it takes over.
        options: those of `StudySearch`.
    """

    def __init__(
        self,
        population: Population,
        timing: Timing,
        records: Mapping[int, TrialRecord],
        task_of: Callable[[TrialRecord], Task],
        on_adoption: Callable[[TrialRecord, Adoption], None],
        **options: Any,
    ) -> None:
        super().__init__(interrupted=[], **options)
        self._population, self._timing, self._records = population, timing, records
        self._task_of, self._on_adoption = task_of, on_adoption

    def _next_task(self) -> Task | None:
        busy = {task.trial_number for task in self._running.values()}
        running = [record for record in self._records.values() if record.state == "running"]
        unfinished = self._timing.those_that_can_end(running)
        waiting = [record for record in unfinished if record.number not in busy]
        if any(record.number == 0 for record in waiting):
            return self._task_of(self._records[0])
        is_full = len(self._own) >= self._searched.trials
        if not is_full and self._has_time() and self._timing.can_carry(unfinished, more=1):
            task = self._create_task()
            return task if task.number == 0 else self._cut(task, TrialRecord(task.trial_number, task.config, {}))
        if not waiting:
            return None
        record = self._population.pick(waiting, self._timing.can_carry(unfinished))
        members = [other for other in self._records.values() if other.number != 0]
        if (adoption := self._population.judge(record, members, busy)) is not None:
            self._on_adoption(record, adoption)
        return self._cut(self._task_of(record), record)

    def _cut(self, task: Task, record: TrialRecord) -> Task:
        """A task as far as its next part goes, under a name of its own."""
        stop = self._population.next_stop(record)
        return replace(task, name=f"{task.name}-{stop:03d}", until=stop)


class TaskRounds(NotStored, Searcher):
    """Proposes tasks round by round: once all of a round have ended it asks for the next, until there is none.

    Args:
        next_round: the tasks of the next round; an empty list ends it all.
    """

    def __init__(self, next_round: Callable[[], Sequence[Task]]) -> None:
        super().__init__(metric="epoch", mode="max")
        self._next_round = next_round
        self._tasks: list[Task] = []
        self._running: set[str] = set()

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        if not self._tasks:
            if self._running:
                return None
            self._tasks = list(self._next_round())
        if not self._tasks:
            # Ray's type of the method leaves out the marker that its documentation asks for.
            return Searcher.FINISHED  # type: ignore[return-value]
        self._running.add(trial_id)
        return self._tasks.pop(0).as_dict()

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self._running.discard(trial_id)

    def save(self, checkpoint_path: str) -> None:
        pass

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a list of tasks is made anew")


class Until(NotStored, tune.Stopper):
    """Stops everything once `is_over` says so, and a single trial once `ends_early` does."""

    def __init__(
        self, is_over: Callable[[], bool], ends_early: Callable[[Task, dict[str, Any]], bool] | None = None
    ) -> None:
        self._is_over, self._ends_early = is_over, ends_early

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return self._ends_early is not None and self._ends_early(Task(**result["config"]), result)

    def stop_all(self) -> bool:
        return self._is_over()


class _Reports(NotStored, tune.Callback):
    """Passes Tune's events on to a watcher."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        self._watcher.on_tick()

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._watcher.on_start(Task(**trial.config))

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        metrics = EpochMetrics(**{name: result[name] for name in EpochMetrics.__dataclass_fields__})
        self._watcher.on_epoch(Task(**trial.config), metrics)
        if CHECKPOINT_PATH_KEY in result:
            self._watcher.on_checkpoint(Task(**trial.config), result[CHECKPOINT_PATH_KEY])

    def on_checkpoint(
        self, iteration: int, trials: list[Trial], trial: Trial, checkpoint: tune.Checkpoint, **info: Any
    ) -> None:
        self._watcher.on_checkpoint(Task(**trial.config), checkpoint.path)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        cause = find_cause(trial) if is_error_of_training(trial) else None
        self._watcher.on_end(Task(**trial.config), cause)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._watcher.on_end(Task(**trial.config), find_cause(trial))


class _KeepsLast(NotStored, tune.Callback):
    """Deletes a trial's checkpoint once the next one is there.

    Tune does so too where it is told how many to keep, and then writes the state of all trials whenever one of them has
    that many new ones: with thousands of trials it does little else.
    """

    def __init__(self) -> None:
        self._last: dict[str, str] = {}

    def on_checkpoint(
        self, iteration: int, trials: list[Trial], trial: Trial, checkpoint: tune.Checkpoint, **info: Any
    ) -> None:
        before = self._last.get(trial.trial_id, checkpoint.path)
        if before != checkpoint.path:
            assert checkpoint.filesystem is not None
            with suppress(FileNotFoundError):
                checkpoint.filesystem.delete_dir(before)
        self._last[trial.trial_id] = checkpoint.path

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._last.pop(trial.trial_id, None)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._last.pop(trial.trial_id, None)


def run_trials(
    shared: SharedData,
    resources: ResourcesConfig,
    searcher: Searcher,
    trials: int,
    *,
    name: str,
    storage: str,
    watcher: Watcher,
    until: Until,
    scheduler: TrialScheduler | None = None,
    pooled: bool = False,
    can_grow: bool = False,
    params_of: Callable[[TrialConfig], Mapping[str, Scalar]] = flatten,
) -> None:
    """Run the tasks that a searcher proposes, as many at a time as there is room for.

    Args:
        shared: data of all trials.
        resources: of each trial.
        searcher: proposes tasks as Tune configurations.
        trials: how many it is asked for at most.
        name: folder of this experiment under `storage`.
        storage: path or URL of Tune's own folder.
        watcher: told of every epoch, in this process.
        until: what ends trials early, and all of them.
        scheduler: stops trials early; none runs them to their end.
        pooled: keep the workers of trials that have several up from one trial to the next; without, each trial has a
            `TorchTrainer` of its own, which takes seconds to start.
        can_grow: whether nodes may come to the cluster, or leave it, as trials run.
        params_of: the values of a configuration that TensorBoard compares; all by default.
    """
    pooled = pooled and resources.workers > 1
    tuner = tune.Tuner(
        _create_trainable(shared, resources, pooled),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=scheduler or InOrder(),
            num_samples=trials,
            # Without a bound Tune keeps a trial waiting for room, which is what makes an autoscaler add a node. The
            # drivers of a `TorchTrainer` want no room for themselves, so theirs would all start at once.
            max_concurrent_trials=None if can_grow and (pooled or resources.workers == 1) else count_slots(resources),
            # A trial blocked in a nested TorchTrainer can't hand its process on.
            reuse_actors=pooled or resources.workers == 1,
            trial_dirname_creator=lambda trial: trial.config["name"],
            trial_name_creator=lambda trial: trial.config["name"],
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=storage,
            stop=until,
            callbacks=[_Reports(watcher), _KeepsLast(), EventFiles(params_of), JsonLoggerCallback()],
            # Tune asks a pooled trial for its checkpoints; the others bring them.
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=int(pooled)),
            failure_config=tune.FailureConfig(max_failures=DEATHS),
            verbose=0,
        ),
    )
    try:
        tuner.fit()
    except TuneError as error:
        # What a callback of Tune's raises is the context of this one, which has its traceback as text.
        raise error.__context__ or error from None
    watcher.on_tick()


def _create_trainable(shared: SharedData, resources: ResourcesConfig, pooled: bool) -> Any:
    """What Tune runs for each trial, with what Ray sets aside for it."""
    trainable = PooledTrial if pooled else run_trial
    amounts: Any = dict(trial_resources(resources))
    if pooled:
        amounts = tune.PlacementGroupFactory([{"CPU": 0.0}, *[worker_resources(resources)] * resources.workers])
    return tune.with_resources(tune.with_parameters(trainable, data=shared, resources=resources), amounts)
