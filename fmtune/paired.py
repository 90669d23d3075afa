"""Two models measured on the same images: whether one is better by more than chance."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

_NORMAL = 1.959963984540054
"""Of a 95% interval."""


@dataclass(frozen=True)
class PairedDifference:
    """How much more accurate one model is than another.

    Attributes:
        difference: of the accuracies.
        interval: 95% interval of that, from the images on which the two differ.
        p_value: chance of so many more of them going one way, were both models equal (exact McNemar test).
        gained, lost: images that only the first model has right, and only the second.
    """

    difference: float
    interval: tuple[float, float]
    p_value: float
    gained: int
    lost: int


def compare_paired(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> PairedDifference:
    """Compare by which images (N,) each model has right (McNemar, 1947, https://doi.org/10.1007/BF02295996).

    The interval is Wald's for a difference of paired shares. It counts only images on which the models differ, so that
    it is narrower than two separate intervals suggest.
    """
    gained, lost, images = int((first & ~second).sum()), int((second & ~first).sum()), len(first)
    difference = (gained - lost) / images
    half = _NORMAL * math.sqrt(gained + lost - (gained - lost) ** 2 / images) / images
    p_value = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    interval = (max(-1.0, difference - half), min(1.0, difference + half))
    return PairedDifference(difference, interval, float(p_value), gained, lost)


def describe_chance(p_value: float) -> str:
    """The p-value of McNemar's test in words."""
    return "McNemar, p < 0.001" if p_value < 0.001 else f"McNemar, p = {p_value:.3f}"
