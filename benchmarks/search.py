"""fmtune's search beside other ways to spend the same minutes on the same space.

    python benchmarks/search.py [--minutes 10] [--seeds 3] [--output search.json]

The space is `search_spaces/default.yaml` on full Fashion-MNIST, without the configuration that it starts with: each way
has to find one as good. The ways:

- fmtune: `fmtune.search`, as `fmtune search` runs it.
- random: the same without a model of what has been seen and without early stopping.
- ray: a Tune function with a `TorchTrainer` of one worker within, `OptunaSearch` and `ASHAScheduler`, images from a
  `DataLoader`, as Ray's documentation has it. Function and worker take the CPU that each has by default, which is one
  trial at a time on two cores.
- ray-packed: the same with functions that ask for a twentieth of a CPU, so that there are two trials side by side.
- optuna: one process with all cores, images in memory, Optuna's TPE and Hyperband pruner; the step is fmtune's.

Networks and optimizers are fmtune's in all of them. Each run is a process of its own and alone; with each seed every
way has its turn. The test split is read once a run, by the model that it chose on the validation rows. What `--output`
has already is not run again, so that a comparison may be made in several goes. Prints a table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import torch
from torch import Tensor
from training import CORES, fit_rows, test_accuracy

import fmtune
from fmtune.checkpoint import create_trained_model
from fmtune.config import TrialConfig
from fmtune.data import TrainingData, load_training_data
from fmtune.space import Space
from fmtune.training import EpochMetrics, TrainingState

SPACE = Path(__file__).parent.parent / "search_spaces" / "default.yaml"
EPOCHS = 5
"""Those of a whole training in that space."""
MARKS = (2, 4, 6, 8, 10)
"""Minutes at which the table says what has been reached."""


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        trials: that were begun.
        images: trained on, repetitions included.
        val_accuracy: of the choice, on the validation rows.
        test_accuracy: of the same model, or of its refit where the way has one.
        seconds: that all of it took.
        curve: seconds from the start, and the best validation accuracy of any trial by then.
    """

    trials: int
    images: int
    val_accuracy: float
    test_accuracy: float
    seconds: float
    curve: list[tuple[float, float]]


def load_space(seconds: float, seed: int, *overrides: str) -> Space:
    values = [f"search.time={seconds:g}s", f"search.seed={seed}", "data.fallback=null", "search.try=[]", *overrides]
    return Space.load(SPACE, values)


def best_so_far(reached: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The rises of a series of (seconds, accuracy)."""
    curve: list[tuple[float, float]] = []
    for seconds, accuracy in sorted(reached):
        if not curve or accuracy > curve[-1][1]:
            curve.append((seconds, accuracy))
    return curve


def search_fmtune(seconds: float, seed: int, *overrides: str) -> Outcome:
    began, started = time.time(), time.monotonic()
    with tempfile.TemporaryDirectory() as runs:
        result = fmtune.search(load_space(seconds, seed, *overrides), runs=runs)
        spent = time.monotonic() - started
        lines = [
            json.loads(line)
            for path in (result.folder.path / "ray" / "search").glob("*/result.json")
            for line in path.read_text().splitlines()
        ]
    summary = result.summary
    return Outcome(
        trials=sum(summary["trials"].values()),
        images=summary["images_trained"],
        val_accuracy=summary["val_accuracy"],
        test_accuracy=summary["test_accuracy"],
        seconds=spent,
        curve=best_so_far([(line["timestamp"] - began, line["val_accuracy"]) for line in lines]),
    )


def search_random(seconds: float, seed: int) -> Outcome:
    return search_fmtune(seconds, seed, "search.sampler=random", "search.scheduler=none")


def search_optuna(seconds: float, seed: int) -> Outcome:
    """One training after the other; what is under way when the time is up counts as stopped."""
    started = time.monotonic()
    space = load_space(seconds, seed)
    data = load_training_data(space.data)
    torch.set_num_threads(CORES)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=seed),
        pruner=optuna.pruners.HyperbandPruner(min_resource=1, max_resource=EPOCHS, reduction_factor=3),
    )
    reached: list[tuple[float, float]] = []
    best: tuple[float, TrialConfig, dict[str, Tensor]] | None = None
    while time.monotonic() - started < seconds and len(study.trials) < space.search.trials:
        trial = study.ask()
        config = space.trial_config(space.suggest(trial))
        last: list[tuple[float, dict[str, Tensor]]] = []

        def report(
            metrics: EpochMetrics,
            state: TrainingState,
            trial: optuna.Trial = trial,
            last: list[tuple[float, dict[str, Tensor]]] = last,
        ) -> None:
            assert metrics.val_accuracy is not None
            reached.append((time.monotonic() - started, metrics.val_accuracy))
            weights = {name: value.clone() for name, value in state.best_network.state_dict().items()}
            last[:] = [(metrics.val_accuracy, weights)]
            trial.report(metrics.val_accuracy, metrics.epoch)
            if trial.should_prune() or time.monotonic() - started > seconds:
                raise optuna.TrialPruned

        try:
            fit_rows(data, config, data.train_rows, data.validation_rows, seed * 1000 + trial.number, report)
        except optuna.TrialPruned:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(trial, last[0][0])
        if last and (best is None or last[0][0] > best[0]):
            best = (last[0][0], config, last[0][1])
    assert best is not None
    spent = time.monotonic() - started
    return Outcome(
        trials=len(study.trials),
        images=len(reached) * len(data.train_rows),
        val_accuracy=best[0],
        test_accuracy=_test(data, best[1], best[2]),
        seconds=spent,
        curve=best_so_far(reached),
    )


def search_ray(seconds: float, seed: int, driver_cpus: float = 1.0, side_by_side: int = CORES // 2) -> Outcome:
    """`side_by_side` trials; what their functions leave of the cores is their workers'."""
    import documented
    import ray
    import ray.train
    from ray import tune
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    # fmtune turns them off, and a script of one's own has them: the epochs of each trial are in what they write.
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "0"
    began, started = time.time(), time.monotonic()
    space = load_space(seconds, seed)
    ray.init(log_to_driver=False, logging_level="ERROR")
    folder = tempfile.mkdtemp(prefix="search-ray-")
    worker_cpus = CORES / side_by_side - driver_cpus

    def tune_one(config: dict[str, Any]) -> None:
        trainer = TorchTrainer(
            documented.train,
            train_loop_config=config["trial"],
            scaling_config=ray.train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": worker_cpus}),
            run_config=ray.train.RunConfig(
                name=tune.get_context().get_trial_id(), storage_path=folder, callbacks=[TuneReportCallback()]
            ),
        )
        trainer.fit()

    tuner = tune.Tuner(
        tune.with_resources(tune_one, {"CPU": driver_cpus}),
        tune_config=tune.TuneConfig(
            metric="val_accuracy",
            mode="max",
            search_alg=OptunaSearch(
                space=partial(documented.define, space),
                metric="val_accuracy",
                mode="max",
                seed=seed,
            ),
            scheduler=ASHAScheduler(max_t=EPOCHS, grace_period=1, reduction_factor=3),
            num_samples=space.search.trials,
            max_concurrent_trials=side_by_side,
            time_budget_s=seconds - (time.monotonic() - started),
        ),
        run_config=tune.RunConfig(name="search", storage_path=folder, verbose=0),
    )
    grid = tuner.fit()
    spent = time.monotonic() - started
    frames = [result.metrics_dataframe for result in grid if result.metrics_dataframe is not None]
    reached = [
        (float(row["timestamp"]) - began, float(row["val_accuracy"]))
        for frame in frames
        if "val_accuracy" in frame
        for _, row in frame.iterrows()
    ]
    best = grid.get_best_result()
    assert best.metrics is not None
    weights = torch.load(Path(best.metrics["checkpoint_path"]) / "model.pt", weights_only=True)
    ray.shutdown()
    data = load_training_data(space.data)
    return Outcome(
        trials=len(grid),
        images=len(reached) * len(data.train_rows),
        val_accuracy=float(best.metrics["val_accuracy"]),
        test_accuracy=_test(data, TrialConfig.model_validate(best.metrics["config"]["trial"]), weights),
        seconds=spent,
        curve=best_so_far(reached),
    )


def _test(data: TrainingData, config: TrialConfig, weights: Mapping[str, Tensor]) -> float:
    return test_accuracy(create_trained_model(config, data.pixels, data.classes, data.image_shape, dict(weights)))


WAYS: dict[str, Callable[[float, int], Outcome]] = {
    "fmtune": search_fmtune,
    "ray": search_ray,
    "ray-packed": partial(search_ray, driver_cpus=0.05, side_by_side=CORES),
    "optuna": search_optuna,
    "random": search_random,
}


def run_all(minutes: float, seeds: int, output: Path) -> dict[str, list[Outcome]]:
    """The outcomes of each way, a seed each; written to `output` after each run."""
    found: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {}
    for seed in range(seeds):
        for way in WAYS:
            key = f"{way} {minutes:g} {seed}"
            if key not in found:
                command = [sys.executable, __file__, "--way", way, "--minutes", str(minutes), "--seed", str(seed)]
                finished = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
                found[key] = json.loads(finished.stdout.splitlines()[-1])
                output.write_text(json.dumps(found, indent=2) + "\n")
            print(key, {name: value for name, value in found[key].items() if name != "curve"}, file=sys.stderr)
    return {way: [Outcome(**found[f"{way} {minutes:g} {seed}"]) for seed in range(seeds)] for way in WAYS}


def _at(curve: Sequence[Sequence[float]], seconds: float) -> float:
    """The best accuracy by then, 0 before the first."""
    return max((accuracy for reached, accuracy in curve if reached <= seconds), default=0.0)


def describe(found: Mapping[str, Sequence[Outcome]]) -> Iterator[str]:
    """The rows of a Markdown table."""
    marks = " | ".join(f"{mark} min" for mark in MARKS)
    yield f"| way | trials | images, millions | test accuracy | validation accuracy at {marks} |"
    yield "|---|---|---|---|" + "---|" * len(MARKS)
    for way, outcomes in found.items():
        trials = statistics.median(outcome.trials for outcome in outcomes)
        images = statistics.median(outcome.images for outcome in outcomes) / 1e6
        tests = [outcome.test_accuracy for outcome in outcomes]
        test = f"{statistics.fmean(tests):.4f} ({min(tests):.4f} to {max(tests):.4f})"
        curve = (f"{statistics.fmean(_at(outcome.curve, 60 * mark) for outcome in outcomes):.4f}" for mark in MARKS)
        yield f"| {way} | {trials:g} | {images:.2f} | {test} | {' | '.join(curve)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("search.json"))
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(asdict(WAYS[options.way](60 * options.minutes, options.seed))))
        return
    for line in describe(run_all(options.minutes, options.seeds, options.output)):
        print(line)


if __name__ == "__main__":
    main()
