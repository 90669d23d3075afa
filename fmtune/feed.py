"""What training steps are fed with: pixels on their way to the network, or the kept outputs of its frozen stages."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Generator, Tensor

from fmtune.augment import augment
from fmtune.batches import Batches
from fmtune.config import AugmentConfig
from fmtune.model import STAGES, Preprocess, ResNet

Precision = Literal["fp32", "bf16", "fp16"]
_REUSE_BYTES = 2 * 2**30
"""Memory up to which the outputs of frozen stages are kept."""
ALL = slice(None)
"""The whole of a batch."""
_BATCH = 1024
"""Images of one pass through the frozen stages."""


@dataclass(frozen=True)
class Feed:
    """Batches, and the way from one to the network.

    Attributes:
        train: batches to learn from.
        validation: batches to measure on, if any.
        prepare: turns a part of a batch into what the network's stage `first` takes. With a generator that is random,
            and what is drawn for an image is the same in every part.
        first: stage of the network that takes it.
    """

    train: Batches
    validation: Batches | None
    prepare: Callable[[Tensor, Generator | None, slice], Tensor]
    first: int = 0


def feed_pixels(train: Batches, validation: Batches | None, preprocess: Preprocess, config: AugmentConfig) -> Feed:
    """uint8 images, augmented where there is a generator, and normalised."""

    def prepare(images: Tensor, draws: Generator | None, part: slice) -> Tensor:
        # Other workers' images are augmented too, which costs little beside a training step.
        prepared: Tensor = preprocess((images if draws is None else augment(images, config, draws))[part])
        return prepared

    return Feed(train, validation, prepare)


def feed_features(feed: Feed, network: ResNet, config: AugmentConfig, precision: Precision) -> Feed | None:
    """What the frozen stages make of all images, computed once, in place of the images of `feed`.

    None where augmentation makes other images of them each time, where the images are streamed, or where this would
    take more than 2 GiB: mirroring alone has two views, which are kept both.
    """
    views, images = count_views(config), feed.train.images
    if views is None or not network.frozen or not isinstance(images, Tensor):
        return None
    first = len(network.frozen)
    example = _pass_frozen(network, feed.prepare(images[:1], None, ALL), first, precision)
    if example.nbytes * len(images) * views > _REUSE_BYTES:
        return None
    features = example.new_empty(len(images), views, *example.shape[1:])
    for rows in torch.arange(len(images), device=images.device).split(_BATCH):
        for view in range(views):
            batch = images[rows].flip(-1) if view else images[rows]
            features[rows, view] = _pass_frozen(network, feed.prepare(batch, None, ALL), first, precision)
    train = replace(feed.train, images=features)
    validation = None if feed.validation is None else replace(feed.validation, images=features)
    return Feed(train, validation, _pick_view, first)


def count_views(config: AugmentConfig) -> int | None:
    """How many images augmentation can make of one; None where they are many."""
    if config.translate or config.rotate or config.erase or config.mixup or config.cutmix:
        return None
    return 2 if config.flip else 1


def _pick_view(features: Tensor, draws: Generator | None, part: slice) -> Tensor:
    """One of each image's views (N, V, C, H, W) in a part of a batch, or its first without a generator."""
    if draws is None or features.shape[1] == 1:
        return features[part, 0]
    rows = torch.arange(len(features), device=features.device)
    views = torch.randint(features.shape[1], (len(rows),), generator=draws, device=features.device)
    return features[rows[part], views[part]]


@torch.no_grad()
def _pass_frozen(network: ResNet, x: Tensor, first: int, precision: Precision) -> Tensor:
    """Output of the frozen stages (N, C, H, W), in evaluation as they always are."""
    network.train()
    with autocast(precision, x.device):
        x = network.forward_stages(x, 0, first)
        # All that the head takes of the last stage.
        return network.avgpool(x) if first == len(STAGES) else x


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """A context that computes in the given precision."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)
