"""What a run would do, said before it is done."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from rich.console import Console

from fmtune.config import FINALIST_ROUNDS
from fmtune.data import TrainingData, load_training_data
from fmtune.model import count_parameters, create_model
from fmtune.population import count_segments
from fmtune.probe import check_channels, count_full_trainings, probe_space, read_all_weights
from fmtune.space import Space
from fmtune.view import format_seconds, print_plain


def print_plan(console: Console, space: Space, path: Path) -> None:
    """Read the data, try a few training steps, and say what would be run, for how long; nothing else is started.

    Raises:
        DataError: the training source is missing or malformed.
        InputError: weights to start from can't be had, or don't fit a network.
    """
    data = load_training_data(space.data)
    check_channels(space, data)
    for name, text in _describe(space, data, path):
        print_plain(console, f"{name:<11}{text}")


def _describe(space: Space, data: TrainingData, path: Path) -> list[tuple[str, str]]:
    search, resources = space.search, space.resources
    channels, height, width = data.image_shape
    lines = [
        ("data", f"{data.loaded.source} ({data.loaded.origin})"),
        ("rows", f"{len(data.train_rows):,} to train on, {len(data.validation_rows):,} to validate on"),
        ("images", f"{height} x {width} x {channels}, {len(data.classes)} classes"),
    ]
    if not space.is_single:
        lines.append(("trials", f"{space.trials}, by {search.sampler}, stopped early by {search.scheduler}"))
        lines.append(("then", f"{search.retrained} finalists, refit: {'yes' if search.refit else 'no'}"))
        lines += [("searched", f"{key}: {searched.as_yaml()}") for key, searched in space.ranges.items()]
    limit = space.time_limit
    lines.append(("time", format_seconds(limit) if limit else "no limit"))
    if search.cost is not None:
        lines.append(("cost", f"{search.cost:g} at most, at {resources.price:g} an hour"))
    network = create_model(space.baseline.model, channels, len(data.classes))
    what = "network" if space.is_single else "baseline"
    lines.append((what, f"{count_parameters(network):,} parameters, {space.baseline.epochs} epochs"))
    lines += [("weights", line) for line in read_all_weights(space, data)[1]]
    cpus = f"{resources.cpus:g}" if resources.cpus else ("all" if space.is_single else "1")
    lines.append(
        (
            "a trial",
            f"{resources.workers} worker(s) of {cpus} CPUs and {resources.gpus:g} GPUs; {os.cpu_count()} CPUs here",
        )
    )
    return [*lines, *_describe_probes(space, data), ("run", str(path))]


def _describe_probes(space: Space, data: TrainingData) -> list[tuple[str, str]]:
    """What the cheapest and the dearest configuration would take, from a few steps of each."""
    if space.resources.gpus and not torch.cuda.is_available():
        return [("speed", "not tried: trials want a GPU, and there is none here")]
    slots = _count_slots(space)
    probes, memory = probe_space(space, data, threads=max(1, (os.cpu_count() or 1) // slots))
    names = ["cheapest", "dearest"] if len(probes) > 1 else ["training"]
    lines = [
        (name, f"{probe.epoch_seconds:.1f} s an epoch, {probe.seconds:.0f} s to its end, by a few steps tried now")
        for name, probe in zip(names, probes, strict=True)
    ]
    if space.time_limit and not space.is_single:
        fewest, most = count_full_trainings(probes, space.time_limit, slots)
        span = f"{fewest} to {most}" if fewest < most else str(most)
        lines.append(("fits", f"{span} trainings to the last epoch, {slots} side by side; more where they stop early"))
    if not space.time_limit and space.resources.price is not None:
        trainings = (space.trials + FINALIST_ROUNDS * space.search.retrained) / slots + space.search.refit
        cost = trainings * probes[-1].seconds / 3600 * space.resources.price
        lines.append(("cost", f"{cost:.2f} at most, if no trial stops early"))
    # Each trial, each seed of a finalist and the refit keep one; of a population each part of a training does.
    trials = count_segments(space, space.max_epochs) if space.search.scheduler == "pbt" else space.trials
    checkpoints = trials + FINALIST_ROUNDS * space.search.retrained + space.search.refit
    disk = checkpoints * max(probe.checkpoint_bytes for probe in probes)
    lines.append(("memory", f"{memory / 2**20:,.0f} MiB in each trial's process, as in this one"))
    lines.append(("disk", f"{disk / 2**20:,.0f} MiB of checkpoints at most"))
    return lines


def _count_slots(space: Space) -> int:
    """Trials that fit side by side on the CPUs and GPUs here; one at least."""
    resources = space.resources
    slots = (os.cpu_count() or 1) / (resources.workers * (resources.cpus or 1))
    if resources.gpus:
        slots = min(slots, torch.cuda.device_count() / (resources.workers * resources.gpus))
    return 1 if space.is_single else max(1, int(slots + 1e-9))
