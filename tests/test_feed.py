from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

from fmtune import feed
from fmtune.batches import Batches
from fmtune.config import AugmentConfig, ModelConfig, OptimConfig, TrialConfig
from fmtune.feed import ALL, count_views, feed_features, feed_pixels
from fmtune.model import Pixels, Preprocess, ResNet, create_model
from fmtune.training import EpochMetrics, fit

PREPROCESS = Preprocess(Pixels(1, (0.5,), (0.25,)), 1)
PLAIN, FLIP = AugmentConfig(flip=False, translate=0), AugmentConfig(flip=True, translate=0)


def _network(freeze: int) -> ResNet:
    torch.manual_seed(0)
    network = create_model(ModelConfig(width=4, stem="small", pretrained="imagenet", freeze=freeze), 1, 3)
    # Statistics other than those of a new network, so that using the batch's own would show.
    with torch.no_grad():
        for _ in range(3):
            for module in network._frozen_modules():
                module.train()
            network(PREPROCESS(_batches().images))
    return network


def _batches(n: int = 24) -> Batches:
    images = torch.randint(0, 256, (n, 1, 8, 8), dtype=torch.uint8, generator=Generator().manual_seed(1))
    return Batches(images, torch.arange(n) % 3, torch.arange(0, n, 2))


def _fit(freeze: int, augment: AugmentConfig) -> list[EpochMetrics]:
    config = TrialConfig(
        epochs=3,
        batch_size=4,
        precision="fp32",
        model=ModelConfig(width=4, stem="small", pretrained="imagenet", freeze=freeze),
        augment=augment,
        # Small steps of plain descent: they do not magnify the last digits, which differ from processor to processor.
        optim=OptimConfig(name="sgd", lr=0.01),
    )
    metrics: list[EpochMetrics] = []
    batches = _batches()
    validation = Batches(batches.images, batches.labels, torch.arange(1, 24, 2))
    fit(
        _network(freeze), PREPROCESS, batches, validation, config, seed=0, report=lambda epoch, _: metrics.append(epoch)
    )
    return metrics


@pytest.mark.parametrize("freeze", range(1, 6))
def test_training_on_kept_outputs_equals_training_on_images(freeze: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the way without reuse, which an allowance of no memory brings about."""
    kept = _fit(freeze, PLAIN)
    monkeypatch.setattr(feed, "_REUSE_BYTES", 0)
    plain = _fit(freeze, PLAIN)
    assert [epoch.train_loss for epoch in kept] == pytest.approx([epoch.train_loss for epoch in plain], rel=1e-4)
    assert [epoch.val_loss for epoch in kept] == pytest.approx([epoch.val_loss for epoch in plain], rel=1e-4)


def test_kept_outputs_of_mirrored_images_are_picked_half_of_the_time() -> None:
    network = _network(2)
    kept = feed_features(feed_pixels(_batches(400), None, PREPROCESS, FLIP), network, FLIP, "fp32")
    assert kept is not None
    assert kept.first == 2
    with torch.no_grad():
        images = _batches(400).images
        plain, mirrored = (network.forward_stages(PREPROCESS(x), 0, 2) for x in (images, images.flip(-1)))
    picked = kept.prepare(kept.train.images, Generator().manual_seed(0), ALL)
    is_mirrored = _equal_rows(picked, mirrored)
    assert bool((is_mirrored | _equal_rows(picked, plain)).all())
    assert 150 < int(is_mirrored.sum()) < 250
    assert bool(_equal_rows(kept.prepare(kept.train.images, None, ALL), plain).all())


def test_what_is_drawn_for_an_image_is_the_same_in_every_part() -> None:
    """So that several workers make of a global batch what one makes of it."""
    network, images = _network(2), _batches(40).images
    translated = AugmentConfig(flip=True, translate=2, rotate=10, erase=0.5)
    kept = feed_features(feed_pixels(_batches(40), None, PREPROCESS, FLIP), network, FLIP, "fp32")
    assert kept is not None
    pixels = feed_pixels(_batches(40), None, PREPROCESS, translated)
    for prepare, batch in ((pixels.prepare, images), (kept.prepare, kept.train.images)):
        whole, *parts = (
            prepare(batch, Generator().manual_seed(3), part) for part in (ALL, slice(0, 13), slice(13, 40))
        )
        assert torch.equal(whole, torch.cat(parts))


def _equal_rows(one: Tensor, other: Tensor) -> Tensor:
    return torch.isclose(one, other, atol=1e-5).flatten(1).all(dim=1)


def test_outputs_are_kept_only_of_frozen_stages_and_fixed_views() -> None:
    frozen, free = _network(2), _network(0)
    pixels = feed_pixels(_batches(), None, PREPROCESS, PLAIN)
    assert feed_features(pixels, free, PLAIN, "fp32") is None
    assert feed_features(pixels, frozen, AugmentConfig(flip=False, translate=1), "fp32") is None
    assert feed_features(pixels, frozen, PLAIN, "fp32") is not None


@pytest.mark.parametrize(
    ("changes", "views"),
    [
        ({"flip": False}, 1),
        ({}, 2),
        ({"translate": 1}, None),
        ({"rotate": 5.0}, None),
        ({"erase": 0.1}, None),
        ({"mixup": 0.2}, None),
        ({"cutmix": 1.0}, None),
    ],
)
def test_views_are_counted(changes: dict[str, object], views: int | None) -> None:
    assert count_views(AugmentConfig.model_validate({"flip": True, "translate": 0} | changes)) == views
