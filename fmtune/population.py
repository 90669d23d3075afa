"""Population-based training (Jaderberg et al., 2017, https://arxiv.org/abs/1711.09846)."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from pydantic import ValidationError

from fmtune.config import MUTABLE, Scalar, TrialConfig
from fmtune.run import TrialRecord
from fmtune.space import Space

_SEGMENTS = 5
"""Parts of a training after each of which a member is compared with the others."""
_QUANTILE = 5
"""One in so many members is behind, and as many lead."""


@dataclass(frozen=True)
class Adoption:
    """A member takes over the weights of another, and its configuration a little changed."""

    donor: TrialRecord
    config: TrialConfig


class Population:
    """What becomes of the members of a population after each part of their training.

    Args:
        space: of the search.
        value_at: of a member after an epoch; more is better.
        random_of: random numbers for a member at an epoch.
    """

    def __init__(
        self,
        space: Space,
        value_at: Callable[[TrialRecord, int], float],
        random_of: Callable[[int, int], Random],
    ) -> None:
        self._space, self._value_at, self._random_of = space, value_at, random_of

    def next_stop(self, record: TrialRecord) -> int:
        """The epoch after which a member is to be compared next."""
        epochs = record.config.epochs
        return min(epochs, len(record.history) + _part(epochs))

    def pick(self, waiting: Sequence[TrialRecord], is_time_for_all: bool) -> TrialRecord:
        """Who trains next: who has trained least, so that members are compared at equal epochs.

        Without time for all it is who has trained most: some are to come to their ends.
        """
        sign = 1 if is_time_for_all else -1
        return min(waiting, key=lambda record: (sign * len(record.history), record.number))

    def judge(self, record: TrialRecord, members: Sequence[TrialRecord], busy: Collection[int] = ()) -> Adoption | None:
        """What a member is to take over before it goes on, None where it goes on as it is.

        Members are compared at the epoch that this one has reached; those that lead must have got as far, and have
        some way to go. From those that are `busy` training nothing is taken: their checkpoints go with the next epoch.
        """
        epoch = len(record.history)
        reached = [m for m in members if m.state != "failed" and len(m.history) >= epoch > 0]
        ranked = sorted(reached, key=lambda member: self._value_at(member, epoch))
        count = len(ranked) // _QUANTILE
        if count == 0 or record not in ranked[:count]:
            return None
        resting = [m for m in ranked[-count:] if m.checkpoint and m.number not in busy]
        leaders = [m for m in resting if len(m.history) < m.config.epochs]
        if not leaders:
            return None
        random = self._random_of(record.number, epoch)
        donor = random.choice(leaders)
        return Adoption(donor, self._change(donor, random))

    def _change(self, donor: TrialRecord, random: Random) -> TrialConfig:
        params = self._space.params_of(donor.config)
        moved = {key: self._space.ranges[key].move(value, random) for key, value in params.items() if key in MUTABLE}
        try:
            return self._space.trial_config({**params, **moved})
        except ValidationError:  # two values that do not go together
            return donor.config


def _part(epochs: int) -> int:
    """Epochs of a part of a training."""
    return max(1, round(epochs / _SEGMENTS))


def count_segments(space: Space, epochs: int) -> int:
    """Parts of all trainings of up to so many epochs together, the baseline's one included, at most."""
    # Seven epochs have more parts than eight.
    return 1 + (space.trials - 1) * max(math.ceil(most / _part(most)) for most in range(1, epochs + 1))


def adopt(record: TrialRecord, adoption: Adoption, params: dict[str, Scalar]) -> None:
    """Have a member take over what it is to; `params` are the searched values of its new configuration."""
    donor = adoption.donor
    record.earlier = [*donor.earlier, (len(donor.history), donor.config)]
    record.config, record.params = adoption.config, params
    record.history, record.checkpoint = list(donor.history), donor.checkpoint


def describe_adoption(record: TrialRecord) -> dict[str, Any]:
    """What a member has taken over last, as JSON has it."""
    return {
        "epoch": record.earlier[-1][0],
        "checkpoint": record.checkpoint,
        "config": record.config.model_dump(mode="json"),
        "earlier": [[last, config.model_dump(mode="json")] for last, config in record.earlier],
    }


def parse_earlier(adopted: Mapping[str, Any]) -> list[tuple[int, TrialConfig]]:
    """The configurations before the last one, of what `describe_adoption` gave."""
    return [(last, TrialConfig.model_validate(config)) for last, config in adopted["earlier"]]
