"""A search space: what is fixed, what is searched, and how a sample becomes a configuration."""

from __future__ import annotations

import io
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML

from fmtune.config import (
    DataConfig,
    LoggingConfig,
    ResourcesConfig,
    Scalar,
    SearchConfig,
    TrialConfig,
    flatten,
    nest,
)
from fmtune.errors import SpaceError
from fmtune.ranges import Range, Suggests
from fmtune.recipes import RECIPES
from fmtune.spacefile import Document, SpaceReader, leaves

_DEFAULTS = flatten(TrialConfig())
_SAMPLES = 64
"""Random samples of a space that are looked at before a search may start."""


@dataclass(frozen=True)
class Space:
    """A search, resolved: every default written out, every range checked.

    Attributes:
        data, search, resources, logging: the sections of the YAML.
        storage: where Tune's own folder and the finished run folder are kept; None leaves both in the run folder.
        baseline: the configuration of trial 0.
        fixed: the trial's values that are not searched, by dotted key, defaults included.
        ranges: those that are, by dotted key, each after the ones that its `when` names.
        is_single: whether this is one training, whose trial 0 is no baseline.
    """

    data: DataConfig
    search: SearchConfig
    resources: ResourcesConfig
    logging: LoggingConfig
    storage: str | None
    baseline: TrialConfig
    fixed: Mapping[str, Scalar]
    ranges: Mapping[str, Range]
    is_single: bool = False

    @classmethod
    def load(
        cls,
        source: str | Path | Mapping[str, Any],
        overrides: Sequence[str] = (),
        runs: Path | None = None,
    ) -> Space:
        """Read a space from a YAML file or a mapping.

        Args:
            source: the file, or its content.
            overrides: `KEY=VALUE` of dotted keys.
            runs: folder of run folders, for starting weights that go by a run's name; None takes each as a path.

        Raises:
            SpaceError: anything in it is wrong; one line for each mistake, with its place.
        """
        document = Document.of_mapping(source) if isinstance(source, Mapping) else Document.of_file(Path(source))
        for override in overrides:
            document.override(override)
        sections = SpaceReader(document, runs).read()
        space = cls(
            data=sections.data,
            search=sections.search,
            resources=sections.resources,
            logging=sections.logging,
            storage=sections.storage,
            baseline=_create_baseline(sections.baseline, sections.fixed, sections.ranges),
            fixed=sections.fixed,
            ranges=_order_by_conditions(sections.ranges),
        )
        space._check_samples(document)
        return space

    def as_single_training(self) -> Space:
        """The one training that a space without ranges describes: trial 0, trained once on the training rows."""
        search = self.search.model_copy(update={"trials": 1, "scheduler": "none", "finalists": 0, "refit": False})
        return replace(self, search=search, baseline=self.trial_config({}), is_single=True)

    def params_of(self, config: TrialConfig) -> dict[str, Scalar]:
        """The values that a configuration has for the ranges whose conditions hold in it."""
        values = flatten(config)
        return {key: values[key] for key, searched in self.ranges.items() if self._is_active(searched, values)}

    def suggest(self, trial: Suggests) -> dict[str, Scalar]:
        """Draw the ranges whose conditions hold, by dotted key."""
        drawn: dict[str, Scalar] = {}
        for key, searched in self.ranges.items():
            if self._is_active(searched, drawn):
                drawn[key] = searched.suggest(trial, key)
        return drawn

    def planned(self, startup: int, cost: Callable[[TrialConfig], float], seed: int) -> dict[int, dict[str, Scalar]]:
        """Values that trials are to take before the sampler is asked, by the trial's number and dotted key.

        Args:
            startup: random draws after those of `search.try`, the cheapest first: they soon tell something of the
                space. A grid goes by its own order.
            cost: of a training.
            seed: of the draws.
        """
        if self.search.sampler == "grid":
            # Trials that were interrupted before they began have used up their numbers.
            points = list(islice(self.grid(), 2 * self.search.trials))
        else:
            draws = _LatinHypercube(startup, seed)
            drawn = [self.suggest(draws) for _ in range(startup if self.ranges else 0)]
            points = [dict(leaves(one)) for one in self.search.tries]
            points += sorted(drawn, key=lambda values: cost(self.trial_config(values)))
        # Trial 0 is the baseline and draws nothing.
        return dict(enumerate(points, start=1))

    def grid(self) -> Iterator[dict[str, Scalar]]:
        """All that `suggest` can draw from a space without continuous ranges, by dotted key; there may be millions."""
        points: Iterator[dict[str, Scalar]] = iter([{}])
        for key, searched in self.ranges.items():
            points = self._with_each(points, key, searched)
        return points

    def _with_each(self, points: Iterator[dict[str, Scalar]], key: str, searched: Range) -> Iterator[dict[str, Scalar]]:
        """Each point with each value of one more range, where that applies to it."""
        for point in points:
            if self._is_active(searched, point):
                yield from ({**point, key: value} for value in searched.grid)
            else:
                yield point

    @property
    def time_limit(self) -> float | None:
        """Seconds that the whole run may take, by `search.time` and by what `search.cost` pays for."""
        limits = [self.search.time] if self.search.time is not None else []
        if self.search.cost is not None and self.resources.price is not None:
            limits.append(3600 * self.search.cost / self.resources.price)
        return min(limits, default=None)

    @property
    def max_epochs(self) -> int:
        """Most epochs that a trial of the space can train; the baseline's are its own."""
        return _max_epochs(self.fixed, self.ranges)

    @property
    def trials(self) -> int:
        """Trials to start at most: as many as asked for, and with a grid no more than its points and the baseline."""
        if self.search.sampler != "grid":
            return self.search.trials
        return min(self.search.trials, 1 + sum(1 for _ in islice(self.grid(), self.search.trials)))

    def trial_config(self, drawn: Mapping[str, Scalar]) -> TrialConfig:
        """The configuration that drawn values make; ranges that were not drawn take `TrialConfig`'s defaults."""
        return TrialConfig.model_validate(nest({**self.fixed, **drawn}))

    def to_yaml(self) -> str:
        """The space as YAML that loads to an equal one."""
        trial = {**self.fixed, **{key: searched.as_yaml() for key, searched in self.ranges.items()}}
        content = {
            "data": self.data.model_dump(mode="json"),
            "search": self.search.model_dump(mode="json"),
            "resources": self.resources.model_dump(mode="json"),
            "logging": self.logging.model_dump(mode="json"),
            "storage": self.storage,
            "baseline": self.baseline.model_dump(mode="json"),
            "trial": nest(trial),
        }
        yaml = YAML()
        yaml.default_flow_style = None
        yaml.width = 120
        stream = io.StringIO()
        yaml.dump(content, stream)
        return stream.getvalue()

    def _is_active(self, searched: Range, drawn: Mapping[str, Scalar]) -> bool:
        values = {**_DEFAULTS, **self.fixed, **drawn}
        return all(values[key] in allowed for key, allowed in searched.when.items())

    def samples(self) -> Iterator[TrialConfig]:
        """The baseline and some configurations of the space, the same ones each time."""
        yield self.baseline
        draws = _LatinHypercube(_SAMPLES, seed=0)
        for _ in range(_SAMPLES if self.ranges else 1):
            yield self.trial_config(self.suggest(draws))

    def _check_samples(self, document: Document) -> None:
        """Find combinations that no single value shows to be wrong, such as mixup with cutmix."""
        try:
            for _ in self.samples():
                pass
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(("trial", *map(str, first["loc"])))
            problem = str(first["ctx"]["error"])
            raise SpaceError(f"{document.place(key, problem)}: {key}: {problem}") from None


class _LatinHypercube:
    """Uniform draws that cover each range evenly (McKay, Beckman and Conover, 1979), the same for a seed each time.

    A range is cut into as many parts as points are drawn, and each point takes its value from another part. Of a few
    points drawn apart from one another most may well have one of three optimizers, and that at poor learning rates.

    Args:
        points: that will be drawn.
        seed: of the draws.
    """

    def __init__(self, points: int, seed: int) -> None:
        self._points, self._random = points, random.Random(seed)
        self._parts: defaultdict[str, list[int]] = defaultdict(list)

    def suggest_categorical(self, name: str, choices: Sequence[Scalar]) -> Scalar:
        return choices[int(len(choices) * self._draw(name))]

    def suggest_int(self, name: str, low: int, high: int) -> int:
        return low + int((high - low + 1) * self._draw(name))

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        share = self._draw(name)
        return low * (high / low) ** share if log else low + (high - low) * share

    def _draw(self, name: str) -> float:
        """Where in a range the next point lies, from 0 up to but not including 1."""
        if not self._parts[name]:
            self._parts[name] = self._random.sample(range(self._points), self._points)
        return (self._parts[name].pop() + self._random.random()) / self._points


def _create_baseline(
    baseline: str | Mapping[str, Any], fixed: Mapping[str, Scalar], ranges: Mapping[str, Range]
) -> TrialConfig:
    """A recipe by name, for as many epochs as the search gives a trial at most; or the values given."""
    if not isinstance(baseline, str):
        return TrialConfig.model_validate(baseline)
    return RECIPES[baseline].model_copy(update={"epochs": _max_epochs(fixed, ranges)})


def _max_epochs(fixed: Mapping[str, Scalar], ranges: Mapping[str, Range]) -> int:
    candidates: Any = ranges["epochs"].candidates if "epochs" in ranges else (fixed["epochs"],)
    return max(map(int, candidates))


def _order_by_conditions(ranges: Mapping[str, Range]) -> dict[str, Range]:
    """The ranges, each after those that its condition names; the reader has ruled out circles."""
    ordered: dict[str, Range] = {}

    def place(key: str) -> None:
        if key not in ordered and key in ranges:
            for other in ranges[key].when:
                place(other)
            ordered[key] = ranges[key]

    for key in ranges:
        place(key)
    return ordered
