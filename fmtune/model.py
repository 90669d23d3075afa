"""ResNets with the published parameter names, in the published sizes and in small ones."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fmtune.config import ModelConfig
from fmtune.convolution import Conv2d, SubsampledConv2d
from fmtune.normalization import BatchNorm2d


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, of the networks up to depth 34."""

    expansion = 1

    def __init__(self, in_channels: int, planes: int, stride: int = 1, downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = Conv2d(in_channels, planes, 3, stride)
        self.bn1 = BatchNorm2d(planes)
        self.conv2 = Conv2d(planes, planes, 3)
        self.bn2 = BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(x)) + shortcut, inplace=True)


class Bottleneck(nn.Module):
    """A 3x3 convolution between two 1x1 ones, and a shortcut, of the networks from depth 50 on.

    The stride is on the 3x3 convolution, as in torchvision ("ResNet v1.5", https://arxiv.org/abs/1512.03385 has it on
    the first).
    """

    expansion = 4

    def __init__(self, in_channels: int, planes: int, stride: int = 1, downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = Conv2d(in_channels, planes, 1)
        self.bn1 = BatchNorm2d(planes)
        self.conv2 = Conv2d(planes, planes, 3, stride)
        self.bn2 = BatchNorm2d(planes)
        self.conv3 = Conv2d(planes, planes * self.expansion, 1)
        self.bn3 = BatchNorm2d(planes * self.expansion)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        return F.relu(self.bn3(self.conv3(x)) + shortcut, inplace=True)


_BLOCKS: dict[int, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    10: (BasicBlock, (1, 1, 1, 1)),
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}
STAGES = ("stem", "layer1", "layer2", "layer3", "layer4")
"""What `freeze` counts, from the input on."""


@dataclass(frozen=True)
class Pixels:
    """What a network must know of its images: channels, and the statistics that normalise them.

    `mean` and `std` have one entry a channel, of pixels scaled to 0..1. `resize` is the length in pixels that the
    shorter side is brought to, None where images stay as they are.
    """

    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int | None = None

    @classmethod
    def unit(cls, channels: int, resize: int | None = None) -> Pixels:
        """Pixels that are only scaled to 0..1."""
        return cls(channels, (0.0,) * channels, (1.0,) * channels, resize)


class Preprocess(nn.Module):
    """uint8 images (N, C, H, W) to normalised float32 ones of the network's channels and size."""

    scale: Tensor
    shift: Tensor

    def __init__(self, pixels: Pixels, channels: int) -> None:
        super().__init__()
        mean, std = torch.tensor(pixels.mean), torch.tensor(pixels.std)
        self.pixels, self.channels = pixels, channels
        # (x / 255 - mean) / std as one multiplication and one addition.
        self.register_buffer("scale", (1 / (255 * std)).view(1, -1, 1, 1))
        self.register_buffer("shift", (-mean / std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        normalised = torch.addcmul(self.shift, images.to(self.scale.dtype), self.scale)
        if self.pixels.resize is not None:
            normalised = _resize(normalised, self.pixels.resize)
        return normalised.expand(-1, self.channels, -1, -1)


def _resize(images: Tensor, side: int) -> Tensor:
    """Images (N, C, H, W) with `side` pixels on the shorter side, bilinear."""
    height, width = images.shape[2:]
    shorter = min(height, width)
    size = [round(height * side / shorter), round(width * side / shorter)]
    # Smoothed where it shrinks; where it enlarges that would change nothing.
    return F.interpolate(images, size, mode="bilinear", antialias=side < shorter)


class ResNet(nn.Module):
    """A residual network (He et al., 2016, https://arxiv.org/abs/1512.03385).

    At `width` 64, `stem` "imagenet" and `head` "replace" its state dict is torchvision's, name for name.

    Args:
        config: depth, width, stem, head and frozen stages.
        in_channels: channels of the normalised float images (N, C, H, W) that it takes.
        classes: number of logits (N, classes) that it gives.
    """

    def __init__(self, config: ModelConfig, in_channels: int, classes: int) -> None:
        super().__init__()
        block, blocks = _BLOCKS[config.depth]
        width = config.width
        if config.stem == "imagenet":
            self.conv1 = Conv2d(in_channels, width, 7, stride=2)
            self.maxpool: nn.Module = nn.MaxPool2d(3, stride=2, padding=1)
        else:
            stride = 2 if config.stem == "half" else 1
            self.conv1 = Conv2d(in_channels, width, 3, stride)
            self.maxpool = nn.Identity()
        self.bn1 = BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _create_stage(block, width, width, blocks[0], stride=1)
        self.layer2 = _create_stage(block, width * block.expansion, width * 2, blocks[1], stride=2)
        self.layer3 = _create_stage(block, width * 2 * block.expansion, width * 4, blocks[2], stride=2)
        self.layer4 = _create_stage(block, width * 4 * block.expansion, width * 8, blocks[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        features = width * 8 * block.expansion
        self.fc = nn.Linear(features, 1000 if config.head == "stack" else classes)
        self.head = nn.Linear(1000, classes) if config.head == "stack" else nn.Identity()
        self.frozen = STAGES[: config.freeze]
        _initialise(self)
        self._set_trainable(False)

    def forward(self, x: Tensor, first: int = 0) -> Tensor:
        """Logits (N, classes) of images, or with `first` of what the first so many stages give (`forward_stages`)."""
        x = self.forward_stages(x, first, len(STAGES))
        logits: Tensor = self.head(self.fc(torch.flatten(self.avgpool(x), 1)))
        return logits

    def forward_stages(self, x: Tensor, first: int, last: int) -> Tensor:
        """What the stages from `first` up to, but without, `last` make of the output (N, C, H, W) of those before."""
        for stage in STAGES[first:last]:
            x = getattr(self, stage)(x)
        return x

    def stem(self, images: Tensor) -> Tensor:
        x: Tensor = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        return x

    def train(self, mode: bool = True) -> ResNet:
        """As `nn.Module.train`, but frozen batch norms stay in evaluation and so keep their statistics."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    def _frozen_modules(self) -> list[nn.Module]:
        named = {"stem": [self.conv1, self.bn1]} | {name: [getattr(self, name)] for name in STAGES[1:]}
        return [module for stage in self.frozen for module in named[stage]]

    def unfreeze(self) -> None:
        """Train all stages from here on; takes effect on batch norms with the next `train()`."""
        self._set_trainable(True)
        self.frozen = ()

    def _set_trainable(self, trainable: bool) -> None:
        for module in self._frozen_modules():
            module.requires_grad_(trainable)


def create_model(config: ModelConfig, data_channels: int, classes: int) -> ResNet:
    """A freshly initialised network; its weights come from torch's global generator."""
    return ResNet(config, config.channels or data_channels, classes)


def fold_batch_norms(network: nn.Module) -> nn.Module:
    """A copy for prediction alone, in which batch norms are part of the convolutions before them.

    The same function with two passes over each map less: a batch norm in evaluation is linear.
    """
    folded = copy.deepcopy(network).eval()
    for module in list(folded.modules()):
        for convolution, norm in _pair_with_norms(module):
            fused = fuse_conv_bn_eval(getattr(module, convolution), getattr(module, norm))
            setattr(module, convolution, fused)
            setattr(module, norm, nn.Identity())
    return folded


def _pair_with_norms(module: nn.Module) -> list[tuple[str, str]]:
    """Names of a module's own convolutions, each with that of the batch norm that it feeds."""
    convolutions = [name for name, child in module.named_children() if isinstance(child, nn.Conv2d)]
    # As torchvision names them: conv1 and bn1, and in a downsample 0 and 1.
    return [(name, "1" if name == "0" else name.replace("conv", "bn")) for name in convolutions]


def stages_to_logits(parameter: str) -> int:
    """How many stages before the head a parameter of a `ResNet` lies, by its name: 0 the head's own, 5 the stem's."""
    module = parameter.split(".")[0]
    if module in ("conv1", "bn1"):
        return len(STAGES)
    return len(STAGES) - STAGES.index(module) if module in STAGES else 0


def count_parameters(network: nn.Module) -> int:
    """Number of weights, frozen ones included."""
    return sum(parameter.numel() for parameter in network.parameters())


def _create_stage(
    block: type[BasicBlock] | type[Bottleneck], in_channels: int, planes: int, blocks: int, stride: int
) -> nn.Sequential:
    out_channels = planes * block.expansion
    downsample = None
    if stride != 1 or in_channels != out_channels:
        downsample = nn.Sequential(SubsampledConv2d(in_channels, out_channels, stride), BatchNorm2d(out_channels))
    first = block(in_channels, planes, stride, downsample)
    return nn.Sequential(first, *(block(out_channels, planes) for _ in range(blocks - 1)))


def _initialise(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
