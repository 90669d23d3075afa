"""fmtune's training beside the tutorial's, in one process tree: throughput, seconds to an accuracy, memory.

    python benchmarks/training.py [--seeds 3] [--epochs 1 2 3 4 6] [--output training.json]

Each measurement is a process of its own and has the machine to itself; with each seed every way of training has its
turn before the next seed begins. Full Fashion-MNIST, all 60,000 rows are trained on; the test split is read once at the
end of a training by fmtune's ways, and after every epoch by the tutorial's script, as the tutorial has it. The
tutorial's script runs until it reaches its own best accuracy, for 20 epochs at most. fmtune's seconds to an accuracy
are those of the shortest training, in whole epochs, whose mean over the seeds reaches it.

Prints a table, and writes all that was measured as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fmtune.batches import Batches
from fmtune.checkpoint import create_preprocess, create_trained_model, load_weights
from fmtune.classifier import TrainedModel
from fmtune.config import DataConfig, ResourcesConfig, TrialConfig
from fmtune.data import TrainingData, load_split, load_test_split, load_training_data
from fmtune.model import ResNet, create_model
from fmtune.predict import evaluate_model
from fmtune.recipes import SEED
from fmtune.session import quiet, ray_session
from fmtune.training import EpochMetrics, Report, TrainingState, fit

TUTORIAL_BEST = 0.8938
TARGETS = (TUTORIAL_BEST, 0.92, 0.929)
DATA = DataConfig(train="fashion-mnist")
CORES = len(os.sched_getaffinity(0))
_RAY_ROUNDS = 2
"""Turns of the trial on Ray and of the bare loop beside it with each seed: their ratio is near 1."""
STEP_ROWS = 40 * 256
"""Rows that a step is timed over."""


def peak_memory() -> float:
    """Largest resident set of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def test_accuracy(model: TrainedModel) -> float:
    loaded = load_test_split(DATA, load_split(DATA, "train"))
    return evaluate_model(model, loaded.table.images, loaded.table.labels).accuracy


def fit_bare(config: TrialConfig, rows: int, threads: int, seed: int) -> tuple[TrainedModel, list[EpochMetrics], float]:
    """Train on the first `rows` rows by the bare loop; the model, its epochs, and images/s over the later epochs."""
    torch.set_num_threads(threads)
    data = load_training_data(DATA)
    metrics: list[EpochMetrics] = []
    ends: list[float] = []

    def report(epoch: EpochMetrics, _: TrainingState) -> None:
        metrics.append(epoch)
        ends.append(time.perf_counter())

    network = fit_rows(data, config, np.arange(rows), None, seed, report)
    preprocess = create_preprocess(config, data.pixels)
    model = TrainedModel(network.eval(), preprocess, data.classes, config, data.image_shape, data.pixels)
    return model, metrics, _rate(ends, rows)


def fit_rows(
    data: TrainingData,
    config: TrialConfig,
    rows: NDArray[np.int64],
    held_out: NDArray[np.int64] | None,
    seed: int,
    report: Report,
) -> ResNet:
    """Train on some rows by the bare loop, and validate on others if any."""
    torch.manual_seed(seed)
    network = create_model(config.model, 1, len(data.classes))
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images, labels = torch.tensor(data.images), torch.tensor(data.labels)
    train = Batches(images, labels, torch.tensor(rows))
    validation = None if held_out is None else Batches(images, labels, torch.tensor(held_out))
    fit(network, create_preprocess(config, data.pixels), train, validation, config, seed=seed, report=report)
    return network


def _rate(ends: Sequence[float], rows: int) -> float:
    """Images/s from the first epoch's end to the last one's."""
    return rows * (len(ends) - 1) / (ends[-1] - ends[0]) if len(ends) > 1 else float("nan")


def measure_bare(epochs: int, seed: int, threads: int = CORES) -> dict[str, float]:
    """The default configuration by the bare loop."""
    model, metrics, rate = fit_bare(TrialConfig(epochs=epochs), 60_000, threads, seed)
    found = {"images_per_second": rate, "seconds": metrics[-1].seconds, "memory": peak_memory()}
    return found | {"accuracy": test_accuracy(model)}


def measure_ray(epochs: int, seed: int, workers: int = 1) -> dict[str, float]:
    """The default configuration as a trial on Ray, by so many workers that share out the cores."""
    # Only here, so that no other measurement pays for Ray's memory.
    from fmtune.trial import SharedData, Task
    from fmtune.tuner import TaskRounds, Until, run_trials

    config, resources = TrialConfig(epochs=epochs), ResourcesConfig(workers=workers, cpus=CORES / workers)
    watcher = _Watcher()
    with tempfile.TemporaryDirectory() as folder, quiet():
        data = load_training_data(DATA)
        with ray_session(resources, None):
            task = Task("one", seed, config.model_dump(), rows="all")
            run_trials(
                SharedData.of(data),
                resources,
                TaskRounds(lambda: [task]),
                1,
                name="training",
                storage=folder,
                watcher=watcher,
                until=Until(lambda: False),
                pooled=workers > 1,
            )
            weights = load_weights(Path(watcher.checkpoint))
    model = create_trained_model(config, data.pixels, data.classes, data.image_shape, weights)
    return {
        "images_per_second": _rate(watcher.ends, 60_000),
        "seconds": watcher.seconds,
        "memory": watcher.memory,
        "accuracy": test_accuracy(model),
    }


class _Watcher:
    """Notes when epochs end, and the trial's memory then."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.seconds, self.memory, self.checkpoint = 0.0, 0.0, ""

    def on_start(self, task: object) -> None:
        pass

    def on_epoch(self, task: object, metrics: EpochMetrics) -> None:
        self.ends.append(time.perf_counter())
        self.seconds = metrics.seconds
        self.memory = max(self.memory, _largest_actor())

    def on_checkpoint(self, task: object, folder: str) -> None:
        self.checkpoint = folder

    def on_end(self, task: object, cause: str | None) -> None:
        if cause is not None:
            raise RuntimeError(cause)

    def on_tick(self) -> None:
        pass


def _largest_actor() -> float:
    """Peak resident set in MiB of the largest of Ray's workers on this machine."""
    peaks = [0.0]
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            text = status.read_text(encoding="utf-8")
        except OSError:  # ended meanwhile
            continue
        if text.startswith("Name:\tray::"):
            peaks += [int(line.split()[1]) / 1024 for line in text.splitlines() if line.startswith("VmHWM:")]
    return max(peaks)


def measure_tutorial_step() -> dict[str, float]:
    """The tutorial's script over the first rows."""
    import seed_document

    torch.set_num_threads(CORES)
    torch.manual_seed(0)
    rows = torch.utils.data.Subset(seed_document.load("train"), range(STEP_ROWS))
    loader = torch.utils.data.DataLoader(rows, batch_size=seed_document.BATCH, shuffle=True, drop_last=True)
    model = seed_document.ResNet18(classes=10)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        seed_document.train_epoch(model, loader, optimizer)
        seconds.append(time.perf_counter() - started)
    return {"images_per_second": STEP_ROWS / seconds[-1], "memory": peak_memory()}


def measure_tutorial_network() -> dict[str, float]:
    """The tutorial's network and batch, by fmtune's step."""
    _, metrics, _ = fit_bare(SEED.model_copy(update={"epochs": 2}), STEP_ROWS, CORES, seed=0)
    return {"images_per_second": metrics[-1].images_per_second, "memory": peak_memory()}


def measure_threads(threads: int) -> dict[str, float]:
    """One training of the default configuration with so many threads."""
    _, _, rate = fit_bare(TrialConfig(epochs=3), 30_000, threads, seed=0)
    return {"images_per_second": rate}


def measure_pair() -> dict[str, float]:
    """Two such trainings of one thread side by side, together."""
    with ThreadPoolExecutor(2) as pool:
        rates = list(pool.map(lambda _: run("threads", threads=1)["images_per_second"], range(2)))
    return {"images_per_second": sum(rates)}


ROLES: dict[str, Callable[..., dict[str, float]]] = {
    "bare": measure_bare,
    "ray": measure_ray,
    "tutorial-step": measure_tutorial_step,
    "tutorial-network": measure_tutorial_network,
    "threads": measure_threads,
    "pair": measure_pair,
}


def run(role: str, **arguments: int) -> dict[str, float]:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, "--role", role, "--arguments", json.dumps(arguments)]
    finished = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, float] = json.loads(finished.stdout.splitlines()[-1])
    print(role, arguments, {key: round(value, 4) for key, value in found.items()}, file=sys.stderr, flush=True)
    return found


def run_tutorial(seed: int) -> list[dict[str, float]]:
    """The epochs of the tutorial's script until it reaches its own best."""
    script = Path(__file__).with_name("seed_document.py")
    options = ["--epochs", "20", "--until", str(TUTORIAL_BEST), "--seed", str(seed), "--threads", str(CORES)]
    finished = subprocess.run([sys.executable, script, *options], stdout=subprocess.PIPE, check=True, text=True)
    epochs = [json.loads(line) for line in finished.stdout.splitlines()]
    print("tutorial", seed, epochs[-1], file=sys.stderr, flush=True)
    return epochs


def measure_all(seeds: int, epochs: Sequence[int]) -> dict[str, Any]:
    """Everything, by what was measured; a list has an entry a seed."""
    names = ("tutorial-step", "tutorial-network", "one", "pair", "ray", "alone", "workers", "tutorial")
    found: dict[str, Any] = {name: [] for name in names} | {"bare": {count: [] for count in epochs}}
    for seed in range(seeds):
        found["tutorial-step"].append(run("tutorial-step"))
        found["tutorial-network"].append(run("tutorial-network"))
        found["one"].append(run("threads", threads=CORES))
        found["pair"].append(run("pair"))
        for _ in range(_RAY_ROUNDS):
            found["ray"].append(run("ray", epochs=2, seed=seed))
            found["alone"].append(run("bare", epochs=2, seed=seed))
            found["workers"].append(run("ray", epochs=2, seed=seed, workers=CORES))
        for count in epochs:
            found["bare"][count].append(run("bare", epochs=count, seed=seed))
        found["tutorial"].append(run_tutorial(seed))
    return found


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Median, lowest and highest."""
    low, middle, high = (f"{value:,.{digits}f}" for value in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low} to {high})"


def of(runs: Sequence[dict[str, float]], key: str) -> list[float]:
    return [run[key] for run in runs]


def print_table(found: dict[str, Any]) -> None:
    rates = {
        name: of(found[name], "images_per_second") for name in ("tutorial-step", "tutorial-network", "one", "pair")
    }
    inside, bare, workers = (of(found[name], "images_per_second") for name in ("ray", "alone", "workers"))
    epoch = [epochs[-1]["seconds"] / len(epochs) for epochs in found["tutorial"]]

    def ratio(one: Sequence[float], other: Sequence[float]) -> str:
        return f"{statistics.median(one) / statistics.median(other):.2f}"

    print(f"tutorial's script, images/s             {spread(rates['tutorial-step'])}")
    print(f"its network by fmtune's step, images/s  {spread(rates['tutorial-network'])}", end="")
    print(f"  ratio {ratio(rates['tutorial-network'], rates['tutorial-step'])}")
    print(f"default configuration, images/s: bare   {spread(bare)}")
    print(f"  inside Ray                            {spread(inside)}  ratio {ratio(inside, bare)}")
    print(f"  by {CORES} workers of one core             {spread(workers)}  ratio to one {ratio(workers, inside)}")
    print(f"one trial of {CORES} threads, images/s          {spread(rates['one'])}")
    print(
        f"two of one thread side by side          {spread(rates['pair'])}  ratio {ratio(rates['pair'], rates['one'])}"
    )
    print(f"an epoch of the tutorial's script, s    {spread(epoch, 1)}")
    print(f"its epochs to {TUTORIAL_BEST}, best accuracy   ", end="")
    print(", ".join(f"{len(e)}: {max(of(e, 'accuracy')):.4f}" for e in found["tutorial"]))
    print("fmtune, epochs: test accuracy, seconds of training")
    for count, runs in found["bare"].items():
        accuracy, seconds = of(runs, "accuracy"), of(runs, "seconds")
        mean = statistics.fmean(accuracy)
        print(f"  {count:>2}: {mean:.4f} ({min(accuracy):.4f} to {max(accuracy):.4f})  {spread(seconds, 1)}")
    for target in TARGETS:
        enough = [count for count, runs in found["bare"].items() if statistics.fmean(of(runs, "accuracy")) >= target]
        if enough:
            seconds = statistics.median(of(found["bare"][min(enough)], "seconds"))
            share = seconds / statistics.median(epoch)
            print(f"to {target}: {seconds:.1f} s, {share:.2f} epochs of the tutorial's script")
        else:
            print(f"to {target}: not reached")
    tutorial = [epochs[-1]["seconds"] for epochs in found["tutorial"]]
    print(f"the tutorial's script to {TUTORIAL_BEST} or its 20th epoch, s: {spread(tutorial, 0)}")
    memory = {name: max(of(found[name], "memory")) for name in ("tutorial-step", "tutorial-network", "ray")}
    memory["bare"] = max(of(found["alone"], "memory"))
    print("peak memory, MiB: " + ", ".join(f"{name} {value:,.0f}" for name, value in memory.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 2, 3, 4, 6])
    parser.add_argument("--output", type=Path, default=Path("training.json"))
    parser.add_argument("--role", choices=ROLES, help=argparse.SUPPRESS)
    parser.add_argument("--arguments", type=json.loads, default={}, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        print(json.dumps(ROLES[options.role](**options.arguments)))
        return
    found = measure_all(options.seeds, options.epochs)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    options.output.write_text(json.dumps({"cores": CORES, "versions": versions, **found}, indent=2) + "\n")
    print_table(found)


if __name__ == "__main__":
    main()
