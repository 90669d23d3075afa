"""What trials of a space would take: weights to start from, and the time of its cheapest and dearest configuration."""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fmtune.batches import Batches
from fmtune.checkpoint import create_preprocess
from fmtune.config import ResourcesConfig, TrialConfig
from fmtune.data import TrainingData, weights_folder
from fmtune.errors import SpaceError
from fmtune.model import count_parameters, create_model
from fmtune.pretrained import Weights, load_pretrained, read_weights, weights_key
from fmtune.space import Space
from fmtune.training import Training

_STEPS = 8
"""Steps that are timed, after as many that warm up."""
_FORWARD_SHARE = 1 / 3
"""Share of a training step's time that evaluating its images takes: no backward pass."""
_STATE_COPIES = 3
"""Weights in a checkpoint: the network's, and up to two moments of the optimizer; a mean of weights is one more."""


@dataclass(frozen=True)
class Probe:
    """A configuration tried for some steps.

    Attributes:
        config: what it trains.
        epoch_seconds: of one epoch, evaluation included, on one trial's resources.
        checkpoint_bytes: of its training state on disk.
    """

    config: TrialConfig
    epoch_seconds: float
    checkpoint_bytes: int

    @property
    def seconds(self) -> float:
        """Of the whole training."""
        return self.epoch_seconds * self.config.epochs


def check_channels(space: Space, data: TrainingData) -> None:
    """Refuse networks for other channels than the images have.

    Raises:
        SpaceError: a configuration asks for them.
    """
    channels = data.image_shape[0]
    if channels == 1:
        return
    for config in space.samples():
        if config.model.channels not in (None, channels):
            key, instead = "trial.model.channels", "leave it null"
            if config is space.baseline:
                key, instead = "baseline.model.channels", "set baseline: default, or values of your own"
            raise SpaceError(
                f"{key}: {config.model.channels}; the images have {channels}, and only grey ones can be repeated; "
                f"{instead}"
            )


def read_all_weights(space: Space, data: TrainingData) -> tuple[dict[str, Weights], list[str]]:
    """Read the starting weights, and try them on each network that may want them, before anything is started.

    Returns:
        The weights by `weights_key`; what was loaded, left out and newly made, a line for each.

    Raises:
        InputError: weights can't be had, or don't fit a network.
    """
    unfrozen = {"freeze": 0, "unfreeze_epoch": None}
    configs = [config for config in space.samples() if config.model.pretrained]
    wanted = {config.model.model_copy(update=unfrozen) for config in configs}
    weights: dict[str, Weights] = {}
    lines = []
    for model in sorted(wanted, key=repr):
        key = weights_key(model)
        if key not in weights:
            weights[key] = read_weights(model, weights_folder())
        network = create_model(model, data.image_shape[0], len(data.classes))
        lines.append(load_pretrained(network, model, weights[key], data.classes).describe())
    for config in configs:
        found = weights[weights_key(config.model)]
        if found.normalize not in (None, config.normalize):
            key = "baseline" if config is space.baseline else "trial"
            lines.append(
                f"{found.source}: its images were {'' if found.normalize else 'not '}normalised; "
                f"set {key}.normalize to {str(found.normalize).lower()} here too"
            )
    return weights, list(dict.fromkeys(lines))


def probe_space(space: Space, data: TrainingData, threads: int) -> tuple[list[Probe], int]:
    """Try the cheapest and the dearest of a sample of configurations; one where all cost the same.

    The cost by which they are picked is arithmetic (`count_operations`).

    Args:
        space: of the search.
        data: what is trained on.
        threads: of one trial.

    Returns:
        The probes, cheapest first, and the largest resident set of this process after them, in bytes.
    """
    configs = list(space.samples())
    costs = [count_operations(config, data) for config in configs]
    cheapest, dearest = costs.index(min(costs)), costs.index(max(costs))
    chosen = [configs[cheapest]] if costs[cheapest] == costs[dearest] else [configs[cheapest], configs[dearest]]
    torch.set_num_threads(threads)
    probes = [_try(config, data, space.resources) for config in chosen]
    unit = 1 if sys.platform == "darwin" else 1024
    return probes, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def count_operations(config: TrialConfig, data: TrainingData) -> int:
    """Floating-point operations of a whole training on each of its images, in convolutions and linear layers.

    A layer's two gradients take as much each as its forward pass; a frozen one has none.
    """
    channels = config.model.channels or data.image_shape[0]
    height, width = data.image_shape[1:]
    if data.pixels.resize is not None:
        scale = data.pixels.resize / min(height, width)
        height, width = round(height * scale), round(width * scale)
    thaw = config.model.unfreeze_epoch
    frozen_epochs = config.epochs if thaw is None else min(config.epochs, thaw - 1)
    operations = 0

    def count(layer: nn.Module, _: object, output: Tensor) -> None:
        nonlocal operations
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        trained = config.epochs - (0 if layer.weight.requires_grad else frozen_epochs)
        # A product and a sum for each weight, at each place of the output's map.
        operations += 2 * layer.weight.numel() * output[0, 0].numel() * (config.epochs + 2 * trained)

    # One image passes for real: torch's counter and its meta device take over two seconds to import, at each start.
    network = create_model(config.model, channels, len(data.classes)).eval()
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    with torch.no_grad():
        network(torch.zeros(1, channels, height, width))
    return operations


def _try(config: TrialConfig, data: TrainingData, resources: ResourcesConfig) -> Probe:
    device = torch.device("cuda" if resources.gpus else "cpu")
    # What one worker of several does is its part of each batch.
    batch = max(1, config.batch_size // resources.workers)
    rows = data.train_rows[: _STEPS * batch]
    images, labels = torch.tensor(data.images[rows], device=device), torch.tensor(data.labels[rows], device=device)
    network = create_model(config.model, data.image_shape[0], len(data.classes))
    training = Training(
        network.to(device, memory_format=torch.channels_last),  # type: ignore[call-overload]
        create_preprocess(config, data.pixels).to(device),
        Batches(images, labels, torch.arange(len(rows), device=device)),
        None,
        config.model_copy(update={"epochs": 2, "batch_size": batch, "drop_last": False, "compile": False}),
        seed=0,
    )
    training.run_epoch()
    rate = training.run_epoch().images_per_second * resources.workers
    seconds = (len(data.train_rows) + _FORWARD_SHARE * len(data.validation_rows)) / rate
    copies = _STATE_COPIES + (config.optim.average != "none")
    return Probe(config, seconds, copies * 4 * count_parameters(network))


def count_full_trainings(probes: Sequence[Probe], seconds: float, slots: int) -> tuple[int, int]:
    """How many trainings to the last epoch fit into so many seconds, side by side in `slots`: fewest and most."""
    numbers = [int(seconds * slots / probe.seconds) for probe in probes]
    return min(numbers), max(numbers)
