"""What is kept of a model's confidence, checked by hand and against plain numpy."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from fmtune.calibration import BINS, MISTAKES, find_mistakes, measure_calibration
from fmtune.thumbnails import encode_png


def _open(image: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(image)))


def _predictions(n: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """True classes, predicted classes and confidences of a model of three classes."""
    random = np.random.default_rng(0)
    labels, predicted = random.integers(0, 3, n), random.integers(0, 3, n)
    return labels, predicted, random.uniform(1 / 3, 1, n).astype(np.float32)


def test_calibration_error_is_the_hand_worked_one() -> None:
    """Of three bins: 14/15 to 1 with mean 0.97 and 2 of 3 right, 12/15 to 13/15 with a wrong one, 8/15 to 9/15."""
    confidence = np.array([0.95, 0.55, 0.97, 0.82, 0.99], np.float32)
    is_right = np.array([True, True, False, False, True])
    calibration = measure_calibration(confidence, is_right)
    assert calibration.ece == pytest.approx((3 * abs(0.97 - 2 / 3) + abs(0.55 - 1) + 0.82) / 5, abs=1e-6)
    filled = {i: b for i, b in enumerate(calibration.bins) if b.images}
    assert sorted(filled) == [8, 12, 14]
    assert (filled[14].images, filled[14].confidence, filled[14].accuracy) == pytest.approx((3, 0.97, 2 / 3))
    assert (filled[14].low, filled[14].high) == pytest.approx((14 / 15, 1))
    assert all(b.confidence is None and b.accuracy is None for b in calibration.bins if not b.images)


def test_calibration_error_agrees_with_a_loop_over_bins() -> None:
    labels, predicted, confidence = _predictions(3000)
    confidence[:5] = 1
    calibration = measure_calibration(confidence, labels == predicted)
    error = 0.0
    for i in range(BINS):
        inside = (confidence > i / BINS) & (confidence <= (i + 1) / BINS)
        if inside.any():
            gap = confidence[inside].mean(dtype=float) - (labels == predicted)[inside].mean()
            error += inside.mean() * abs(gap)
    assert calibration.ece == pytest.approx(error, abs=1e-6)
    assert sum(b.images for b in calibration.bins) == 3000


def test_a_model_that_is_always_sure_and_right_has_no_error() -> None:
    calibration = measure_calibration(np.ones(7, np.float32), np.ones(7, np.bool_))
    assert calibration.ece == 0
    assert calibration.bins[-1].images == 7


def test_mistakes_are_the_wrong_ones_with_most_confidence() -> None:
    """The surest first, with the images of their rows, pixel for pixel."""
    labels, predicted, confidence = _predictions(500)
    images = np.random.default_rng(1).integers(0, 256, (500, 3, 8, 6), np.uint8)
    mistakes = find_mistakes(images, labels, predicted, confidence)
    wrong = [row for row in range(500) if labels[row] != predicted[row]]
    wrong.sort(key=lambda row: confidence[row], reverse=True)
    assert [mistake.row for mistake in mistakes] == wrong[:MISTAKES]
    for mistake in mistakes:
        assert (mistake.true, mistake.predicted) == (labels[mistake.row], predicted[mistake.row])
        assert mistake.probability == pytest.approx(confidence[mistake.row])
        assert np.array_equal(np.asarray(_open(mistake.image)), images[mistake.row].transpose(1, 2, 0))


def test_equally_sure_mistakes_are_in_the_order_of_their_rows() -> None:
    images, labels = np.zeros((40, 1, 2, 2), np.uint8), np.zeros(40, np.int64)
    mistakes = find_mistakes(images, labels, labels + 1, np.ones(40, np.float32))
    assert [mistake.row for mistake in mistakes] == list(range(MISTAKES))


@pytest.mark.parametrize(
    ("shape", "size", "mode"),
    [
        ((1, 28, 28), (28, 28), "L"),
        ((3, 200, 400), (128, 64), "RGB"),
        # Of other numbers of channels, as of satellites, what can be shown.
        ((2, 8, 8), (8, 8), "L"),
        ((5, 8, 8), (8, 8), "RGB"),
    ],
)
def test_pictures_are_small_pngs(shape: tuple[int, int, int], size: tuple[int, int], mode: str) -> None:
    picture = _open(encode_png(np.random.default_rng(0).integers(0, 256, shape, np.uint8)))
    assert (picture.format, picture.size, picture.mode) == ("PNG", size, mode)
