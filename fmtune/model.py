"""ResNets with the published parameter names, in the published sizes and in small ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmtune.config import ModelConfig


class SubsampledConv2d(nn.Conv2d):
    """A 1x1 convolution with a stride, as a 1x1 convolution of every stride-th pixel.

    The same numbers and parameters. With fewer than 16 channels in, channels_last and several threads, the backward
    pass of the strided one writes past its buffers (seen with torch 2.14.1 on an AVX-512 CPU).
    """

    def __init__(self, in_channels: int, out_channels: int, subsampling: int) -> None:
        super().__init__(in_channels, out_channels, 1, bias=False)
        self.subsampling = subsampling

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images[:, :, :: self.subsampling, :: self.subsampling])


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, of the networks up to depth 34."""

    expansion = 1

    def __init__(self, in_channels: int, planes: int, stride: int = 1, downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
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
        self.conv1 = nn.Conv2d(in_channels, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
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

    `mean` and `std` have one entry a channel, of pixels scaled to 0..1.
    """

    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def unit(cls, channels: int) -> Pixels:
        """Pixels that are only scaled to 0..1."""
        return cls(channels, (0.0,) * channels, (1.0,) * channels)


class Preprocess(nn.Module):
    """uint8 images (N, C, H, W) to normalised float32 ones with the network's number of channels."""

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
        return normalised.expand(-1, self.channels, -1, -1)


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
            self.conv1 = nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False)
            self.maxpool: nn.Module = nn.MaxPool2d(3, stride=2, padding=1)
        else:
            stride = 2 if config.stem == "half" else 1
            self.conv1 = nn.Conv2d(in_channels, width, 3, stride=stride, padding=1, bias=False)
            self.maxpool = nn.Identity()
        self.bn1 = nn.BatchNorm2d(width)
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
        self._freeze()

    def forward(self, images: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.head(self.fc(torch.flatten(self.avgpool(x), 1)))
        return logits

    def train(self, mode: bool = True) -> ResNet:
        """As `nn.Module.train`, but frozen batch norms stay in evaluation and so keep their statistics."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    def _frozen_modules(self) -> list[nn.Module]:
        named = {"stem": [self.conv1, self.bn1]} | {name: [getattr(self, name)] for name in STAGES[1:]}
        return [module for stage in self.frozen for module in named[stage]]

    def _freeze(self) -> None:
        for module in self._frozen_modules():
            module.requires_grad_(False)


def create_model(config: ModelConfig, data_channels: int, classes: int) -> ResNet:
    """A freshly initialised network; its weights come from torch's global generator."""
    return ResNet(config, config.channels or data_channels, classes)


def count_parameters(network: nn.Module) -> int:
    """Number of weights, frozen ones included."""
    return sum(parameter.numel() for parameter in network.parameters())


def _create_stage(
    block: type[BasicBlock] | type[Bottleneck], in_channels: int, planes: int, blocks: int, stride: int
) -> nn.Sequential:
    out_channels = planes * block.expansion
    downsample = None
    if stride != 1 or in_channels != out_channels:
        downsample = nn.Sequential(SubsampledConv2d(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))
    first = block(in_channels, planes, stride, downsample)
    return nn.Sequential(first, *(block(out_channels, planes) for _ in range(blocks - 1)))


def _initialise(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
