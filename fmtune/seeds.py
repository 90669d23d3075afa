"""Seeds that differ from purpose to purpose."""

from __future__ import annotations

import numpy as np


def derive_seed(seed: int, *path: int) -> int:
    """A seed of 32 bits for one purpose, independent of those for others (numpy's `SeedSequence`).

    A short path and the same with zeros behind it are one: numpy fills up to four words with them.
    """
    return int(np.random.SeedSequence([seed, *path]).generate_state(1)[0])
