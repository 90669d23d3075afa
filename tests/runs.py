"""Finished run folders, for tests of what is made of them."""

from __future__ import annotations

import math
import random
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tables import sample_rows

from fmtune.calibration import find_mistakes, measure_calibration
from fmtune.checkpoint import write_json
from fmtune.run import RunFolder, TrialRecord
from fmtune.space import Space
from fmtune.training import EpochMetrics

HOSTILE = "<script>alert(1)</script>"
EPOCHS = 6
SPACE = {
    "data": {"train": "sample"},
    "search": {"trials": 40, "time": "10m"},
    "baseline": "seed",
    "trial": {
        "epochs": EPOCHS,
        "batch_size": {"choice": [128, 256, 512]},
        "model": {
            "depth": {"choice": [10, 18, 34]},
            "width": {"int": [8, 64]},
            "channels": {"choice": [None, 3]},
        },
        "augment": {"erase": {"float": [0, 0.5]}, "cutmix": {"choice": [0, 1.0]}},
        "optim": {
            "name": {"choice": ["adamw", "sgd", "muon"]},
            "lr": {"log": [1.0e-4, 3.0e-2]},
            "momentum": {"float": [0.8, 0.99], "when": {"optim.name": ["sgd", "muon"]}},
        },
    },
}
CLASSES = ["T-shirt/top", HOSTILE, "Fish & chips", '"quoted"']
NAMES = [*CLASSES, "never"]
CONFUSION = [[200, 20, 20, 10], [25, 220, 3, 2], [30, 10, 205, 5], [2, 3, 0, 245]]

DIFFERENCE = {"difference": 0.0788, "interval": [0.0544, 0.1032], "p_value": 1e-9, "gained": 120, "lost": 41}


def create_run(path: Path, trials: int = 40, *, test: bool = True, overfit: bool = False) -> RunFolder:
    """A search's folder: the learning rate decides, and two trials of three are stopped early."""
    space = Space.load(SPACE)
    folder = RunFolder.create(path, space.to_yaml(), "made-up")
    records = [_create_record(space, number, overfit) for number in range(trials)]
    if trials > 5:
        records[5].state, records[5].history = "failed", []
    _write(folder, records, list(space.ranges))
    complete = [record for record in records[1:] if record.state == "complete"]
    best = max(complete or records, key=_accuracy)
    folder.write_summary(_summarise(records, best, test))
    _write_best(folder, best, describe_test() | examine_test() if test else None)
    return folder


def create_training(path: Path) -> RunFolder:
    """A single training's folder, without a test split."""
    space = Space.load({"data": {"train": "images.csv"}, "trial": {"epochs": EPOCHS}}).as_single_training()
    folder = RunFolder.create(path, space.to_yaml(), "made-up")
    record = TrialRecord(0, space.baseline, {}, "complete", _create_history(0.8, EPOCHS, False))
    _write(folder, [record], [])
    summary = _summarise([record], record, test=False)
    dataset = summary["dataset"] | {"source": "images.csv"}
    folder.write_summary(
        summary | {"dataset": dataset, "baseline": None, "finalists": [], "outlook": None, "refit": False}
    )
    _write_best(folder, record, None)
    return folder


def _create_record(space: Space, number: int, overfit: bool) -> TrialRecord:
    if number == 0:
        return TrialRecord(
            0, space.baseline, space.params_of(space.baseline), "complete", _create_history(0.8, 6, False)
        )
    drawn = space.suggest(_Draws(number))
    quality = 0.9 - 0.05 * abs(math.log10(float(drawn["optim.lr"] or 0)) + 2) ** 2  # best at 0.01
    epochs = EPOCHS if number % 3 == 1 else 1 + number % 2
    state: Any = "complete" if epochs == EPOCHS else "pruned"
    cost = 1 + float(drawn["model.width"] or 0) / 32
    return TrialRecord(number, space.trial_config(drawn), drawn, state, _create_history(quality, epochs, overfit, cost))


class _Draws:
    """A trial's draws, the same ones each time."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return self._random_of(name).choice(choices)

    def suggest_int(self, name: str, low: int, high: int) -> int:
        return self._random_of(name).randint(low, high)

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        drawn = self._random_of(name)
        return math.exp(drawn.uniform(math.log(low), math.log(high))) if log else drawn.uniform(low, high)

    def _random_of(self, name: str) -> random.Random:
        return random.Random(f"{self._seed} {name}")


def _create_history(quality: float, epochs: int, overfit: bool, cost: float = 1.0) -> list[EpochMetrics]:
    losses = [0.9, 0.7, 0.6, 0.65, 0.75, 0.9] if overfit else [0.9, 0.7, 0.6, 0.55, 0.52, 0.51]
    return [
        EpochMetrics(e, 1.2 / e, losses[e - 1] / quality, quality * (1 - 0.5 / (e + 1)), 0.01, 1500.0, 2.0 * e * cost)
        for e in range(1, epochs + 1)
    ]


def _write(folder: RunFolder, records: list[TrialRecord], columns: list[str]) -> None:
    for record in records:
        for epoch in record.history:
            folder.append_history(record.number, epoch)
    folder.write_trials(records, columns)


def _write_best(folder: RunFolder, best: TrialRecord, test: dict[str, Any] | None) -> None:
    """What the report reads of the kept model."""
    folder.best.mkdir()
    save_file({"fc.weight": np.zeros((3, 4)), "bn1.running_mean": np.zeros(5)}, folder.best / "model.safetensors")
    write_json(folder.best / "metrics.json", {"refit": True, "test": test})
    write_json(folder.best / "config.json", {"trial": best.config.model_dump(mode="json")})
    write_json(folder.best / "classes.json", [{"label": i, "name": name} for i, name in enumerate(NAMES)])


def _accuracy(record: TrialRecord) -> float:
    return (record.last and record.last.val_accuracy) or 0.0


def _summarise(records: list[TrialRecord], best: TrialRecord, test: bool) -> dict[str, Any]:
    """What fmtune/summary.py writes."""
    sizes = {"train": 5400, "validation": 600, "test": 1000 if test else None}
    return {
        "dataset": {"source": "sample", "origin": f"from {HOSTILE}", **sizes, "shape": [1, 28, 28], "classes": 4},
        "trials": {state: sum(r.state == state for r in records) for state in ("complete", "pruned", "failed")},
        "best_trial": best.number,
        "params": best.params,
        "val_accuracy": 0.8473,
        "test_accuracy": 0.87 if test else None,
        "test_interval": [0.8477, 0.8894] if test else None,
        "test_loss": 0.4 if test else None,
        "baseline": {
            "val_accuracy": 0.7429,
            "test_accuracy": 0.7912 if test else None,
            "difference": dict(DIFFERENCE) if test else None,
            "epochs": 6,
            "of_epochs": 6,
            "cause": None,
        },
        "outlook": {"metric": "val_accuracy", "gain": 0.0031, "low": 0.0, "high": 0.0112, "trials": 39},
        "seconds": 605.0,
        "images_trained": 1234567,
        "finalists": [
            {
                "trial": best.number,
                "val_accuracy": 0.8473,
                "val_loss": 0.45,
                "seeds": [{"val_accuracy": 0.84, "val_loss": 0.4}, {"val_accuracy": 0.8546, "val_loss": 0.5}],
            }
        ],
        "refit": True,
        "broken_off": None,
        "failures": [{"trial": r.number, "cause": HOSTILE, "config": {}} for r in records if r.state == "failed"],
    }


def describe_test() -> dict[str, Any]:
    """`Measured.as_dict()` of `CONFUSION`, and a class that never occurs nor is predicted."""
    matrix = [[*row, 0] for row in CONFUSION] + [[0] * 5]
    classes = []
    for i, name in enumerate(NAMES):
        hits, true, predicted = matrix[i][i], sum(matrix[i]), sum(row[i] for row in matrix)
        ratios = {
            "precision": hits / predicted if predicted else None,
            "recall": hits / true if true else None,
            "f1": 2 * hits / (true + predicted) if true + predicted else None,
        }
        classes.append({"label": i, "name": name, "images": true, **ratios})
    return {"accuracy": 0.87, "interval": [0.8477, 0.8894], "loss": 0.4, "per_class": classes, "confusion": matrix}


@cache
def examine_test() -> dict[str, Any]:
    """Calibration and mistakes of predictions that come to `CONFUSION`, as sure where wrong as where right."""
    pairs = [(i, j) for i, row in enumerate(CONFUSION) for j, count in enumerate(row) for _ in range(count)]
    labels, predicted = np.random.default_rng(0).permutation(pairs).T
    confidence = (0.25 + 0.75 * np.random.default_rng(1).beta(9, 1, len(labels))).astype(np.float32)
    mistakes = find_mistakes(sample_rows("test", 100).images, labels, predicted, confidence)
    return {
        "calibration": asdict(measure_calibration(confidence, labels == predicted)),
        "mistakes": [asdict(mistake) for mistake in mistakes],
    }
