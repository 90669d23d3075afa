"""Weights to start from: published ones, a file's, or an earlier run's."""

from __future__ import annotations

import json
import pickle
import struct
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from statistics import fmean
from urllib.error import URLError
from urllib.parse import urlparse

import torch
import torch.hub
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fmtune.config import ModelConfig
from fmtune.data import Classes
from fmtune.errors import InputError, RunFolderError, first_line
from fmtune.files import download_timeout
from fmtune.model import Pixels, ResNet

_KEY = "trial.model.pretrained"
_EXPECTED = "expected imagenet, a .safetensors, .pth or .pt file, or a run's folder"
_HEAD = ("fc", "head")
"""Modules that depend on the classes."""
_COUNTER = ".num_batches_tracked"
"""Batches that a batch norm has seen; older published files lack it, and nothing that fmtune builds reads it."""
_DAMAGES = (
    pickle.UnpicklingError,
    struct.error,
    OSError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AssertionError,
)
"""What torch.load was seen to raise for files cut short and with bytes changed."""


@dataclass(frozen=True)
class Weights:
    """Weights to start from, as they lie in a file.

    Attributes:
        source: where they came from.
        tensors: by the name of the parameter or buffer.
        classes: that their head tells apart; None where nothing says so.
        normalize: whether they were trained on normalised images; None where nothing says so.
    """

    source: str
    tensors: Mapping[str, Tensor]
    classes: Classes | None
    normalize: bool | None = None


@dataclass(frozen=True)
class LoadReport:
    """What became of the weights to start from, by parameter or buffer name.

    Attributes:
        source: where they came from.
        loaded: taken by the network, in its order; a first convolution of other channels is among them.
        left_out: of the file, not taken.
        made_new: of the network, as initialised.
    """

    source: str
    loaded: tuple[str, ...]
    left_out: tuple[str, ...]
    made_new: tuple[str, ...]

    def describe(self) -> str:
        """One line for the console."""
        parts = [f"{self.source}: {len(self.loaded)} tensors loaded"]
        parts += [f"left out {', '.join(self.left_out)}"] if self.left_out else []
        parts += [f"new {', '.join(self.made_new)}"] if self.made_new else []
        return "; ".join(parts)


def imagenet_pixels(channels: int) -> Pixels:
    """The statistics that the published weights were trained with: RGB, scaled to 0..1; their means for one channel."""
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return Pixels(3, mean, std) if channels == 3 else Pixels(1, (fmean(mean),), (fmean(std),))


def check_pretrained(config: ModelConfig) -> None:
    """Find what is wrong with `config.pretrained` without the network, and without reading weights.

    Raises:
        InputError: the configuration has no published weights, or there is no such file or run.
    """
    if config.pretrained == "imagenet":
        _check_published(config)
    elif config.pretrained is not None:
        _find_file(config.pretrained)


def weights_key(config: ModelConfig) -> str:
    """What tells the weights that a configuration starts from apart from others: published ones differ by depth."""
    return f"imagenet-{config.depth}" if config.pretrained == "imagenet" else str(config.pretrained)


def read_weights(config: ModelConfig, cache: Path) -> Weights:
    """The weights that `config.pretrained` names, none of which has to fit its network. Only tensors are unpickled.

    Args:
        config: with `pretrained` set.
        cache: folder of downloaded weights; made if need be.

    Raises:
        InputError: as `check_pretrained`, or the weights cannot be had or read.
    """
    if config.pretrained is None:
        raise ValueError("pretrained is null: there is nothing to load")
    check_pretrained(config)
    if config.pretrained == "imagenet":
        return _fetch_published(config.depth, cache)
    file = _find_file(config.pretrained)
    return Weights(config.pretrained, _read_file(file), _read_classes(file), _read_normalize(file))


def load_pretrained(
    network: ResNet, config: ModelConfig, weights: Weights, classes: Classes | None = None
) -> LoadReport:
    """Fill `network` with weights to start from; on an error it stays as it is.

    The head (`fc`, `head`) stays new where its shapes differ, or where a run or an export says beside its weights that
    they are of other classes; a file alone does not tell. A first convolution of 3 channels is summed over them for a
    network of 1, and one of 1 channel is shared out in thirds for a network of 3, so that a grey image and the same
    image repeated in 3 channels give the same.

    Args:
        network: made for `config`, on any device.
        config: what the network was made for.
        weights: what `read_weights` gave.
        classes: that the network is to tell apart; None takes a head that fits.

    Raises:
        InputError: the weights don't fit into the network.
    """
    takes_head = classes is None or weights.classes in (None, classes)
    return _fill(network, config, weights.tensors, weights.source, takes_head)


def _check_published(config: ModelConfig) -> None:
    lines = []
    if config.depth < 18:
        lines.append(
            f"trial.model.depth: {config.depth}, for which there are no published weights; expected 18 or more"
        )
    if config.width != 64:
        lines.append(f"trial.model.width: {config.width}, for which there are no published weights; expected 64")
    if config.stem != "imagenet":
        lines.append(f"trial.model.stem: {config.stem}, for which there are no published weights; expected imagenet")
    if lines:
        raise InputError(*(f"{line}, or {_KEY} other than imagenet" for line in lines))


def _find_file(pretrained: str) -> Path:
    """The file of weights that `pretrained` names, itself or in a run's folder.

    Raises:
        InputError: there is none.
    """
    path = Path(pretrained)
    if path.is_dir():
        for candidate in (path / "best" / "model.safetensors", path / "model.safetensors"):
            if candidate.is_file():
                return candidate
        raise RunFolderError(f"{_KEY}: {path} has no best/model.safetensors; expected a finished run")
    if not path.is_file():
        raise InputError(f"{_KEY}: no file or folder {path}; {_EXPECTED}")
    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise InputError(f"{_KEY}: {path} is of no known format; {_EXPECTED}")
    return path


def _read_file(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a file by name.

    Raises:
        InputError: it is damaged or holds something else.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise InputError(f"{path}: not a whole safetensors file ({error}); copy or download it again") from None
    except pickle.UnpicklingError:
        raise InputError(
            f"{path}: damaged, or holds more than tensors, which fmtune does not unpickle; "
            "expected what torch.save(network.state_dict(), ...) writes"
        ) from None
    except _DAMAGES as error:
        raise InputError(f"{path}: can't be read ({first_line(error)}); copy or download it again") from None
    return _check_weights(weights, path)


def _read_classes(path: Path) -> Classes | None:
    """The classes of a file's weights, by what a run or an export writes beside it; None where there is nothing."""
    beside, exported = path.with_name("classes.json"), path.with_name(f"{path.name}.json")
    try:
        if beside.is_file():
            return Classes.of_entries(json.loads(beside.read_text(encoding="utf-8")))
        described = json.loads(exported.read_text(encoding="utf-8"))
        return Classes(tuple(described["labels"]), tuple(described["names"]))
    except (OSError, ValueError, LookupError, TypeError):
        # Something else that goes by that name.
        return None


def _read_normalize(path: Path) -> bool | None:
    """Whether a run trained its weights on normalised images, by what it writes beside them."""
    try:
        normalize = json.loads(path.with_name("config.json").read_text(encoding="utf-8"))["trial"]["normalize"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return normalize if isinstance(normalize, bool) else None


def _check_weights(weights: object, path: Path) -> Mapping[str, Tensor]:
    if isinstance(weights, dict) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items()
    ):
        return weights
    inner = f" with the keys {', '.join(map(str, list(weights)[:5]))}" if isinstance(weights, dict) else ""
    raise InputError(f"{path}: holds a {type(weights).__name__}{inner}; expected a state dict: tensors by name")


def _fetch_published(depth: int, cache: Path) -> Weights:
    """torchvision's weights from `cache`, downloaded where they are not there yet.

    Raises:
        InputError: they cannot be downloaded, or the cached file is damaged.
    """
    # Takes a second to import, which only this needs.
    from torchvision.models import get_model_weights

    published = get_model_weights(f"resnet{depth}").DEFAULT
    path = cache / PurePosixPath(urlparse(published.url).path).name
    try:
        with download_timeout():
            weights = torch.hub.load_state_dict_from_url(
                published.url, str(cache), map_location="cpu", progress=False, check_hash=True, weights_only=True
            )
    except _DAMAGES as error:
        # What fails on the way from the network, by its hash too, is not kept.
        if path.exists():
            raise InputError(f"{path}: damaged, or no file of tensors; delete it and try again") from None
        reason = first_line(error.reason if isinstance(error, URLError) else error)
        raise InputError(
            f"{_KEY}: can't fetch {published.url} ({reason}); download it elsewhere and put it at {path}"
        ) from None
    return Weights(f"imagenet ({path.name})", _check_weights(weights, path), None)


def _fill(
    network: ResNet, config: ModelConfig, weights: Mapping[str, Tensor], place: str, takes_head: bool
) -> LoadReport:
    """Put all of `weights` that fit into `network`, the head's only if `takes_head`, and refuse those that fit half.

    Raises:
        InputError: the first parameter that does not fit.
    """
    own = network.state_dict()
    taken = _fit_input(own, weights)
    unfit = _unfit_head(own if takes_head else {}, taken)
    taken = {name: value for name, value in taken.items() if name not in unfit}
    problem = next(_problems(own, taken), None)
    if problem is not None:
        raise InputError(f"{place}: {problem}; expected {_advise(config, weights)}")
    network.load_state_dict({**own, **taken})
    return LoadReport(
        source=place,
        loaded=tuple(name for name in own if name in taken),
        left_out=tuple(name for name in weights if name not in taken),
        made_new=tuple(name for name in own if name not in taken and not name.endswith(_COUNTER)),
    )


def _fit_input(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`weights` with the first convolution, (width, channels, height, width of kernel), for the network's channels."""
    fitted = dict(weights)
    kernel, shape = weights.get("conv1.weight"), tuple(own["conv1.weight"].shape)
    if kernel is None:
        return fitted
    summed, shared = (shape[0], 3, *shape[2:]), (shape[0], 1, *shape[2:])
    if shape[1] == 1 and kernel.shape == summed:
        fitted["conv1.weight"] = kernel.sum(dim=1, keepdim=True)
    elif shape[1] == 3 and kernel.shape == shared:
        fitted["conv1.weight"] = (kernel / 3).repeat(1, 3, 1, 1)
    return fitted


def _unfit_head(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> set[str]:
    """Names of `weights` in the parts of the head that differ from the network's: a layer is taken whole or not."""
    unfit: set[str] = set()
    for part in _HEAD:
        theirs = {name: value.shape for name, value in weights.items() if name.split(".")[0] == part}
        if theirs != {name: value.shape for name, value in own.items() if name.split(".")[0] == part}:
            unfit |= theirs.keys()
    return unfit


def _problems(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Iterator[str]:
    """What of the backbone does not fit, in the network's order, then what it has no place for."""
    for name, value in own.items():
        if name.split(".")[0] in _HEAD or (name.endswith(_COUNTER) and name not in weights):
            continue
        if name not in weights:
            yield f"no {name}, which the network has as {tuple(value.shape)}"
        elif weights[name].shape != value.shape:
            yield f"{name} is {tuple(weights[name].shape)}, the network's {tuple(value.shape)}"
    for name, value in weights.items():
        if name not in own:
            yield f"{name}, {tuple(value.shape)}, is nothing that the network has"


def _advise(config: ModelConfig, weights: Mapping[str, Tensor]) -> str:
    """The settings that would make a network for `weights`, as far as they differ from `config`."""
    kernel = weights.get("conv1.weight")
    if kernel is None or kernel.ndim != 4:
        return "the state dict of a ResNet, under torchvision's names"
    width, _, size = kernel.shape[:3]
    depth = _find_depth(weights)
    settings = []
    if depth is not None and depth != config.depth:
        settings.append(f"trial.model.depth: {depth}")
    if width != config.width:
        settings.append(f"trial.model.width: {width}")
    if (size == 7) != (config.stem == "imagenet"):
        settings.append(f"trial.model.stem: {'imagenet' if size == 7 else 'small or half'}")
    if settings:
        return ", ".join(settings)
    return "weights of a plain ResNet for 1 or 3 channels, under torchvision's names"


def _find_depth(weights: Mapping[str, Tensor]) -> int | None:
    """The depth whose backbone has exactly the parameters of `weights`, if there is one."""
    backbone = _backbone(weights)
    for depth in typing.get_args(ModelConfig.model_fields["depth"].annotation):
        with torch.device("meta"):
            network = ResNet(ModelConfig(depth=depth, width=1), 1, 1)
        if _backbone(network.state_dict()) == backbone:
            return int(depth)
    return None


def _backbone(weights: Mapping[str, Tensor]) -> set[str]:
    return {name for name in weights if name.split(".")[0] not in _HEAD and not name.endswith(_COUNTER)}
