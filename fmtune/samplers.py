"""Optuna's samplers at work for fmtune: which values a trial is given."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from fmtune.config import Scalar
from fmtune.space import Space

PartOf = Callable[[optuna.Study], optuna.Study]
"""What of a study a sampler is to see."""
STARTUP_TRIALS = 8
"""Random trials before a sampler models what it has seen."""
_PRIOR_TRIALS = 5.0
"""Trials that TPE's even prior weighs as much as: with one, its default, a search keeps to what its first trials found,
and random draws do better (`benchmarks/README.md`)."""
_MODELLED = 300
"""Trials that TPE models, and with them those that have come since they were chosen."""
_MODELLED_BEST = 100
"""Those of them that are the best ones; TPE itself counts 25 as good."""
_CHOSEN_EVERY = 100
"""Trials after which those to model are chosen anew."""


def create_sampler(
    space: Space, seed: int, plan: Mapping[int, Mapping[str, Scalar]], number_of: Callable[[FrozenTrial], int]
) -> Planned:
    """Optuna's sampler by the name in `search.sampler`, with values that are set beforehand.

    A grid is planned whole, so that its sampler is never asked.

    Args:
        space: of the search.
        seed: of the sampler.
        plan: values by the run's number of a trial.
        number_of: that number.
    """
    part_of: PartOf
    match space.search.sampler:
        case "tpe":
            other: optuna.samplers.BaseSampler = create_tpe(seed)
            part_of = MostTelling()
        case "cmaes":
            other = optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
            part_of = _leave_out_undrawn
        case "gp":
            other = optuna.samplers.GPSampler(seed=seed)
            part_of = _leave_out_undrawn
        case _:
            other = optuna.samplers.RandomSampler(seed=seed)
            part_of = _all_of
    return Planned(plan, number_of, other, part_of)


def create_tpe(seed: int, prior_weight: float = _PRIOR_TRIALS) -> optuna.samplers.TPESampler:
    """TPE (Bergstra et al., 2011; Watanabe, 2023, https://arxiv.org/abs/2304.11127) over all values together."""
    return optuna.samplers.TPESampler(
        seed=seed, multivariate=True, group=True, constant_liar=True, n_startup_trials=STARTUP_TRIALS,
        prior_weight=prior_weight, warn_independent_sampling=False,
    )  # fmt: skip


def _all_of(study: optuna.Study) -> optuna.Study:
    return study


def _leave_out_undrawn(study: optuna.Study) -> optuna.Study:
    """CMA-ES and the Gaussian process search the parameters that all finished trials have in common."""
    return _Excerpt(study, study.get_trials(deepcopy=False))


class MostTelling:
    """The best trials of a study, an even selection of the others by what they came to, and those that came since.

    What it takes TPE to draw a trial grows with those that it models: 1 ms for 100 of them, 95 ms for 10,000 in a space
    of two values. All but the best tell where nothing is to be found, and every tenth of them tells as much. With
    several objectives, where no order says which are best, all trials are modelled.
    """

    def __init__(self) -> None:
        self._chosen: list[int] = []
        self._chosen_of = 0

    def __call__(self, study: optuna.Study) -> optuna.Study:
        trials = study.get_trials(deepcopy=False)
        if len(trials) <= _MODELLED + _CHOSEN_EVERY or len(study.directions) > 1:
            return _Excerpt(study, trials)
        if len(trials) >= self._chosen_of + _CHOSEN_EVERY:
            self._chosen, self._chosen_of = _choose(trials, study.direction), len(trials)
        return _Excerpt(study, [*(trials[i] for i in self._chosen), *trials[self._chosen_of :]])


class _Excerpt(optuna.Study):
    """A study as a sampler sees it that is to see only some of its trials, and none without values.

    The baseline lies outside the ranges and has none: among TPE's few good trials it would take the place of another.
    """

    def __init__(self, study: optuna.Study, trials: Sequence[FrozenTrial]) -> None:
        super().__init__(study.study_name, study._storage, study.sampler, study.pruner)
        self._seen = [trial for trial in trials if trial.params]

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        return [trial for trial in self._seen if states is None or trial.state in states]


def _choose(trials: Sequence[FrozenTrial], direction: StudyDirection) -> list[int]:
    """Numbers of the trials to model, in their order: those that run, the best, and an even selection of the rest."""
    sign = 1 if direction == StudyDirection.MAXIMIZE else -1

    def merit(trial: FrozenTrial) -> tuple[float, float]:
        # As TPE has it: those that were stopped come after all others, and by how far they got.
        step = math.inf if trial.state == TrialState.COMPLETE else trial.last_step or 0
        return step, -math.inf if trial.value is None else sign * trial.value

    ended = [trial for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    ended.sort(key=merit, reverse=True)
    rest = ended[_MODELLED_BEST:]
    chosen = ended[:_MODELLED_BEST] + rest[:: max(1, math.ceil(len(rest) / (_MODELLED - _MODELLED_BEST)))]
    chosen += [trial for trial in trials if trial.state == TrialState.RUNNING]
    return sorted(trial.number for trial in chosen)


class Planned(optuna.samplers.BaseSampler):
    """Gives some trials values that are set beforehand, and asks another sampler for all else.

    Optuna's own means, a queue of trials and a grid sampler, want the first trial and a study that optimises itself.

    Args:
        plan: values by the run's number of a trial.
        number_of: that number.
        other: the other sampler.
        part_of: what the other sampler sees of the study.
    """

    def __init__(
        self,
        plan: Mapping[int, Mapping[str, Scalar]],
        number_of: Callable[[FrozenTrial], int],
        other: optuna.samplers.BaseSampler,
        part_of: PartOf,
    ) -> None:
        self._plan, self._number_of, self._other, self._part_of = plan, number_of, other, part_of

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        if self._number_of(trial) in self._plan:
            return {}
        return self._other.infer_relative_search_space(self._part_of(study), trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if self._number_of(trial) in self._plan:
            return {}
        return self._other.sample_relative(self._part_of(study), trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        planned = self._plan.get(self._number_of(trial), {})
        if param_name in planned:
            return planned[param_name]
        return self._other.sample_independent(self._part_of(study), trial, param_name, param_distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._other.before_trial(study, trial)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: optuna.trial.TrialState, values: Sequence[float] | None
    ) -> None:
        self._other.after_trial(study, trial, state, values)
