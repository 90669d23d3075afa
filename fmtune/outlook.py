"""Whether more of the same search is worth it: the gain to expect from as many trials again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

MIN_VALUES = 16
"""Trials below which their quarter, half and whole tell no trend."""
_RESAMPLES = 400
"""Bootstrap samples for the interval."""
_RATIOS = (0.5, 1.0)
"""Bounds of the gain of a doubling over that of the one before: values that end as a uniform distribution does halve
it, and those with an exponential tail keep it."""


@dataclass(frozen=True)
class Outlook:
    """The gain over the best value so far that as many trials again would bring, in the metric's own unit.

    Attributes:
        gain: its expectation, 0 or more.
        low, high: 95% interval of that expectation, from the few trials that it is reckoned from.
        trials: how many more trials it is reckoned for.
    """

    gain: float
    low: float
    high: float
    trials: int


def look_ahead(values: Sequence[float], limit: float, best: float = -math.inf, seed: int = 0) -> Outlook | None:
    """The outlook of a search whose trials came to `values`; more is better.

    The expected best of k of the n trials, drawn without replacement, is known for every k up to n (Dodge et al.,
    2019, https://arxiv.org/abs/1909.03004). The best of n draws grows like n to a power (the extreme value theorem),
    so that the gain of a doubling is that of the doubling before times a constant; both factors are read off a
    quarter, half and all of the trials. The interval is the bootstrap's. A sampler that still learns does better.

    Args:
        values: of all trials that were drawn and measured.
        limit: what no value can exceed, such as 1 for an accuracy.
        best: what there is to gain on, where a trial that was not drawn is ahead of all that were.
        seed: of the bootstrap.

    Returns:
        None where there are too few trials.
    """
    if len(values) < MIN_VALUES:
        return None
    measured = np.asarray(values, dtype=np.float64)
    samples = np.random.default_rng(seed).choice(measured, size=(_RESAMPLES, len(measured)))
    leading = max(best, *values)
    behind, room = leading - max(values), max(0.0, limit - leading)
    gain, *gains = (min(room, max(0.0, _extrapolate(sample) - behind)) for sample in (measured, *samples))
    low, high = np.quantile(gains, [0.025, 0.975])
    return Outlook(gain, float(low), float(high), len(values))


def project_error(errors: Sequence[float], whole: Sequence[Sequence[float]]) -> float:
    """The error that a training would have ended with, had it not been stopped, by how those went on that were not.

    Args:
        errors: after each of its epochs.
        whole: the same of trainings that came to their end; with none the error stays as it is.
    """
    at = len(errors) - 1
    ratios = [curve[-1] / curve[at] for curve in whole if curve[at] > 0]
    return errors[-1] * median(ratios) if ratios else errors[-1]


def describe_outlook(outlook: Mapping[str, Any]) -> str:
    """A sentence on an outlook as summary.json has it: an `Outlook`'s attributes, and the `metric` that it is in."""
    more, figures = f"{outlook['trials']} more trials", [outlook[key] for key in ("gain", "low", "high")]
    if outlook["metric"] == "val_accuracy":
        gain, low, high = (f"{100 * figure:.2f}" for figure in figures)
        return f"{more} would add about {gain} points of validation accuracy (95% interval {low} to {high})"
    gain, low, high = (f"{figure:.4f}" for figure in figures)
    return f"{more} would take about {gain} off the validation loss (95% interval {low} to {high})"


def _extrapolate(values: NDArray[np.float64]) -> float:
    """Gain of the next doubling of the trials."""
    n = len(values)
    quarter, half, whole = (_expected_best(values, k) for k in (n // 4, n // 2, n))
    earlier, later = half - quarter, whole - half
    if earlier <= 0:
        return 0.0
    ratio = float(np.clip(later / earlier, *_RATIOS))
    # From the earlier gain, which hangs less on the one best trial than the later does.
    return earlier * ratio * ratio


def _expected_best(values: NDArray[np.float64], k: int) -> float:
    """Mean over all choices of k values of the largest of them."""
    n = len(values)
    rank = np.arange(k, n + 1)
    # The i-th smallest is the largest in C(i - 1, k - 1) of the C(n, k) choices.
    weights = np.exp(_log_choices(rank - 1, k - 1) - _log_choices(n, k))
    return float(weights @ np.sort(values)[k - 1 :])


def _log_choices(n: NDArray[np.int64] | int, k: int) -> NDArray[np.float64]:
    return np.asarray(gammaln(np.add(n, 1)) - gammaln(k + 1) - gammaln(np.subtract(n, k) + 1))
