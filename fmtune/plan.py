"""What a run would do, said before it is done."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console

from fmtune.data import TrainingData, load_training_data
from fmtune.model import count_parameters, create_model
from fmtune.space import Space
from fmtune.view import format_seconds


def print_plan(console: Console, space: Space, path: Path) -> None:
    """Read the data and say what would be run, where, and for how long; nothing is started.

    Raises:
        DataError: the training source is missing or malformed.
    """
    data = load_training_data(space.data)
    for name, text in _describe(space, data, path):
        console.print(f"{name:<11}{text}", markup=False, highlight=False, soft_wrap=True)


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
        lines.append(("then", f"{search.finalists} finalists, refit: {'yes' if search.refit else 'no'}"))
        lines += [("searched", f"{key}: {searched.as_yaml()}") for key, searched in space.ranges.items()]
    lines.append(("time", format_seconds(search.time) if search.time else "no limit"))
    network = create_model(space.baseline.model, channels, len(data.classes))
    what = "network" if space.is_single else "baseline"
    lines.append((what, f"{count_parameters(network):,} parameters, {space.baseline.epochs} epochs"))
    cpus = f"{resources.cpus:g}" if resources.cpus else ("all" if space.is_single else "1")
    lines.append(
        (
            "a trial",
            f"{resources.workers} worker(s) of {cpus} CPUs and {resources.gpus:g} GPUs; {os.cpu_count()} CPUs here",
        )
    )
    lines.append(("run", str(path)))
    return lines
