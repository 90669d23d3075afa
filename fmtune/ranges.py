"""Ranges of values, as the YAML writes them and as Optuna draws from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, Protocol

from fmtune.config import Scalar

Condition = Mapping[str, tuple[Scalar, ...]]
"""Values, of other parameters by dotted key, under which a range is searched."""
KINDS = ("choice", "int", "float", "log")
"""Keys that make a mapping of the YAML a range."""


_RESAMPLED = 0.25
"""Probability of drawing a value anew instead of moving it."""
_STEPS = (0.8, 1.2)
"""Factors by which a number is moved."""


class Suggests(Protocol):
    """The part of `optuna.trial.Trial` that draws."""

    def suggest_categorical(self, name: str, choices: Any) -> Any: ...

    def suggest_int(self, name: str, low: int, high: int) -> int: ...

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...


@dataclass(frozen=True)
class Choice:
    """One of several values."""

    values: tuple[Scalar, ...]
    when: Condition = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.values) < 2 or len(set(map(repr, self.values))) < len(self.values):
            raise ValueError(f"choice: {list(self.values)}; expected two or more different values")
        if not all(isinstance(value, Scalar) for value in self.values):
            raise ValueError(f"choice: {list(self.values)}; expected numbers, strings, true, false or null")

    @property
    def candidates(self) -> tuple[Scalar, ...]:
        """Values that are valid only if all of the range is."""
        return self.values

    @property
    def grid(self) -> tuple[Scalar, ...]:
        """All values."""
        return self.values

    def of_floats(self) -> Choice:
        """The same with whole numbers as floats, which is what a configuration makes of them."""
        return replace(self, values=tuple(float(v) if type(v) is int else v for v in self.values))

    def contains(self, value: Scalar) -> bool:
        return value in self.values

    def move(self, value: Scalar, random: Random) -> Scalar:
        """Another value, or the same one most of the time: there is none near it."""
        return random.choice(self.values) if random.random() < _RESAMPLED else value

    def suggest(self, trial: Suggests, name: str) -> Scalar:
        drawn: Scalar = trial.suggest_categorical(name, self.values)
        return drawn

    def as_yaml(self) -> dict[str, Any]:
        return {"choice": list(self.values)} | _when_as_yaml(self.when)


@dataclass(frozen=True)
class Interval:
    """Numbers from `low` to `high`, both included."""

    kind: str
    """`int`, `float`, or `log`: a float drawn evenly on the logarithm."""
    low: float
    high: float
    when: Condition = field(default_factory=dict)

    def __post_init__(self) -> None:
        wanted = int if self.kind == "int" else (int, float)
        for bound in (self.low, self.high):
            if isinstance(bound, bool) or not isinstance(bound, wanted):
                what = "whole numbers" if self.kind == "int" else "numbers"
                raise ValueError(f"{self.kind}: {bound!r}; expected two {what}, [low, high]")
        if not self.low < self.high:
            raise ValueError(f"{self.kind}: [{self.low}, {self.high}]; expected low below high")
        if self.kind == "log" and self.low <= 0:
            raise ValueError(f"log: [{self.low}, {self.high}]; expected low above 0")

    @property
    def candidates(self) -> tuple[Scalar, ...]:
        """Values that are valid only if all of the range is."""
        return (self.low, self.high) if self.kind == "int" else (float(self.low), float(self.high))

    @property
    def grid(self) -> tuple[Scalar, ...]:
        """All values of an int range."""
        return tuple(range(int(self.low), int(self.high) + 1))

    def contains(self, value: Scalar) -> bool:
        wanted = int if self.kind == "int" else (int, float)
        return isinstance(value, wanted) and not isinstance(value, bool) and self.low <= value <= self.high

    def move(self, value: Scalar, random: Random) -> Scalar:
        """A value near the given one, or any (Jaderberg et al., 2017, https://arxiv.org/abs/1711.09846, "explore")."""
        assert isinstance(value, int | float)
        moved: float
        if random.random() < _RESAMPLED:
            share = random.random()
            if self.kind == "log":
                moved = self.low * (self.high / self.low) ** share
            else:
                moved = self.low + share * (self.high - self.low)
        else:
            moved = value * random.choice(_STEPS)
            # What is small stays where it is when rounded.
            if self.kind == "int" and round(moved) == value:
                moved = value + random.choice((-1, 1))
        moved = min(max(moved, self.low), self.high)
        return round(moved) if self.kind == "int" else moved

    def suggest(self, trial: Suggests, name: str) -> Scalar:
        if self.kind == "int":
            return trial.suggest_int(name, int(self.low), int(self.high))
        return trial.suggest_float(name, self.low, self.high, log=self.kind == "log")

    def as_yaml(self) -> dict[str, Any]:
        return {self.kind: [self.low, self.high]} | _when_as_yaml(self.when)


Range = Choice | Interval


def is_range(value: object) -> bool:
    """Whether a value of the YAML is meant as a range."""
    return isinstance(value, Mapping) and any(kind in value for kind in KINDS)


def parse_range(value: Mapping[str, Any]) -> Range:
    """The range that a mapping of the YAML describes.

    Raises:
        ValueError: the mapping is no proper range; the message says what would be right.
    """
    kinds = [kind for kind in KINDS if kind in value]
    unknown = [key for key in value if key not in (*KINDS, "when")]
    if len(kinds) != 1 or unknown:
        raise ValueError(
            f"a range with keys {', '.join(map(str, value))}; expected one of {', '.join(KINDS)}, and `when` if need be"
        )
    when = _parse_when(value.get("when", {}))
    bounds = value[kinds[0]]
    if not isinstance(bounds, list):
        raise ValueError(f"{kinds[0]}: {bounds!r}; expected a list")
    if kinds[0] == "choice":
        return Choice(tuple(bounds), when)
    if len(bounds) != 2:
        raise ValueError(f"{kinds[0]}: {bounds}; expected two numbers, [low, high]")
    return Interval(kinds[0], bounds[0], bounds[1], when)


def _parse_when(when: object) -> Condition:
    if not isinstance(when, Mapping):
        raise ValueError(f"when: {when!r}; expected a mapping such as {{optim.name: [sgd, muon]}}")
    return {str(key): tuple(value) if isinstance(value, list) else (value,) for key, value in when.items()}


def _when_as_yaml(when: Condition) -> dict[str, Any]:
    return {"when": {key: list(values) for key, values in when.items()}} if when else {}
