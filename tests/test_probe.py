"""What a training is reckoned to take."""

from __future__ import annotations

from typing import Any

import pytest

from fmtune.config import DataConfig, ModelConfig, TrialConfig
from fmtune.data import TrainingData, load_training_data
from fmtune.probe import count_operations


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
