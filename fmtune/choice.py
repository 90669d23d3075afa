"""From many trials to one model: finalists retrained with fresh seeds, one chosen, and refitted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

from fmtune.checkpoint import TrainedModel, create_trained_model, load_weights
from fmtune.config import ResourcesConfig
from fmtune.context import RunContext
from fmtune.data import measure_pixels
from fmtune.explore import rank
from fmtune.model import Pixels
from fmtune.run import TrialRecord
from fmtune.timing import Timing
from fmtune.training import EpochMetrics
from fmtune.trial import SharedData, Task, derive_seed
from fmtune.tuner import TaskList, Until, run_trials, whole_machine

_REFIT = 0
"""Round of the refit's seed; the finalists' rounds count from 1."""


@dataclass(frozen=True)
class Choice:
    """The trial that won, and the model that comes of it.

    Attributes:
        winner: the trial of the search.
        model: its own weights, or those of the refit.
        is_refit: whether the model has seen the validation rows too.
        finalists: the last epoch from each fresh seed, by trial number; empty without a retraining.
        images_trained: by finalists and refit.
    """

    winner: TrialRecord
    model: TrainedModel
    is_refit: bool
    finalists: Mapping[int, Sequence[EpochMetrics]]
    images_trained: int


@dataclass
class _Outcome:
    """What became of a task outside the search."""

    history: list[EpochMetrics] = field(default_factory=list)
    checkpoint: str | None = None
    cause: str | None = None


def mean_of(results: Sequence[EpochMetrics], metric: str) -> float:
    """Mean of a metric over the last epochs of several seeds."""
    values = [result.as_dict()[metric] for result in results]
    return fmean(value for value in values if value is not None)


class Chooser:
    """Arrives at a `Choice` within the time that is left."""

    def __init__(self, context: RunContext, timing: Timing, is_local: bool) -> None:
        self._context, self._timing, self._is_local = context, timing, is_local
        self._images_trained = 0

    def choose(self) -> Choice:
        """Retrain the leaders, pick one, refit it.

        There must be a trial with a result.
        """
        board = self._context.board
        ranked = rank(list(board.records.values()), board.metric, board.larger)
        finalists = self._retrain_finalists(ranked)
        winner = self._pick(ranked, finalists)
        refit = self._refit(winner)
        return Choice(
            winner=winner,
            model=self._refitted_model(winner, refit) if refit else load_trial_model(self._context, winner),
            is_refit=refit is not None,
            finalists=finalists,
            images_trained=self._images_trained,
        )

    def _retrain_finalists(self, ranked: Sequence[TrialRecord]) -> dict[int, list[EpochMetrics]]:
        """What the leaders reach from fresh seeds, by trial number; empty where this is skipped or not finished."""
        context, search = self._context, self._context.space.search
        leaders = [record for record in ranked if record.state == "complete"][: search.finalists]
        if len(leaders) < 2:
            return {}
        rounds = self._timing.finalist_rounds(leaders)
        if rounds == 0:
            context.view.note("no time is left to retrain the finalists; the leader is taken as it is")
            return {}
        context.board.phase = f"retraining {len(leaders)} finalists"
        tasks = [
            self._fresh_task(record, round_, f"finalist-{record.number:05d}-{round_}")
            for round_ in range(1, rounds + 1)
            for record in leaders
        ]
        outcomes = self._run(tasks, context.shared, context.space.resources, "finalists", leaders)
        results: dict[int, list[EpochMetrics]] = {record.number: [] for record in leaders}
        for record, task in zip(leaders * rounds, tasks, strict=True):
            history = outcomes[task.name].history
            if len(history) == record.config.epochs:
                results[record.number].append(history[-1])
        # Means over unequal numbers of seeds, of rounds that the time cut short, would not compare.
        complete = min(map(len, results.values()))
        return {number: found[:complete] for number, found in results.items()} if complete else {}

    def _pick(self, ranked: Sequence[TrialRecord], finalists: Mapping[int, Sequence[EpochMetrics]]) -> TrialRecord:
        """The finalist with the best mean, or the leader where there was no retraining."""
        if not finalists:
            return ranked[0]
        sign = 1 if self._context.board.larger else -1
        return self._context.board.records[
            max(finalists, key=lambda number: sign * mean_of(finalists[number], self._context.board.metric))
        ]

    def _refit(self, winner: TrialRecord) -> _Outcome | None:
        """The winner trained on training and validation rows together; None where that is skipped or fails."""
        context = self._context
        if not context.space.search.refit:
            return None
        if self._timing.is_late(reserve=self._timing.refit_seconds([winner])):
            context.view.note("no time is left to refit on all rows; the winner's own weights are taken")
            return None
        context.board.phase = "refitting on all rows"
        # Nothing else runs now, so the one training gets the whole machine.
        alone = self._is_local and context.space.resources.workers == 1
        resources = whole_machine(context.space.resources) if alone else context.space.resources
        shared = replace(context.shared, pixels=self._all_pixels())
        task = replace(self._fresh_task(winner, _REFIT, "refit"), rows="all")
        outcome = self._run([task], shared, resources, "refit")[task.name]
        if outcome.checkpoint is None or len(outcome.history) < winner.config.epochs:
            reason = outcome.cause or "out of time"
            context.view.note(f"the refit did not finish ({reason}); the winner's own weights are taken")
            return None
        return outcome

    def _run(
        self,
        tasks: Sequence[Task],
        shared: SharedData,
        resources: ResourcesConfig,
        phase: str,
        leaders_to_refit: Sequence[TrialRecord] = (),
    ) -> dict[str, _Outcome]:
        """Run tasks to their end, or until only the refit and the closing have time left."""
        collector = _Collector(tasks, self._timing, self._context)
        reserve = self._timing.refit_seconds(leaders_to_refit)
        run_trials(
            shared,
            resources,
            TaskList(tasks),
            len(tasks),
            name=self._context.experiment_name(phase),
            storage=str(self._context.storage),
            watcher=collector,
            until=Until(lambda: self._timing.is_late(reserve)),
        )
        for task in tasks:
            rows = len(self._context.data.images) if task.rows == "all" else None
            epochs = len(collector.outcomes[task.name].history)
            self._images_trained += self._context.images_trained(task.config, epochs, rows)
        return collector.outcomes

    def _fresh_task(self, record: TrialRecord, round_: int, name: str) -> Task:
        seed = derive_seed(self._context.space.search.seed, record.number, round_)
        return replace(self._context.task_of(record), name=name, seed=seed, number=None, resume_from=None)

    def _all_pixels(self) -> Pixels:
        return measure_pixels(self._context.data.images, self._context.space.data.resize)

    def _refitted_model(self, winner: TrialRecord, refit: _Outcome) -> TrainedModel:
        assert refit.checkpoint is not None
        data = self._context.data
        weights = load_weights(Path(refit.checkpoint))
        return create_trained_model(winner.config, self._all_pixels(), data.classes, data.image_shape, weights)


class _Collector:
    """Keeps what becomes of tasks outside the search."""

    def __init__(self, tasks: Sequence[Task], timing: Timing, context: RunContext) -> None:
        self.outcomes = {task.name: _Outcome() for task in tasks}
        self._timing, self._context = timing, context

    def on_start(self, task: Task) -> None:
        pass

    def on_epoch(self, task: Task, metrics: EpochMetrics) -> None:
        self.outcomes[task.name].history.append(metrics)
        self._context.view.refresh()

    def on_checkpoint(self, task: Task, folder: str) -> None:
        self.outcomes[task.name].checkpoint = folder

    def on_end(self, task: Task, cause: str | None) -> None:
        self.outcomes[task.name].cause = cause
        if cause:
            self._context.view.note(f"{task.name} failed: {cause}")

    def on_tick(self) -> None:
        self._context.check_interrupt()
        self._timing.save_clock()


def load_trial_model(context: RunContext, record: TrialRecord) -> TrainedModel:
    """The weights that a trial of the search ended with."""
    assert record.checkpoint is not None
    data = context.data
    weights = load_weights(Path(record.checkpoint))
    return create_trained_model(record.config, data.pixels, data.classes, data.image_shape, weights)
