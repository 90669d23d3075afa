"""Weights and training state on disk, as safetensors and JSON: nothing that is loaded can run code."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from fmtune.classifier import TrainedModel
from fmtune.config import TrialConfig
from fmtune.data import Classes
from fmtune.errors import RunFolderError, first_line
from fmtune.files import write_whole
from fmtune.model import Pixels, Preprocess, create_model
from fmtune.pretrained import imagenet_pixels
from fmtune.training import EpochMetrics

CHECKPOINT_FILES = ("tensors.safetensors", "state.json", "metrics.json")
"""What `save_training` writes."""
_TENSOR, _ITEMS = "__tensor__", "__items__"
"""Marks, in the JSON of a training state, of a tensor's key and of a mapping whose keys are not strings."""


def create_trained_model(
    config: TrialConfig, pixels: Pixels, classes: Classes, shape: tuple[int, int, int], weights: dict[str, Tensor]
) -> TrainedModel:
    """A model of given weights, in evaluation mode."""
    network = create_model(config.model, pixels.channels, len(classes))
    network.load_state_dict(weights)
    preprocess = create_preprocess(config, pixels)
    return TrainedModel(network, preprocess, classes, config, shape, pixels).eval()


def create_preprocess(config: TrialConfig, pixels: Pixels) -> Preprocess:
    """The network's input from uint8 images, normalised as its weights or the configuration want it."""
    channels = config.model.channels or pixels.channels
    if not config.normalize:
        return Preprocess(Pixels.unit(pixels.channels, pixels.resize), channels)
    if config.model.pretrained == "imagenet":
        return Preprocess(replace(imagenet_pixels(channels), resize=pixels.resize), channels)
    return Preprocess(pixels, channels)


def save_model(folder: Path, model: TrainedModel) -> None:
    """Write `model.safetensors`, `config.json` and `classes.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_tensors(folder / "model.safetensors", model.network.state_dict())
    config = {
        "trial": model.config.model_dump(mode="json"),
        "shape": model.shape,
        "pixels": asdict(model.pixels),
    }
    write_json(folder / "config.json", config)
    write_json(folder / "classes.json", model.classes.as_entries())


def load_model(folder: Path) -> TrainedModel:
    """Read what `save_model` wrote.

    Raises:
        RunFolderError: a file is missing, or not as `save_model` writes it.
    """
    for name in ("model.safetensors", "config.json", "classes.json"):
        if not (folder / name).exists():
            raise RunFolderError(f"{folder / name}: no such file; expected a finished run")
    try:
        config = read_json(folder / "config.json")
        classes = Classes.of_entries(read_json(folder / "classes.json"))
        saved = config["pixels"]
        pixels = Pixels(saved["channels"], tuple(saved["mean"]), tuple(saved["std"]), saved["resize"])
        trial, weights = TrialConfig.model_validate(config["trial"]), load_file(folder / "model.safetensors")
        return create_trained_model(trial, pixels, classes, tuple(config["shape"]), weights)
    except (SafetensorError, ValueError, LookupError, RuntimeError) as error:
        raise RunFolderError(f"{folder}: damaged, or of another version of fmtune ({first_line(error)})") from None


def save_training(folder: Path, state: dict[str, Any], metrics: EpochMetrics) -> None:
    """Write a `TrainingState.state_dict()` and the metrics of its epoch.

    Tensors go to `tensors.safetensors`, all else to `state.json`, the metrics to `metrics.json`.
    """
    tensors: dict[str, Tensor] = {}
    document = _detach_tensors(state, "", tensors)
    _write_tensors(folder / "tensors.safetensors", tensors)
    write_json(folder / "state.json", document)
    write_json(folder / "metrics.json", metrics.as_dict())


def load_training(folder: Path) -> dict[str, Any]:
    """Read what `save_training` wrote; tensors are on the CPU."""
    tensors = load_file(folder / "tensors.safetensors")
    state: dict[str, Any] = _attach_tensors(read_json(folder / "state.json"), tensors)
    return state


def load_metrics(folder: Path) -> EpochMetrics | None:
    """The metrics that `save_training` wrote, None if it was interrupted before all files were whole."""
    try:
        # Opening compares the file's length with what its header promises.
        with safe_open(folder / "tensors.safetensors", framework="pt"):
            read_json(folder / "state.json")
            return EpochMetrics(**read_json(folder / "metrics.json"))
    except (FileNotFoundError, SafetensorError, json.JSONDecodeError):
        return None


def load_weights(folder: Path) -> dict[str, Tensor]:
    """The network's part of what `save_training` wrote: its mean weights where there are any, else its last ones."""
    tensors = load_file(folder / "tensors.safetensors")
    for part in ("/average/module.", "/network/"):
        weights = {key.removeprefix(part): value for key, value in tensors.items() if key.startswith(part)}
        if weights:
            return weights
    raise RunFolderError(f"{folder / 'tensors.safetensors'}: no weights in it; expected a checkpoint of a training")


def write_json(path: Path, content: Any) -> None:
    """Write JSON, indented; no reader sees half of it."""
    write_whole(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors row-major, in a file that the user's umask applies to, unlike that of `save_file`."""
    write_whole(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def _detach_tensors(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """A JSON document of a nested value; its tensors go to `tensors` under their path."""
    if isinstance(value, Tensor):
        tensors[key] = value
        return {_TENSOR: key}
    if isinstance(value, dict):
        items = {name: _detach_tensors(inner, f"{key}/{name}", tensors) for name, inner in value.items()}
        return items if all(isinstance(name, str) for name in items) else {_ITEMS: list(items.items())}
    if isinstance(value, list | tuple):
        return [_detach_tensors(inner, f"{key}/{i}", tensors) for i, inner in enumerate(value)]
    return value


def _attach_tensors(document: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(document, list):
        return [_attach_tensors(inner, tensors) for inner in document]
    if not isinstance(document, dict):
        return document
    if _TENSOR in document:
        return tensors[document[_TENSOR]]
    items = document[_ITEMS] if _ITEMS in document else document.items()
    return {name: _attach_tensors(inner, tensors) for name, inner in items}
