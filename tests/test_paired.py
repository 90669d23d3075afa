from __future__ import annotations

import math

import numpy as np
import pytest

from fmtune.paired import compare_paired


def _outcomes(both: int, gained: int, lost: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    first = [True] * (both + gained) + [False] * (lost + neither)
    second = [True] * both + [False] * gained + [True] * lost + [False] * neither
    return np.array(first), np.array(second)


def test_difference_and_test_are_the_hand_worked_ones() -> None:
    """8 gained and 2 lost of 100: 0.06; p is twice the chance of 8 or more heads in 10 throws, 112 of 1024."""
    found = compare_paired(*_outcomes(80, 8, 2, 10))
    assert (found.gained, found.lost) == (8, 2)
    assert found.difference == pytest.approx(0.06)
    assert found.p_value == pytest.approx(112 / 1024)
    half = 1.959964 * math.sqrt(10 - 36 / 100) / 100
    assert found.interval == pytest.approx((0.06 - half, 0.06 + half), abs=1e-6)


def test_models_that_agree_differ_by_nothing() -> None:
    found = compare_paired(*_outcomes(70, 0, 0, 30))
    assert (found.difference, found.interval, found.p_value) == (0.0, (0.0, 0.0), 1.0)


def test_the_order_turns_the_sign() -> None:
    first, second = _outcomes(50, 30, 5, 15)
    one, other = compare_paired(first, second), compare_paired(second, first)
    assert one.difference == -other.difference > 0
    assert one.interval == pytest.approx((-other.interval[1], -other.interval[0]))
    assert one.p_value == other.p_value < 1e-4


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Of 2,000 draws of 500 images with a true difference of 0.03, about 95% of intervals have it."""
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        kinds = random.choice(4, size=500, p=[0.85, 0.06, 0.03, 0.06])
        found = compare_paired(np.isin(kinds, (0, 1)), np.isin(kinds, (0, 2)))
        covered += found.interval[0] <= 0.03 <= found.interval[1]
    assert 0.93 < covered / 2000 < 0.97
