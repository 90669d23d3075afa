"""Simulated searches: what a sampler, a scheduler or an ending is worth, over many seeds in minutes.

    python benchmarks/simulated.py [--seeds 200] [--minutes 10 30]
    python benchmarks/simulated.py --measure 48 --part 0     # and 1, side by side: adds to curves.json

Real searches of ten minutes differ by 0.003 from seed to seed, so that a few of them tell nothing of a change worth
half of that. Here a Gaussian process through the curves of measured trainings, configurations that cover
`search_spaces/default.yaml`, stands for training. All else is as in a search of fmtune on two cores: its sampler,
ASHA's rungs, two trials side by side, a baseline, the time set aside for finalists and refit. Needs scikit-learn.

The table gives the accuracy, by the process itself and so without the luck of a training, of what each way chooses.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import random
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from numpy.typing import NDArray
from optuna.trial import TrialState
from search import EPOCHS, load_space
from training import fit_rows

from fmtune.config import flatten
from fmtune.data import load_training_data
from fmtune.samplers import STARTUP_TRIALS, create_tpe

CURVES = Path(__file__).parent / "curves.json"
SPACE = load_space(seconds=600, seed=0)
RUNGS, REDUCTION, SLOTS = (1, 3), 3, 2
START, CLOSING, PHASE = 12.0, 12.0, 8.0
"""Seconds until the first trial begins; of the end; of a phase beside training."""
REFIT_SHARE = 0.75
"""Seconds that a training on both cores is reckoned to take, of those on one."""
SCATTER = (0.10, 0.06, 0.05, 0.035, 0.02)
"""Standard deviation of the logarithm of the error from one training to the next, by epoch."""
Values = Mapping[str, Any]


def _features(values: Values) -> list[float]:
    """A configuration as numbers of about 0 to 1."""
    name, log = values["optim.name"], math.log
    return [
        *(float(name == one) for one in ("muon", "adamw", "sgd")),
        float(values["batch_size"] == 256),
        (values["model.width"] - 8) / 8,
        values["augment.translate"] / 2,
        values["augment.erase"] / 0.2,
        log(values["optim.lr"] / 3e-3) / log(100 / 3),
        (values.get("optim.momentum", 0.875) - 0.8) / 0.15,
        log(values["optim.weight_decay"] / 1e-3) / log(200),
        values["optim.label_smoothing"] / 0.2,
    ]


class World:
    """What training comes to, by a Gaussian process for each epoch on the logarithm of the validation error."""

    def __init__(self) -> None:
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

        measured = json.loads(CURVES.read_text(encoding="utf-8"))
        points = np.array([_features(one["values"]) for one in measured])
        errors = np.log([[1 - accuracy for accuracy in one["accuracy"]] for one in measured])
        kernel = ConstantKernel(1.0) * Matern(np.ones(points.shape[1]), (0.1, 30), nu=2.5) + WhiteKernel(
            0.05, (1e-3, 1)
        )
        self._processes = [
            GaussianProcessRegressor(kernel, normalize_y=True, n_restarts_optimizer=2, random_state=0).fit(
                points, of_epoch
            )
            for of_epoch in errors.T
        ]
        self._known: dict[str, NDArray[np.float64]] = {}

    def accuracy(self, values: Values) -> float:
        """After a whole training, on average over seeds."""
        return float(1 - np.exp(self._errors(values)[-1]))

    def train(self, values: Values, draws: random.Random) -> list[float]:
        """Accuracy after each epoch, of one training."""
        return [1 - math.exp(e + s * draws.gauss(0, 1)) for e, s in zip(self._errors(values), SCATTER, strict=True)]

    def _errors(self, values: Values) -> NDArray[np.float64]:
        key = json.dumps(values, sort_keys=True)
        if key not in self._known:
            point = np.array([_features(values)])
            self._known[key] = np.array([float(process.predict(point)[0]) for process in self._processes])
        return self._known[key]


def epoch_seconds(values: Values) -> float:
    """Of an epoch on one core, the other one at work too: 14.6 s at width 16, as measured."""
    batches = 1.15 if values["batch_size"] == 128 else 1.0
    return float((4.5 + 10.1 * (values["model.width"] / 16) ** 1.2) * batches)


@dataclass(frozen=True)
class Way:
    """A way to search; `sampler` is made from a seed, and `plan` gives the first values from it."""

    sampler: Callable[[int], optuna.samplers.BaseSampler]
    plan: Callable[[int], Sequence[Values]] = lambda seed: []
    stops: bool = True
    finalists: bool = False


@dataclass
class _Trial:
    number: int
    values: Values | None
    curve: Sequence[float]
    seconds: float
    epochs: int
    asked: optuna.Trial
    done: list[float] = field(default_factory=list)
    is_whole: bool = False

    @property
    def whole_seconds(self) -> float:
        return EPOCHS * self.seconds


class Search:
    """One simulated search: trials of two slots in the order of time."""

    def __init__(self, world: World, way: Way, seed: int, limit: float) -> None:
        self._world, self._way, self._limit = world, way, limit
        self._draws = random.Random(seed)
        self._plan = list(way.plan(seed))
        self._study = optuna.create_study(direction="maximize", sampler=way.sampler(seed))
        self._rungs: dict[int, list[float]] = {rung: [] for rung in RUNGS}
        self._trials: list[_Trial] = []

    def run(self) -> tuple[float, int]:
        """The accuracy of what is chosen, and how many trials were begun."""
        under_way = [(START + slot, slot) for slot in range(SLOTS)]
        running: dict[int, _Trial] = {}
        now = START
        while under_way:
            now, slot = heapq.heappop(under_way)
            if slot in running and self._end_epoch(running[slot], now):
                heapq.heappush(under_way, (now + running[slot].seconds, slot))
                continue
            if self._can_begin(now):
                running[slot] = self._begin()
                heapq.heappush(under_way, (now + running[slot].seconds, slot))
        drawn = [trial for trial in self._trials if trial.values and trial.done]
        whole = [trial for trial in drawn if trial.is_whole] or drawn
        leaders = sorted(whole, key=lambda trial: trial.done[-1], reverse=True)[:2]
        winner = self._retrain(leaders, now) if self._way.finalists else leaders[0]
        assert winner.values is not None
        return self._world.accuracy(winner.values), len(self._trials)

    def _begin(self) -> _Trial:
        if self._trials and self._plan:
            self._study.enqueue_trial(dict(self._plan.pop(0)))
        asked = self._study.ask()
        if not self._trials:
            # What it comes to is not looked at.
            seconds, epochs = epoch_seconds(flatten(SPACE.baseline)), SPACE.baseline.epochs
            trial = _Trial(0, None, [0.0] * epochs, seconds, epochs, asked)
        else:
            values = SPACE.suggest(asked)
            curve = self._world.train(values, self._draws)
            trial = _Trial(len(self._trials), values, curve, epoch_seconds(values), EPOCHS, asked)
        self._trials.append(trial)
        return trial

    def _end_epoch(self, trial: _Trial, now: float) -> bool:
        """Enter an epoch; whether the trial goes on."""
        trial.done.append(trial.curve[len(trial.done)])
        epoch, value = len(trial.done), trial.done[-1]
        trial.asked.report(value, epoch)
        stops = epoch < trial.epochs and (self._is_stopped(trial) or not self._can_go_on(trial, now))
        if epoch < trial.epochs and not stops:
            return True
        trial.is_whole = epoch == EPOCHS
        if trial.is_whole:
            self._study.tell(trial.asked, value)
        else:
            self._study.tell(trial.asked, state=TrialState.PRUNED)
        return False

    def _is_stopped(self, trial: _Trial) -> bool:
        if trial.values is None or not self._way.stops or len(trial.done) not in self._rungs:
            return False
        rung = self._rungs[len(trial.done)]
        stays = not rung or trial.done[-1] >= np.percentile(rung, 100 * (1 - 1 / REDUCTION))
        rung.append(trial.done[-1])
        return not stays

    def _left(self, now: float) -> float:
        """Seconds that the search itself has left."""
        measured = sorted((t for t in self._trials if t.values and t.done), key=lambda t: t.done[-1], reverse=True)[:2]
        if not measured:
            return self._limit - now
        longest = max(trial.whole_seconds for trial in measured)
        finalists = PHASE + longest + PHASE if self._way.finalists and len(measured) > 1 else 0.0
        return self._limit - now - finalists - _ending(longest)

    def _can_begin(self, now: float) -> bool:
        epochs = EPOCHS if any(trial.is_whole for trial in self._trials) else 1
        return self._left(now) > min((epochs * t.seconds for t in self._trials if t.values and t.done), default=0.0)

    def _can_go_on(self, trial: _Trial, now: float) -> bool:
        further = EPOCHS - len(trial.done) if any(t.is_whole for t in self._trials) else 1
        return further * trial.seconds <= self._left(now)

    def _retrain(self, leaders: Sequence[_Trial], now: float) -> _Trial:
        """Round after round from fresh seeds, as long as there is time; the best mean."""
        if len(leaders) < 2:
            return leaders[0]
        found: dict[int, list[float]] = {trial.number: [] for trial in leaders}
        longest = max(trial.whole_seconds for trial in leaders)
        now += PHASE
        while now + longest + _ending(longest) <= self._limit and len(found[leaders[0].number]) < 5:
            now += longest
            for trial in leaders:
                assert trial.values is not None
                found[trial.number].append(self._world.train(trial.values, self._draws)[-1])
        if not found[leaders[0].number]:
            return leaders[0]
        return max(leaders, key=lambda trial: statistics.fmean(found[trial.number]))


def _ending(longest: float) -> float:
    """Seconds of the refit on both cores, of a training that takes so long on one, and of the end."""
    return PHASE + REFIT_SHARE * longest * 10 / 9 + CLOSING


def _cost(config: Any) -> float:
    return float(config.model.width)


def _even_plan(seed: int) -> list[Values]:
    """The first random trials of fmtune: a Latin hypercube, the cheapest first."""
    return list(SPACE.planned(STARTUP_TRIALS, _cost, seed).values())


def _random_plan(seed: int) -> list[Values]:
    """Each drawn apart from the others, the cheapest first."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    drawn = [SPACE.suggest(study.ask()) for _ in range(STARTUP_TRIALS)]
    return sorted(drawn, key=lambda values: values["model.width"])


WAYS: dict[str, Way] = {
    "fmtune": Way(create_tpe, _even_plan),
    "with finalists": Way(create_tpe, _even_plan, finalists=True),
    "prior weight 1": Way(partial(create_tpe, prior_weight=1.0), _even_plan),
    "prior weight 2": Way(partial(create_tpe, prior_weight=2.0), _even_plan),
    "prior weight 10": Way(partial(create_tpe, prior_weight=10.0), _even_plan),
    "first trials drawn apart": Way(create_tpe, _random_plan),
    "without early stopping": Way(create_tpe, _even_plan, stops=False),
    "random, without early stopping": Way(lambda seed: optuna.samplers.RandomSampler(seed=seed), stops=False),
}


def measure(count: int, part: int) -> None:
    """Train every second of `count` configurations that cover the space, and add their curves to `CURVES`."""
    torch.set_num_threads(1)
    data = load_training_data(SPACE.data)
    for number, values in list(SPACE.planned(count, lambda config: 0.0, seed=7).items())[part::2]:
        accuracies: list[float] = []
        config = SPACE.trial_config(values)
        fit_rows(
            data, config, data.train_rows, data.validation_rows, number,
            lambda metrics, state, found=accuracies: found.append(metrics.val_accuracy),  # type: ignore[misc]
        )  # fmt: skip
        known = json.loads(CURVES.read_text(encoding="utf-8")) if CURVES.exists() else []
        known.append({"values": values, "accuracy": [round(accuracy, 5) for accuracy in accuracies]})
        CURVES.write_text("[\n" + ",\n".join(map(json.dumps, known)) + "\n]\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--minutes", type=float, nargs="+", default=[10, 30])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--measure", type=int)
    parser.add_argument("--part", type=int, choices=(0, 1), default=0)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure, options.part)
        return
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")
    world = World()
    print("| way | minutes | accuracy of the choice | worst tenth below | trials |")
    print("|---|---|---|---|---|")
    for minutes in options.minutes:
        for name in options.ways:
            found = [Search(world, WAYS[name], seed, 60 * minutes).run() for seed in range(options.seeds)]
            accuracies = np.array([accuracy for accuracy, _ in found])
            error = accuracies.std() / math.sqrt(len(accuracies))
            trials = statistics.fmean(trials for _, trials in found)
            mean, low = accuracies.mean(), np.quantile(accuracies, 0.1)
            print(f"| {name} | {minutes:g} | {mean:.4f} ± {error:.4f} | {low:.4f} | {trials:.0f} |", flush=True)


if __name__ == "__main__":
    main()
