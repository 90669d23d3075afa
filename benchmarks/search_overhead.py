"""What the search itself costs a trial: driver time and memory, by the number of trials that do nothing.

    python benchmarks/search_overhead.py [--trials 100 1000 10000] [--sampler tpe]

Each number is a process of its own that runs the whole command's code (proposing, Ray Tune, study, history, board,
page) on the bundled sample; only the training of a trial is replaced: it reports two epochs of random accuracy and a
checkpoint made beforehand. As many trials as CPUs run side by side. The wall time and the driver's CPU time are of the
search phase alone, divided by its trials; memory is the driver's largest resident set over that of a search of two.
"""

from __future__ import annotations

import argparse
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from ray import tune

import fmtune
import fmtune.tuner
from fmtune.checkpoint import save_training
from fmtune.explore import Exploration
from fmtune.model import create_model
from fmtune.optim import Optimization
from fmtune.space import Space
from fmtune.training import EpochMetrics, TrainingState
from fmtune.trial import Task

EPOCHS = 2
MODEL = {"depth": 10, "width": 4, "stem": "imagenet"}


def measure(trials: int, sampler: str) -> tuple[float, float, float]:
    """Seconds and CPU seconds of the search phase, and the largest resident set in MiB, of this process."""
    values = {"epochs": EPOCHS, "model": MODEL}
    space = Space.load(
        {
            "data": {"train": "sample"},
            "search": {"trials": trials, "sampler": sampler, "scheduler": "asha", "finalists": 0, "refit": False},
            "baseline": values,
            "trial": values | {"optim": {"lr": {"log": [1e-3, 1e-1]}, "weight_decay": {"log": [1e-5, 1e-1]}}},
        }
    )
    spent: list[float] = []
    explore = Exploration.run

    def timed(self: Exploration) -> None:
        started = time.monotonic(), time.process_time()
        explore(self)
        spent.extend((time.monotonic() - started[0], time.process_time() - started[1]))

    with tempfile.TemporaryDirectory() as folder:
        network = create_model(space.baseline.model, 1, 10)
        state = TrainingState(network, Optimization(network, space.baseline.optim, EPOCHS))
        save_training(Path(folder), state.state_dict(), EpochMetrics(EPOCHS, 1.0, 1.0, 0.5, 0.1, 1.0, 1.0))

        def do_nothing(config: dict[str, Any], *, data: object, resources: object) -> None:
            draws = random.Random(Task(**config).seed)
            for epoch in range(1, EPOCHS + 1):
                metrics = EpochMetrics(epoch, 1.0, 1.0, draws.random(), 0.1, 1.0, 0.001 * epoch)
                tune.report(metrics.as_dict(), checkpoint=tune.Checkpoint.from_directory(folder))

        Exploration.run = timed  # type: ignore[method-assign]
        fmtune.tuner.run_trial = do_nothing
        with tempfile.TemporaryDirectory() as runs:
            fmtune.search(space, runs=runs)
    return spent[0], spent[1], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run(trials: int, sampler: str) -> tuple[float, ...]:
    command = [sys.executable, __file__, "--measure", str(trials), "--sampler", sampler]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return tuple(map(float, output.splitlines()[-1].split()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, nargs="+", default=[100, 1000, 10000])
    parser.add_argument("--sampler", default="tpe")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        torch.set_num_threads(1)
        print(*measure(options.measure, options.sampler))
        return
    _, _, base = run(2, options.sampler)
    for trials in options.trials:
        wall, cpu, memory = run(trials, options.sampler)
        print(
            f"{trials:>6} trials: {1000 * wall / trials:.0f} ms wall, {1000 * cpu / trials:.0f} ms of the driver's CPU "
            f"and {1024 * (memory - base) / trials:.0f} KiB a trial",
            flush=True,
        )


if __name__ == "__main__":
    main()
