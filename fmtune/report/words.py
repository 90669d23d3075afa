"""Numbers and values as the page writes them."""

from __future__ import annotations

from collections.abc import Iterable

from fmtune.config import Scalar

NOTHING = "-"
"""What stands in a table for a value that is not there."""


def percent(share: float | None) -> str:
    """A share of 1 in percent with two decimals."""
    return NOTHING if share is None else f"{100 * share:.2f}%"


def surely(probability: float) -> str:
    """A probability in percent with one decimal; one that falls short of certainty is not rounded to it."""
    return "over 99.9%" if probability > 0.9995 else f"{100 * probability:.1f}%"


def interval(around: tuple[float, float]) -> str:
    """Both ends of an interval of a share."""
    return f"{percent(around[0])} to {percent(around[1])}"


def decimal(value: float | None) -> str:
    """Four decimals, as losses and accuracies are compared by."""
    return NOTHING if value is None else f"{value:.4f}"


def scalar(value: Scalar) -> str:
    """A configured value as YAML has it; floats to four digits."""
    if value is None:
        return "null"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def short(text: str, length: int = 22) -> str:
    """Text that fits an axis."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def listing(items: Iterable[str]) -> str:
    """a, b and c."""
    *most, last = items
    return f"{', '.join(most)} and {last}" if most else last
