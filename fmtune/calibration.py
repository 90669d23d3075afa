"""How far a model's confidence can be trusted, and where it was surest and yet wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fmtune.stored import Images
from fmtune.thumbnails import encode_png

BINS = 15
"""Bins of confidence, as many as in Guo et al."""
MISTAKES = 24
"""Mistakes that are kept with their images: as many as one looks through at a glance."""


@dataclass(frozen=True)
class Bin:
    """The images whose confidence is above `low` and not above `high`.

    `confidence` is their mean confidence, `accuracy` the share that was predicted right, both from 0 to 1, and None
    where there are none.
    """

    low: float
    high: float
    images: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Calibration:
    """`ece` is the expected calibration error, from 0 to 1; `bins` cover 0 to 1 in order."""

    ece: float
    bins: Sequence[Bin]


@dataclass(frozen=True)
class Mistake:
    """An image that was taken for another class.

    Attributes:
        row: of the split, from 0 on.
        true, predicted: class indices.
        probability: of the predicted class.
        image: a PNG in base64.
    """

    row: int
    true: int
    predicted: int
    probability: float
    image: str


def measure_calibration(confidence: NDArray[np.float32], is_right: NDArray[np.bool_]) -> Calibration:
    """The expected calibration error over 15 bins of equal width (Guo et al., 2017, https://arxiv.org/abs/1706.04599).

    Args:
        confidence: probability (N,) of each image's predicted class, above 0; one image at least.
        is_right: (N,), whether that class is the true one.
    """
    edges = np.linspace(0, 1, BINS + 1)
    places = np.searchsorted(edges, confidence, side="left") - 1
    images = np.bincount(places, minlength=BINS)
    sure = np.bincount(places, weights=confidence, minlength=BINS)
    right = np.bincount(places, weights=is_right, minlength=BINS)
    bins = [
        Bin(float(edges[i]), float(edges[i + 1]), int(n), float(sure[i] / n), float(right[i] / n))
        if n
        else Bin(float(edges[i]), float(edges[i + 1]), 0, None, None)
        for i, n in enumerate(images)
    ]
    return Calibration(float(np.abs(right - sure).sum() / len(confidence)), bins)


def find_mistakes(
    images: Images,
    labels: NDArray[np.int64],
    predicted: NDArray[np.int64],
    confidence: NDArray[np.float32],
) -> list[Mistake]:
    """The mistakes with the most confidence, the surest first; equally sure ones in the order of their rows.

    Args:
        images: uint8 (N, C, H, W).
        labels: true class indices (N,).
        predicted: predicted class indices (N,).
        confidence: probability (N,) of the predicted class.
    """
    wrong = np.flatnonzero(predicted != labels)
    surest = wrong[np.argsort(-confidence[wrong], kind="stable")][:MISTAKES]
    return [
        Mistake(int(row), int(labels[row]), int(predicted[row]), float(confidence[row]), encode_png(images[row]))
        for row in surest
    ]
