"""Images/s of training by the number of frozen stages, with every image passed through them and with outputs kept.

    python benchmarks/freezing.py [--rounds 3] [--threads 2]

Two networks: the default one (ResNet-10, width 16, stem `half`) and the published ResNet-18, on random images of 28 x
28. With translation on, each image passes through the frozen stages at every step; with mirroring alone, their outputs
are kept. All ways have their turn in every round. The first epoch, in which outputs are computed, is told apart from
the later ones.
"""

from __future__ import annotations

import argparse
import statistics

import torch

from fmtune.batches import Batches
from fmtune.checkpoint import create_preprocess
from fmtune.config import AugmentConfig, ModelConfig, TrialConfig
from fmtune.model import Pixels, create_model
from fmtune.training import EpochMetrics, TrainingState, fit

ROWS = 40 * 256
NETWORKS = {
    "ResNet-10, width 16": {"depth": 10, "width": 16, "stem": "half"},
    "ResNet-18, width 64": {"depth": 18, "width": 64, "stem": "imagenet"},
}
WAYS = {"images": AugmentConfig(translate=1), "kept outputs": AugmentConfig(translate=0)}


def measure(model: ModelConfig, augment: AugmentConfig) -> list[float]:
    """Images/s of each epoch."""
    config = TrialConfig(epochs=3, model=model, augment=augment)
    network = create_model(model, 1, 10).to(memory_format=torch.channels_last)
    images = torch.randint(0, 256, (ROWS, 1, 28, 28), dtype=torch.uint8)
    batches = Batches(images, torch.randint(0, 10, (ROWS,)), torch.arange(ROWS))
    rates: list[float] = []

    def report(metrics: EpochMetrics, _: TrainingState) -> None:
        rates.append(metrics.images_per_second)

    fit(network, create_preprocess(config, Pixels.unit(1)), batches, None, config, seed=0, report=report)
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name, values in NETWORKS.items():
        first: dict[tuple[str, int], list[float]] = {}
        later: dict[tuple[str, int], list[float]] = {}
        for _ in range(options.rounds):
            for freeze in range(6):
                # The weights don't matter to the speed, so random ones stand for loaded ones.
                weights = "imagenet" if freeze else None
                model = ModelConfig.model_validate(values | {"freeze": freeze, "pretrained": weights})
                for way, augment in WAYS.items():
                    rates = measure(model, augment)
                    first.setdefault((way, freeze), []).append(rates[0])
                    later.setdefault((way, freeze), []).append(rates[-1])
        print(name)
        base = statistics.median(later["images", 0])
        for (way, freeze), rates in later.items():
            low, middle, high = min(rates), statistics.median(rates), max(rates)
            print(
                f"  freeze {freeze}, {way:<13}{middle:>9,.0f} images/s ({low:,.0f} to {high:,.0f}), "
                f"{middle / base:.1f} of freeze 0; first epoch {statistics.median(first[way, freeze]):,.0f}"
            )


if __name__ == "__main__":
    main()
