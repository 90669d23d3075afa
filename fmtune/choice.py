"""From many trials to one model: finalists retrained with fresh seeds, one chosen, and refitted."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from statistics import fmean, variance
from typing import Any, Protocol

from fmtune.board import Board, Flight
from fmtune.checkpoint import create_trained_model, load_weights, read_json, write_json
from fmtune.classifier import TrainedModel
from fmtune.config import FINALIST_ROUNDS, ResourcesConfig
from fmtune.context import RunContext
from fmtune.data import measure_pixels
from fmtune.explore import rank
from fmtune.model import Pixels
from fmtune.objectives import Objectives
from fmtune.room import measure_capacity
from fmtune.run import TrialRecord
from fmtune.seeds import derive_seed
from fmtune.storage import fetch
from fmtune.timing import Timing
from fmtune.training import EpochMetrics
from fmtune.trial import SharedData, Task
from fmtune.tuner import TaskRounds, Until, run_trials

_REFIT = FINALIST_ROUNDS + 1
"""Round of the refit's seed: that after the finalists' last, for round 0 has the seed of the trial itself."""
_CLEAR_ERRORS = 3
"""Standard errors of a lead from which on retraining would not change who leads."""


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


@dataclass(frozen=True)
class _Note:
    """A choice as it is kept: the winner's number, and the refit's checkpoint in Tune's folder if there is one."""

    winner: int
    finalists: Mapping[int, Sequence[EpochMetrics]]
    refit: str | None
    images_trained: int

    @classmethod
    def of_json(cls, content: Mapping[str, Any]) -> _Note:
        """What `dataclasses.asdict` gave, read from JSON."""
        finalists = {
            int(number): [EpochMetrics(**result) for result in results]
            for number, results in content["finalists"].items()
        }
        return cls(content["winner"], finalists, content["refit"], content["images_trained"])


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


class _TaskSource(Protocol):
    """Proposes tasks in rounds, and has what becomes of each by its name."""

    outcomes: dict[str, tuple[Task, _Outcome]]

    def next_round(self) -> Sequence[Task]: ...


class _Single:
    """One task."""

    def __init__(self, task: Task) -> None:
        self.outcome = _Outcome()
        self.outcomes = {task.name: (task, self.outcome)}
        self._waiting = [task]

    def next_round(self) -> Sequence[Task]:
        waiting, self._waiting = self._waiting, []
        return waiting


class _Rounds:
    """The leaders trained from fresh seeds, one seed each a round, until one of them stands out.

    Args:
        leaders: the trials to retrain.
        create_task: makes a leader's task of a round, counted from 1, under a name.
        timing: whether there is time for one more round.
        board: by which metric they are compared.
    """

    def __init__(
        self,
        leaders: Sequence[TrialRecord],
        create_task: Callable[[TrialRecord, int, str], Task],
        timing: Timing,
        board: Board,
    ) -> None:
        self.outcomes: dict[str, tuple[Task, _Outcome]] = {}
        self._leaders, self._create_task, self._timing, self._board = leaders, create_task, timing, board
        self._rounds = 0

    def next_round(self) -> Sequence[Task]:
        self._rounds += 1
        leaders = [record for record in self._leaders if not self.failures(record)]
        # Who is alone has nobody left to be compared with.
        if len(leaders) < 2 or stands_out([self._values(found) for found in self.results().values()]):
            return []
        if self._rounds > FINALIST_ROUNDS or not self._timing.has_round(leaders, is_first=self._rounds == 1):
            return []
        tasks = [self._create_task(record, self._rounds, _task_name(record, self._rounds)) for record in leaders]
        self.outcomes |= {task.name: (task, _Outcome()) for task in tasks}
        return tasks

    def failures(self, leader: TrialRecord) -> list[str]:
        """What a leader's trainings have died of; such a one is out."""
        return [outcome.cause for outcome in self._outcomes_of(leader) if outcome.cause]

    def results(self) -> dict[int, list[EpochMetrics]]:
        """The last epoch of each seed by trial number, of the rounds that all that are not out got through."""
        ends = {r.number: self._ends_of(r) for r in self._leaders if not self.failures(r)}
        found: dict[int, list[EpochMetrics]] = {}
        for of_round in zip(*ends.values(), strict=False):
            # Means over unequal numbers of seeds, of rounds that the time cut short, would not compare.
            whole = [end for end in of_round if end is not None]
            if len(whole) == len(ends):
                for number, end in zip(ends, whole, strict=True):
                    found.setdefault(number, []).append(end)
        return found

    def _outcomes_of(self, leader: TrialRecord) -> list[_Outcome]:
        """Of a leader's trainings, round by round."""
        names = (_task_name(leader, number) for number in range(1, self._rounds + 1))
        return [self.outcomes[name][1] for name in names if name in self.outcomes]

    def _ends_of(self, leader: TrialRecord) -> list[EpochMetrics | None]:
        """The last epoch of each, None where it did not get there."""
        histories = (outcome.history for outcome in self._outcomes_of(leader))
        return [history[-1] if len(history) == leader.config.epochs else None for history in histories]

    def _values(self, results: Sequence[EpochMetrics]) -> list[float]:
        values = [result.as_dict()[self._board.metric] or 0.0 for result in results]
        return values if self._board.larger else [-value for value in values]


def _task_name(leader: TrialRecord, round_: int) -> str:
    return f"finalist-{leader.number:05d}-{round_}"


def stands_out(values: Sequence[Sequence[float]]) -> bool:
    """Whether the best mean is ahead of the next by more than the standard error of their difference.

    Args:
        values: of each candidate from as many seeds; more is better. With fewer than two seeds none stands out.
    """
    if len(values) < 2 or len(values[0]) < 2:
        return False
    first, second = sorted(values, key=fmean, reverse=True)[:2]
    error = math.sqrt((variance(first) + variance(second)) / len(first))
    return fmean(first) - fmean(second) > error


class Chooser:
    """Arrives at a `Choice` within the time that is left."""

    def __init__(self, context: RunContext, timing: Timing, refit_resources: ResourcesConfig) -> None:
        self._context, self._timing, self._refit_resources = context, timing, refit_resources
        self._images_trained = 0

    def choose(self) -> Choice:
        """Retrain the leaders, pick one, refit it; what an earlier attempt chose among the same trials stands.

        There must be a trial with a result.
        """
        noted = self._read_note()
        if noted is None:
            noted = self._choose_anew()
            write_json(self._context.folder.choice, {"asked": self._asked()} | asdict(noted))
        winner = self._context.board.records[noted.winner]
        return Choice(
            winner=winner,
            model=self._refitted_model(winner, noted.refit) if noted.refit else load_trial_model(self._context, winner),
            is_refit=noted.refit is not None,
            finalists=noted.finalists,
            images_trained=noted.images_trained,
        )

    def _choose_anew(self) -> _Note:
        board = self._context.board
        ranked = rank(list(board.records.values()), board.metric, board.larger)
        finalists: Mapping[int, Sequence[EpochMetrics]] = {}
        if self._context.objectives is None:
            if (rounds := self._retrain_finalists(ranked)) is not None:
                finalists = rounds.results()
                # Where all are out, what they came to at first is the best that there is.
                ranked = [record for record in ranked if not rounds.failures(record)] or ranked
            winner = self._pick(ranked, finalists)
        else:
            winner = self._pick_of_front(self._context.objectives, ranked)
        refit = self._refit(winner)
        checkpoint = self._context.storage.name_of(refit.checkpoint) if refit and refit.checkpoint else None
        return _Note(winner.number, finalists, checkpoint, self._images_trained)

    def _read_note(self) -> _Note | None:
        """An earlier attempt's choice, if it is of the same trials and what is asked for, or no time is left.

        Without time the leader would be taken as it is, in place of a model that was refitted.
        """
        file = self._context.folder.choice
        if not file.exists():
            return None
        content, asked = read_json(file), self._asked()
        noted = _Note.of_json(content)
        is_there = noted.refit is None or not self._context.storage.below(noted.refit).is_empty()
        is_of_same = all(content["asked"][key] == asked[key] for key in ("trials", "epochs"))
        stands = is_there and is_of_same and (content["asked"] == asked or self._timing.search_is_over())
        return noted if stands else None

    def _asked(self) -> dict[str, float | None]:
        """What a choice depends on: the trials, of which there are only ever more, and how the search is to end."""
        records, space = self._context.board.records.values(), self._context.space
        return {
            "trials": len(records),
            "epochs": sum(len(record.history) for record in records),
            "finalists": space.search.retrained,
            "refit": space.search.refit,
            "seconds": space.time_limit,
        }

    def _retrain_finalists(self, ranked: Sequence[TrialRecord]) -> _Rounds | None:
        """The leaders trained from fresh seeds; None where this is skipped."""
        context, search = self._context, self._context.space.search
        leaders = [record for record in ranked if record.state == "complete"][: search.retrained]
        if len(leaders) < 2:
            return None
        if lead := self._clear_lead(leaders):
            context.view.note(f"trial {leaders[0].number} leads by {lead}; it is taken without retraining finalists")
            return None
        if not self._timing.rounds_are_worth_it(leaders):
            context.view.note(
                "retraining the finalists would take more than it is worth in so short a time; it is skipped"
            )
            return None
        if not self._timing.has_round(leaders, is_first=True):
            context.view.note("no time is left to retrain the finalists; the leader is taken as it is")
            return None
        context.board.phase = f"retraining {len(leaders)} finalists"
        rounds = _Rounds(leaders, self._fresh_task, self._timing, context.board)
        self._run(rounds, context.shared, context.space.resources, "finalists", FINALIST_ROUNDS * len(leaders), leaders)
        for record in leaders:
            for cause in rounds.failures(record):
                context.view.note(f"trial {record.number} failed from a fresh seed, and is out: {cause}")
        return rounds

    def _clear_lead(self, leaders: Sequence[TrialRecord]) -> str | None:
        """The leader's lead in words where chance in the validation rows does not explain it, else None."""
        if self._context.board.metric != "val_accuracy":
            return None
        first, second = (self._context.board.value(record) or 0.0 for record in leaders[:2])
        # Of a difference between two accuracies on so many images (binomial).
        error = math.sqrt((first * (1 - first) + second * (1 - second)) / len(self._context.data.validation_rows))
        if first - second <= _CLEAR_ERRORS * error:
            return None
        return f"{100 * (first - second):.2f} points, more than {_CLEAR_ERRORS} standard errors of {100 * error:.2f}"

    def _pick(self, ranked: Sequence[TrialRecord], finalists: Mapping[int, Sequence[EpochMetrics]]) -> TrialRecord:
        """The finalist with the best mean, or the leader where no retraining came to an end."""
        if not finalists:
            return ranked[0]
        sign = 1 if self._context.board.larger else -1
        return self._context.board.records[
            max(finalists, key=lambda number: sign * mean_of(finalists[number], self._context.board.metric))
        ]

    def _pick_of_front(self, objectives: Objectives, ranked: Sequence[TrialRecord]) -> TrialRecord:
        """The trial of the Pareto front whose accuracy is near enough to the best."""
        front = objectives.find_front(ranked)
        winner = objectives.pick(front, len(self._context.data.validation_rows))
        others = f"{len(front)} trials are" if len(front) > 1 else "one trial is"
        self._context.view.note(
            f"{others} on the Pareto front; trial {winner.number} is taken, the best in {objectives.names[1]} within a "
            "standard error of the best val_accuracy"
        )
        return winner

    def _refit(self, winner: TrialRecord) -> _Outcome | None:
        """The winner trained on training and validation rows together; None where that is skipped or fails."""
        context = self._context
        if not context.space.search.refit:
            return None
        if self._timing.is_late(reserve=self._timing.refit_seconds([winner])):
            context.view.note("no time is left to refit on all rows; the winner's own weights are taken")
            return None
        context.board.phase = "refitting on all rows"
        shared = replace(context.shared, pixels=self._all_pixels)
        task = replace(self._fresh_task(winner, _REFIT, "refit"), rows="all")
        single = _Single(task)
        self._run(single, shared, self._refit_resources, "refit", 1)
        outcome = single.outcome
        if outcome.checkpoint is None or len(outcome.history) < winner.config.epochs:
            reason = outcome.cause or "out of time"
            context.view.note(f"the refit did not finish ({reason}); the winner's own weights are taken")
            return None
        return outcome

    def _run(
        self,
        rounds: _TaskSource,
        shared: SharedData,
        resources: ResourcesConfig,
        phase: str,
        most: int,
        leaders_to_refit: Sequence[TrialRecord] = (),
    ) -> None:
        """Run the tasks of all rounds, or until only the refit and the closing have time left."""
        collector = _Collector(rounds, self._timing, self._context)
        reserve = self._timing.refit_seconds(leaders_to_refit)
        self._context.board.capacity = measure_capacity(resources)
        run_trials(
            shared,
            resources,
            TaskRounds(rounds.next_round),
            most,
            name=self._context.experiment_name(phase),
            storage=self._context.storage.place,
            watcher=collector,
            params_of=self._context.space.params_of,
            until=Until(lambda: self._timing.is_late(reserve)),
            can_grow=self._context.can_grow,
        )
        self._context.board.in_flight.clear()
        for task, outcome in rounds.outcomes.values():
            rows = len(self._context.data.images) if task.rows == "all" else None
            self._images_trained += self._context.images_trained(task.config, len(outcome.history), rows)

    def _fresh_task(self, record: TrialRecord, round_: int, name: str) -> Task:
        seed = derive_seed(self._context.space.search.seed, record.number, round_)
        return replace(self._context.task_of(record), name=name, seed=seed, number=None, resume_from=None)

    @cached_property
    def _all_pixels(self) -> Pixels:
        """Of training and validation rows together; of a stream that is a pass over all images."""
        return measure_pixels(self._context.data.images, self._context.space.data.resize)

    def _refitted_model(self, winner: TrialRecord, checkpoint: str) -> TrainedModel:
        data = self._context.data
        with fetch(self._context.storage.below(checkpoint).place) as folder:
            weights = load_weights(folder)
        return create_trained_model(winner.config, self._all_pixels, data.classes, data.image_shape, weights)


class _Collector:
    """Keeps what becomes of tasks outside the search."""

    def __init__(self, rounds: _TaskSource, timing: Timing, context: RunContext) -> None:
        self._rounds, self._timing, self._context, self._board = rounds, timing, context, context.board

    def on_start(self, task: Task) -> None:
        self._board.in_flight[task.name] = Flight(task.name, task.config.epochs)

    def on_epoch(self, task: Task, metrics: EpochMetrics) -> None:
        outcome = self._outcome(task)
        # A trial whose node died repeats the epoch whose checkpoint was not yet written.
        outcome.history = [*(earlier for earlier in outcome.history if earlier.epoch < metrics.epoch), metrics]
        self._board.in_flight[task.name].last = metrics
        self._context.view.refresh()

    def on_checkpoint(self, task: Task, folder: str) -> None:
        self._outcome(task).checkpoint = self._context.storage.place_of(folder)

    def on_end(self, task: Task, cause: str | None) -> None:
        self._outcome(task).cause = cause
        # One whose process can't be started ends without a start.
        self._board.in_flight.pop(task.name, None)
        if cause:
            self._context.view.note(f"{task.name} failed: {cause}")

    def on_tick(self) -> None:
        self._context.check_interrupt()
        self._timing.save_clock()

    def _outcome(self, task: Task) -> _Outcome:
        _, outcome = self._rounds.outcomes[task.name]
        return outcome


def load_trial_model(context: RunContext, record: TrialRecord) -> TrainedModel:
    """The weights that a trial of the search ended with."""
    assert record.checkpoint is not None
    data = context.data
    with fetch(record.checkpoint) as folder:
        weights = load_weights(folder)
    return create_trained_model(record.config, data.pixels, data.classes, data.image_shape, weights)
