"""The curve of `search_spaces/seed.yaml` on full Fashion-MNIST beside the tutorial's, over several seeds.

    python benchmarks/seed_recipe.py [--epochs 3] [--seeds 3]

Runs `fmtune train` on the recipe, and prints the test accuracy after each epoch, its mean and spread, beside what the
tutorial printed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from fmtune import train

_TUTORIAL = (0.8679, 0.8811, 0.8859, 0.8814, 0.8882, 0.8908)
"""Accuracy after each of its first epochs."""
_RECIPE = Path(__file__).parent.parent / "search_spaces" / "seed.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    curves = []
    with tempfile.TemporaryDirectory() as runs:
        for seed in range(options.seeds):
            overrides = [f"trial.epochs={options.epochs}", f"search.seed={seed}", "data.fallback=null"]
            result = train(_RECIPE, name=f"seed-{seed}", runs=runs, overrides=overrides)
            history = result.folder.read_history()[0]
            curves.append([epoch.val_accuracy or 0.0 for epoch in history])
            rate = statistics.fmean(epoch.images_per_second for epoch in history)
            print(f"seed {seed}: {' '.join(f'{value:.4f}' for value in curves[-1])}  {rate:,.0f} images/s", flush=True)
    print("epoch  mean    min     max     tutorial")
    for epoch, values in enumerate(zip(*curves, strict=True), start=1):
        tutorial = f"{_TUTORIAL[epoch - 1]:.4f}" if epoch <= len(_TUTORIAL) else ""
        print(f"{epoch:<7}{statistics.fmean(values):.4f}  {min(values):.4f}  {max(values):.4f}  {tutorial}")


if __name__ == "__main__":
    main()
