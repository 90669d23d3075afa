"""Weights of five classes carried over to five others."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from fmtune.batches import Batches
from fmtune.checkpoint import create_preprocess
from fmtune.config import AugmentConfig, ModelConfig, OptimConfig, TrialConfig
from fmtune.data import measure_pixels
from fmtune.datasets import read_named
from fmtune.model import ResNet, create_model
from fmtune.pretrained import load_pretrained, read_weights
from fmtune.training import evaluate, fit

FEW = 20
"""Images a class to fine-tune on."""


def _load(first: int) -> Batches:
    """The bundled sample's images of five classes, with labels 0 to 4."""
    table, _ = read_named("sample", "train", Path("none"))
    rows = np.flatnonzero((table.labels >= first) & (table.labels < first + 5))
    images, labels = torch.tensor(table.images[rows]), torch.tensor(table.labels[rows] - first)
    return Batches(images, labels, torch.arange(len(rows)))


def _pick(batches: Batches, count: int) -> tuple[Batches, Batches]:
    """The first `count` images of each class, and all others."""
    chosen = torch.cat([torch.nonzero(batches.labels == label)[:count, 0] for label in range(5)])
    others: NDArray[np.int64] = np.setdiff1d(np.arange(len(batches.images)), chosen.numpy())
    few = Batches(batches.images, batches.labels, chosen)
    return few, Batches(batches.images, batches.labels, torch.tensor(others))


def _train(batches: Batches, model: ModelConfig, epochs: int, seed: int = 0) -> ResNet:
    torch.manual_seed(seed)
    network = create_model(model, 1, 5)
    if model.pretrained is not None:
        load_pretrained(network, model, read_weights(model, Path("none")))
    config = TrialConfig(
        epochs=epochs, batch_size=50, model=model, augment=AugmentConfig(flip=False), optim=OptimConfig(lr=0.01)
    )
    pixels = measure_pixels(_load(0).images.numpy())
    fit(network, create_preprocess(config, pixels), batches, None, config, seed=0, report=lambda metrics, state: None)
    return network


def _accuracy(network: ResNet, batches: Batches) -> float:
    pixels = measure_pixels(_load(0).images.numpy())
    return evaluate(network, create_preprocess(TrialConfig(), pixels), batches).accuracy


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Weights of a network that tells the first five classes apart."""
    network = _train(_load(0), ModelConfig(width=8), epochs=4)
    path = tmp_path_factory.mktemp("weights") / "five.safetensors"
    # The head is of other classes, and as many: a file alone does not tell.
    save_file({n: v.contiguous() for n, v in network.state_dict().items() if not n.startswith("fc.")}, path)
    return str(path)


@pytest.mark.parametrize("freeze", [0, 3])
def test_weights_of_other_classes_help_where_images_are_few(pretrained: str, freeze: int) -> None:
    """With 20 images a class, whether all stages are trained on or some; from scratch it is a matter of luck."""
    few, others = _pick(_load(5), FEW)
    scratch = fmean(_accuracy(_train(few, ModelConfig(width=8), epochs=20, seed=seed), others) for seed in range(4))
    tuned = _accuracy(_train(few, ModelConfig(width=8, pretrained=pretrained, freeze=freeze), epochs=20), others)
    assert tuned > scratch
