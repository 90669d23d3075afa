"""One configuration on full Fashion-MNIST by the bare training loop, without Ray: for finding a recipe by measuring.

    python benchmarks/recipe.py [--threads 1] [--seeds 1] [optim.lr=0.03 epochs=3 ...]

Trains `TrialConfig` with the given values on nine tenths of the training part and measures on the rest; the test split
is not read. Prints the accuracy from each seed, the seconds of training and the curve of the last seed.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from training import DATA, fit_rows

from fmtune.config import TrialConfig
from fmtune.data import load_training_data
from fmtune.model import count_parameters, create_model
from fmtune.space import Space
from fmtune.training import EpochMetrics, TrainingState


def train(config: TrialConfig, seed: int) -> list[EpochMetrics]:
    """The metrics of each epoch."""
    data = load_training_data(DATA)
    history: list[EpochMetrics] = []

    def report(metrics: EpochMetrics, state: TrainingState) -> None:
        history.append(metrics)

    fit_rows(data, config, data.train_rows, data.validation_rows, seed, report)
    return history


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("values", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = Space.load({}, [f"trial.{value}" for value in options.values]).trial_config({})
    curves = [train(config, seed) for seed in range(options.seeds)]
    accuracies = [curve[-1].val_accuracy or 0.0 for curve in curves]
    seconds = statistics.fmean(curve[-1].seconds for curve in curves)
    parameters = count_parameters(create_model(config.model, 1, 10))
    print(f"{' '.join(options.values) or 'defaults'}: {parameters:,} parameters, {seconds:.1f} s")
    print(f"accuracy {statistics.fmean(accuracies):.4f}  ({', '.join(f'{value:.4f}' for value in accuracies)})")
    print("curve    " + " ".join(f"{epoch.val_accuracy:.4f}" for epoch in curves[-1]))


if __name__ == "__main__":
    main()
