"""Fine-tuning from half of the classes to the other half, by frozen stages, against training from scratch.

    python benchmarks/transfer.py [--seeds 5] [--threads 2] [--counts 20 100 500]

Pretrains the default configuration on five classes of Fashion-MNIST (T-shirt to coat), then trains on the other five
(sandal to ankle boot) with 20, 100 and 500 images a class: from scratch, and from those weights with 0 to 5 stages
frozen. For each way the learning rate is the better of two by 200 other training images a class; the test split's 5,000
images of the five classes are read once a seed, at that rate. Images and initial weights differ by seed, and are the
same for all ways.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from fmtune.batches import Batches
from fmtune.checkpoint import create_preprocess
from fmtune.config import ModelConfig, OptimConfig, TrialConfig
from fmtune.data import measure_pixels
from fmtune.datasets import read_named
from fmtune.model import Pixels, ResNet, create_model
from fmtune.pretrained import load_pretrained, read_weights
from fmtune.training import evaluate, fit

EPOCHS = {20: 60, 100: 30, 500: 12}
"""Epochs by images a class: with few images a step is cheap, and many are needed."""
RATES = (0.005, 0.02)
VALIDATION = 200
SCRATCH = "scratch"


def load(split: str, first: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images and labels 0 to 4 of the five classes from `first` on."""
    table, _ = read_named("fashion-mnist", split, Path("data"))  # type: ignore[arg-type]
    rows = np.flatnonzero((table.labels >= first) & (table.labels < first + 5))
    return table.images[rows], table.labels[rows] - first


def train(
    images: NDArray[np.uint8], labels: NDArray[np.int64], pixels: Pixels, config: TrialConfig, seed: int
) -> ResNet:
    torch.manual_seed(seed)
    network = create_model(config.model, 1, 5)
    if config.model.pretrained is not None:
        load_pretrained(network, config.model, read_weights(config.model, Path("none")))
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    batches = Batches(torch.tensor(images), torch.tensor(labels), torch.arange(len(images)))
    preprocess = create_preprocess(config, pixels)
    fit(network, preprocess, batches, None, config, seed=seed, report=lambda metrics, state: None)
    return network


def measure(network: ResNet, images: NDArray[np.uint8], labels: NDArray[np.int64], pixels: Pixels) -> float:
    batches = Batches(torch.tensor(images), torch.tensor(labels), torch.arange(len(images)))
    return evaluate(network, create_preprocess(TrialConfig(), pixels), batches).accuracy


def draw_rows(labels: NDArray[np.int64], count: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of `count` training and of the validation images of each class."""
    random = np.random.default_rng(seed)
    orders = [random.permutation(np.flatnonzero(labels == label)) for label in range(5)]
    held_out = np.concatenate([order[:VALIDATION] for order in orders])
    return np.concatenate([order[VALIDATION : VALIDATION + count] for order in orders]), held_out


def compare(ways: dict[str, ModelConfig], pixels: Pixels, count: int, seeds: int) -> dict[str, list[float]]:
    """Test accuracy of each way and seed."""
    images, labels = load("train", 5)
    test = load("test", 5)
    found: dict[str, list[float]] = {}
    for way, model in ways.items():
        by_rate: dict[float, list[tuple[float, ResNet]]] = {rate: [] for rate in RATES}
        for rate, results in by_rate.items():
            config = TrialConfig(epochs=EPOCHS[count], batch_size=50, model=model, optim=OptimConfig(lr=rate))
            for seed in range(seeds):
                rows, held_out = draw_rows(labels, count, seed)
                network = train(images[rows], labels[rows], pixels, config, seed)
                results.append((measure(network, images[held_out], labels[held_out], pixels), network))
        best = max(RATES, key=lambda rate: statistics.fmean(accuracy for accuracy, _ in by_rate[rate]))
        found[way] = [measure(network, *test, pixels) for _, network in by_rate[best]]
        print_row(count, way, best, found[way])
    return found


def print_row(count: int, way: str, rate: float, accuracies: Sequence[float]) -> None:
    mean, low, high = statistics.fmean(accuracies), min(accuracies), max(accuracies)
    print(f"{count:>4} a class, {way:<9} lr {rate:<6} {mean:.4f} ({low:.4f} to {high:.4f})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--counts", type=int, nargs="+", choices=EPOCHS, default=list(EPOCHS))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    images, labels = load("train", 0)
    pixels = measure_pixels(images)
    network = train(images, labels, pixels, TrialConfig(), seed=0)
    own = measure(network, *load("test", 0), pixels)
    print(f"pretrained on {len(images):,} images: {own:.4f} on the test images of their classes")
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/weights.safetensors"
        # The head is of other classes, and as many: a file alone does not tell.
        save_file({n: v.contiguous() for n, v in network.state_dict().items() if not n.startswith("fc.")}, path)
        ways = {SCRATCH: ModelConfig()}
        ways |= {f"freeze {freeze}": ModelConfig(pretrained=path, freeze=freeze) for freeze in range(6)}
        for count in options.counts:
            compare(ways, pixels, count, options.seeds)


if __name__ == "__main__":
    main()
