"""What a training is reckoned to take."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fmtune.config import DataConfig, ModelConfig, TrialConfig
from fmtune.data import TrainingData, load_training_data
from fmtune.errors import SpaceError
from fmtune.probe import check_channels, count_operations
from fmtune.space import Space


@pytest.fixture(scope="module")
def data() -> TrainingData:
    return load_training_data(DataConfig(train="sample"))


def test_operations_are_those_of_the_layers(data: TrainingData) -> None:
    """By hand: each convolution's kernel at each place of its map, and the head; three times in each epoch."""
    blocks = [(4, 4, 14, False), (4, 8, 7, True), (8, 16, 4, True), (16, 32, 2, True)]
    weights = 9 * 4 * 14**2 + sum(
        side**2 * (9 * n_in * n_out + 9 * n_out**2 + strided * n_in * n_out) for n_in, n_out, side, strided in blocks
    )
    config = TrialConfig(epochs=2, model=ModelConfig(depth=10, width=4, stem="half"))
    assert count_operations(config, data) == 2 * 3 * 2 * (weights + 32 * 10)


def test_frozen_stages_cost_less_until_they_thaw(data: TrainingData) -> None:
    def cost(**model: Any) -> int:
        return count_operations(TrialConfig(epochs=4, model=ModelConfig(pretrained="imagenet", **model)), data)

    costs = [cost(freeze=freeze) for freeze in range(6)]
    assert costs == sorted(costs, reverse=True) and len(set(costs)) == 6
    assert costs[5] < cost(freeze=5, unfreeze_epoch=4) < cost(freeze=5, unfreeze_epoch=2) < costs[0]
    assert cost(freeze=5, unfreeze_epoch=9) == costs[5]


@pytest.mark.parametrize(
    ("baseline", "channels", "key"), [("seed", None, "baseline"), ("default", 3, "trial"), ("default", None, None)]
)
def test_networks_of_other_channels_are_refused_where_they_are_asked_for(
    baseline: str, channels: int | None, key: str | None, data: TrainingData
) -> None:
    """Two channels can't be made three; the tutorial's recipe has three."""
    two = replace(data, images=np.repeat(np.asarray(data.images[:4]), 2, axis=1))
    space = Space.load({"baseline": baseline, "trial": {"model": {"channels": channels}}})
    if key is None:
        check_channels(space, two)
        return
    with pytest.raises(SpaceError, match=rf"^{key}\.model\.channels: 3; the images have 2, "):
        check_channels(space, two)
