"""What a trial wants, and what there is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from fmtune.config import ResourcesConfig
from fmtune.room import find_shortage

SMALL, LARGE = {"CPU": 4.0}, {"CPU": 8.0, "GPU": 1.0}


@pytest.mark.parametrize(
    ("resources", "nodes", "shortage"),
    [
        ({}, [SMALL], None),
        ({"cpus": 4}, [SMALL], None),
        ({"cpus": 5}, [SMALL], "a trial wants 5 CPU, and this machine has 4"),
        ({"workers": 2, "cpus": 3}, [SMALL], "a trial wants 6 CPU, and this machine has 4"),
        ({"gpus": 1}, [SMALL], "a trial wants 1 GPU, and this machine has 0"),
        ({"cpus": 8}, [SMALL, LARGE], None),
        ({"cpus": 9}, [SMALL, LARGE], "a worker wants 9 CPU, and the largest of 2 nodes has 8"),
        ({"workers": 3, "cpus": 4}, [SMALL, LARGE], None),
        ({"workers": 4, "cpus": 4}, [SMALL, LARGE], "a trial wants 16 CPU, and the 2 nodes together have 12"),
    ],
)
def test_what_no_machine_has_is_told(
    resources: dict[str, Any], nodes: Sequence[Mapping[str, float]], shortage: str | None
) -> None:
    assert find_shortage(ResourcesConfig(**resources), nodes) == shortage
