"""Seconds from a warm trial's last epoch to the next trial's first step, in a real search.

    python benchmarks/trial_gap.py [--trials 20]

Runs trials of one epoch, one at a time, on a tenth of the bundled sample, with a clock read in the trial's process at
its first step and after its report's return; and prints the medians of the gaps between consecutive trials.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

from fmtune.config import DataConfig, ResourcesConfig, TrialConfig
from fmtune.data import load_training_data
from fmtune.session import quiet, ray_session
from fmtune.training import EpochMetrics
from fmtune.trial import SharedData, Task
from fmtune.tuner import TaskRounds, Until, run_trials


class Clock:
    """Keeps when each trial reported, on this machine's clock, less what its epoch took."""

    def __init__(self) -> None:
        self.first_steps: list[float] = []
        self.ends: list[float] = []

    def on_start(self, task: Task) -> None:
        pass

    def on_epoch(self, task: Task, metrics: EpochMetrics) -> None:
        now = time.monotonic()
        self.first_steps.append(now - metrics.seconds)
        self.ends.append(now)

    def on_checkpoint(self, task: Task, folder: str) -> None:
        pass

    def on_end(self, task: Task, cause: str | None) -> None:
        assert cause is None, cause

    def on_tick(self) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=20)
    trials = parser.parse_args().trials
    config = TrialConfig(epochs=1)
    tasks = [Task(name=f"{i:03d}", seed=i, trial=config.model_dump()) for i in range(trials)]
    resources = ResourcesConfig(cpus=2)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder, quiet() as screen:
        data: Any = load_training_data(DataConfig(validation=0.9))
        with ray_session(resources, None):
            run_trials(
                SharedData.of(data),
                resources,
                TaskRounds(lambda: tasks),
                trials,
                name="gap",
                storage=folder,
                watcher=clock,
                until=Until(lambda: False),
            )
        gaps = [start - end for start, end in zip(clock.first_steps[1:], clock.ends[:-1], strict=True)]
        screen.console.print(
            f"{len(gaps)} gaps: median {statistics.median(gaps):.3f} s ({min(gaps):.3f} to {max(gaps):.3f}), "
            f"checkpoint and report included"
        )


if __name__ == "__main__":
    main()
