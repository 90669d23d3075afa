from __future__ import annotations

import pytest

from fmtune.choice import stands_out


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        # Means 0.90 and 0.88; the standard error is sqrt((0.0002 + 0.0002) / 2) = 0.0141.
        ([[0.89, 0.91], [0.87, 0.89]], True),
        # Means 0.90 and 0.89, by the same standard error.
        ([[0.89, 0.91], [0.88, 0.90]], False),
        # The third is not looked at, and the order does not matter.
        ([[0.5, 0.9], [0.87, 0.89], [0.89, 0.91]], True),
        # Means 0.90 and 0.8875; the standard error over four seeds is sqrt((0.000133 + 0.0000917) / 4) = 0.0075.
        ([[0.89, 0.91, 0.89, 0.91], [0.88, 0.90, 0.88, 0.89]], True),
        # One seed shows no spread.
        ([[0.9], [0.1]], False),
        ([[0.9, 0.9]], False),
    ],
)
def test_a_candidate_stands_out_by_the_standard_error_of_the_difference(
    values: list[list[float]], expected: bool
) -> None:
    assert stands_out(values) == expected
