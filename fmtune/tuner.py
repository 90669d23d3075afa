"""Ray Tune at work for fmtune: the searcher, the schedulers, the stopper, and one call that runs trials."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Protocol, cast

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.integration.ray_train import CHECKPOINT_PATH_KEY
from ray.tune.logger import JsonLoggerCallback
from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from fmtune.config import ResourcesConfig, Scalar, TrialConfig, flatten
from fmtune.failures import DEATHS, EndsErrors, InOrder, find_cause, is_error_of_training
from fmtune.objectives import Objectives, rank_fronts
from fmtune.pool import PooledTrial
from fmtune.population import Adoption, Population
from fmtune.room import count_slots
from fmtune.run import TrialRecord
from fmtune.space import Space
from fmtune.study import STUDY, RunTrials, tell
from fmtune.tensorboard import EventFiles
from fmtune.training import EpochMetrics
from fmtune.trial import SharedData, Task, create_task, derive_seed, run_trial, trial_resources, worker_resources

_SAMPLER = 1_000_000_000
"""Stands for the sampler where trials have their number, in the derivation of seeds."""
_STARTUP_TRIALS = 8
"""Random trials before a sampler models what it has seen."""
_REDUCTION = 3
"""ASHA lets one in this many trials go on at each rung, and its rungs are as many times apart."""
_FIRST_RUNG_SHARE = 1 / 3
"""Part of the time that all trials of a search together spend on getting to a first rung of seconds."""
_MEDIAN_MIN_TRIALS = 3
"""Trials of a given epoch that the median rule wants to have seen."""


class Watcher(Protocol):
    """What is told of the trials as they run."""

    def on_start(self, task: Task) -> None: ...

    def on_epoch(self, task: Task, metrics: EpochMetrics) -> None: ...

    def on_checkpoint(self, task: Task, folder: str) -> None: ...

    def on_end(self, task: Task, cause: str | None) -> None: ...

    def on_tick(self) -> None: ...


class _NotStored:
    """Tune pickles all that it is given, for a restore that fmtune has no use for; these go as an empty object."""

    def __reduce__(self) -> tuple[type[object], tuple[()]]:
        return object, ()


class StudySearch(_NotStored, OptunaSearch):
    """Ray's OptunaSearch over a `Space`: trial 0 is the baseline, interrupted trials come before fresh ones.

    `has_time` is asked before each trial, and ends the search without ending those in flight. `cost` of a training
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
        plan = space.planned(_STARTUP_TRIALS, cost, seed)
        # A search that goes on must not draw again what it has drawn.
        sampler = create_sampler(space, derive_seed(seed, _SAMPLER, started))
        super().__init__(
            space=space.suggest,
            metric=objectives.names if objectives else space.search.metric,
            mode=list(space.search.modes) if objectives else space.search.mode,
            sampler=Planned(plan, own.number_of, sampler),
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
        """Tune's configuration of the next trial, or its word for no more where no time is left for one."""
        if not self._has_time():
            # Ray's type of the method leaves out the marker that its documentation asks for.
            return Searcher.FINISHED  # type: ignore[return-value]
        task = self._next_task()
        if task is None:
            return None if self._running else Searcher.FINISHED  # type: ignore[return-value]
        self._ot_trials[trial_id] = self._trial_of(task.trial_number)
        self._tasks[trial_id] = self._running[trial_id] = task
        return task.as_dict()

    def _trial_of(self, number: int) -> optuna.Trial:
        """The study's side of a trial of the run; only that of an earlier attempt is looked for among all trials."""
        if number not in self._asked:
            stored = self.study.get_trials(deepcopy=False)[self._own.study_number(number)]
            self._asked[number] = optuna.trial.Trial(self.study, stored._trial_id)
        return self._asked[number]

    def _next_task(self) -> Task | None:
        """What is to be trained next; None if that depends on what is being trained, or there is nothing more."""
        return self._interrupted.pop(0) if self._interrupted else self._create_task(self.study.ask())

    def _create_task(self, asked: optuna.Trial) -> Task:
        space, number = self._searched, self._own.add(asked)
        self._asked[number] = asked
        if number == 0 and not space.is_single:
            asked.set_user_attr("baseline", True)
        config = space.baseline if number == 0 else space.trial_config(space.suggest(asked))
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
        tell(self._searched, self.study, asked.number, values, is_done=is_done, is_baseline=task.number == 0)

    def _report(self, trial_id: str, result: dict[str, Any]) -> None:
        # Optuna has no place for the values in between of several objectives.
        if self._objectives is None and self._reported.get(trial_id) != result["epoch"]:
            self._ot_trials[trial_id].report(result[self.metric], result["epoch"])
            self._reported[trial_id] = result["epoch"]

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a run is resumed from its study and its history, not from pickled objects."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a run is resumed from its study and its history")


class PopulationSearch(StudySearch):
    """Proposes the trainings of a population part by part: new members first, then whoever has trained least.

    Args:
        population: says how far a part goes, and what a member takes over before it.
        records: the trials by number.
        task_of: makes the task of a trial, from its last checkpoint on.
        on_adoption: enters into a trial's record what it takes over.
        options: those of `StudySearch`.
    """

    def __init__(
        self,
        population: Population,
        records: Mapping[int, TrialRecord],
        task_of: Callable[[TrialRecord], Task],
        on_adoption: Callable[[TrialRecord, Adoption], None],
        **options: Any,
    ) -> None:
        super().__init__(interrupted=[], **options)
        self._population, self._records = population, records
        self._task_of, self._on_adoption = task_of, on_adoption

    def _next_task(self) -> Task | None:
        busy = {task.number for task in self._running.values()}
        waiting = [r for r in self._records.values() if r.state == "running" and r.number not in busy]
        if any(record.number == 0 for record in waiting):
            return self._task_of(self._records[0])
        if len(self._own) < self._searched.trials:
            task = self._create_task(self.study.ask())
            return task if task.number == 0 else self._cut(task, TrialRecord(task.trial_number, task.config, {}))
        if not waiting:
            return None
        record = min(waiting, key=lambda record: (len(record.history), record.number))
        members = [other for other in self._records.values() if other.number != 0]
        if (adoption := self._population.judge(record, members)) is not None:
            self._on_adoption(record, adoption)
        return self._cut(self._task_of(record), record)

    def _cut(self, task: Task, record: TrialRecord) -> Task:
        """A task as far as its next part goes, under a name of its own."""
        stop = self._population.next_stop(record)
        return replace(task, name=f"{task.name}-{stop:03d}", until=stop)


class TaskRounds(_NotStored, Searcher):
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


def create_sampler(space: Space, seed: int) -> optuna.samplers.BaseSampler:
    """Optuna's sampler by the name in `search.sampler`.

    A grid is planned beforehand, so that its sampler is never asked.
    """
    match space.search.sampler:
        case "tpe":
            return optuna.samplers.TPESampler(
                seed=seed, multivariate=True, group=True, constant_liar=True, n_startup_trials=_STARTUP_TRIALS,
                warn_independent_sampling=False,
            )  # fmt: skip
        case "cmaes":
            return optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
        case "gp":
            return optuna.samplers.GPSampler(seed=seed)
        case _:
            return optuna.samplers.RandomSampler(seed=seed)


class Planned(optuna.samplers.BaseSampler):
    """Gives some trials values that are set beforehand, and asks another sampler for all else.

    Optuna's own means, a queue of trials and a grid sampler, want the first trial and a study that optimises itself.

    Args:
        plan: values by the run's number of a trial.
        number_of: that number.
        other: the other sampler.
    """

    def __init__(
        self,
        plan: Mapping[int, Mapping[str, Scalar]],
        number_of: Callable[[FrozenTrial], int],
        other: optuna.samplers.BaseSampler,
    ) -> None:
        self._plan, self._number_of, self._other = plan, number_of, other

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        is_planned = self._number_of(trial) in self._plan
        return {} if is_planned else self._other.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        is_planned = self._number_of(trial) in self._plan
        return {} if is_planned else self._other.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        planned = self._plan.get(self._number_of(trial), {})
        if param_name in planned:
            return planned[param_name]
        return self._other.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._other.before_trial(study, trial)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: optuna.trial.TrialState, values: Sequence[float] | None
    ) -> None:
        self._other.after_trial(study, trial, state, values)


class _SparesBaseline(_NotStored, EndsErrors):
    """Lets trial 0 run to its end: it is what the others are compared with."""

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        if trial.config["number"] == 0:
            return str(TrialScheduler.CONTINUE)
        return str(super().on_trial_result(tune_controller, trial, result))

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        if trial.config["number"] != 0:
            super().on_trial_complete(tune_controller, trial, result)


class Asha(_SparesBaseline, ASHAScheduler):
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

    def replay(self, record: TrialRecord, metric: str) -> None:
        """Enter the epochs of an earlier trial into the rungs, as if it had run here."""
        if record.number == 0:
            return
        sign = 1 if self._mode == "max" else -1
        stand_in = Trial("replayed", trial_id=f"replayed-{record.number}", stub=True)
        for metrics in record.history:
            value = metrics.as_dict()[metric]
            if value is not None:
                reached: Any = metrics.as_dict()[self._time_attr]
                self._bracket_of(record.number).on_result(stand_in, reached, sign * value)


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

    def replay(self, record: TrialRecord, metric: str) -> None:
        for metrics in record.history if record.number != 0 else ():
            self._enter(record.number, record.config, metrics.as_dict())

    def _enter(self, number: int, config: TrialConfig, metrics: Mapping[str, Any]) -> bool:
        """Enter what a trial has come to into the rung that it has reached; whether it may go on."""
        for milestone, recorded in self._bracket_of(number)._rungs:
            if metrics[self._time_attr] < milestone or number in recorded:
                continue
            recorded[number] = self._objectives.gains(config, metrics)
            fronts = rank_fronts(np.array(list(recorded.values())))
            return bool((fronts < fronts[-1]).mean() < 1 - 1 / self._reduction_factor)
        return True


class MedianRule(_SparesBaseline, MedianStoppingRule):
    """Stops trials below the median of the others' running averages (Golovin et al., 2017, Google Vizier)."""

    def _on_insufficient_samples(self, tune_controller: Any, trial: Trial, time: float) -> str:
        # Ray pauses such a trial for another's sake, and its function would begin from its first epoch again.
        return str(TrialScheduler.CONTINUE)


def create_scheduler(
    space: Space, earlier: Sequence[TrialRecord], slots: int, objectives: Objectives | None = None
) -> TrialScheduler:
    """Tune's scheduler by the name in `search.scheduler`, with what earlier trials of a resumed run showed.

    Args:
        space: of the search.
        earlier: trials that have ended.
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
            scheduler = ParetoAsha(objectives, **options) if objectives else Asha(**options)
            for record in earlier:
                scheduler.replay(record, search.metric)
            return scheduler
        case "median":
            return MedianRule(time_attr="epoch", grace_period=1, min_samples_required=_MEDIAN_MIN_TRIALS, **options)
        case _:
            return InOrder()


def _asha_rungs(space: Space, slots: int) -> dict[str, Any]:
    """Where ASHA's first and last rung lie, on epochs or on seconds of training.

    The first one on seconds lies where all trials together spend a share of the time on getting there, and no trial is
    ended by the last: it ends with its last epoch.
    """
    search = space.search
    if search.rung == "epochs":
        return {"time_attr": "epoch", "grace_period": 1, "max_t": max_epochs(space)}
    assert space.time_limit is not None
    first = _FIRST_RUNG_SHARE * space.time_limit * min(1.0, slots / search.trials)
    return {"time_attr": "seconds", "grace_period": first, "max_t": space.time_limit, "stop_last_trials": False}


def max_epochs(space: Space) -> int:
    """Most epochs that a trial of the space can train."""
    searched = space.ranges.get("epochs")
    if searched is None:
        return int(space.fixed["epochs"])  # type: ignore[arg-type]
    return max(int(value) for value in searched.candidates)  # type: ignore[arg-type]


class Until(_NotStored, tune.Stopper):
    """Stops everything once `is_over` says so, and a single trial once `ends_early` does."""

    def __init__(
        self, is_over: Callable[[], bool], ends_early: Callable[[Task, dict[str, Any]], bool] | None = None
    ) -> None:
        self._is_over, self._ends_early = is_over, ends_early

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return self._ends_early is not None and self._ends_early(Task(**result["config"]), result)

    def stop_all(self) -> bool:
        return self._is_over()


class _Reports(_NotStored, tune.Callback):
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


class _KeepsLast(_NotStored, tune.Callback):
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
            # drivers of workers want no room for themselves, so theirs would all start at once.
            max_concurrent_trials=None if can_grow and resources.workers == 1 else count_slots(resources),
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
    tuner.fit()
    watcher.on_tick()


def _create_trainable(shared: SharedData, resources: ResourcesConfig, pooled: bool) -> Any:
    """What Tune runs for each trial, with what Ray sets aside for it."""
    trainable = PooledTrial if pooled else run_trial
    amounts: Any = dict(trial_resources(resources))
    if pooled:
        amounts = tune.PlacementGroupFactory([{"CPU": 0.0}, *[worker_resources(resources)] * resources.workers])
    return tune.with_resources(tune.with_parameters(trainable, data=shared, resources=resources), amounts)
