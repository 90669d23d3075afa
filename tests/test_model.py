from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from pydantic import ValidationError
from torch import Tensor, nn
from torchvision.transforms import functional

from fmtune.config import ModelConfig, OptimConfig
from fmtune.model import (
    STAGES,
    Pixels,
    Preprocess,
    ResNet,
    count_parameters,
    create_model,
    fold_batch_norms,
    stages_to_logits,
)
from fmtune.optim import Optimization


def _random_images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _published(depth: int, seed: int = 0) -> nn.Module:
    """torchvision's network in evaluation, its batch norms with the statistics of one random batch.

    The initial statistics are 0 and 1 everywhere, which would hide a batch norm loaded into another's place.
    """
    torch.manual_seed(seed)
    network: nn.Module = getattr(torchvision.models, f"resnet{depth}")(weights=None)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        network(_random_images(2, 3, 64, 64, seed=1))
    return network.eval()


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
@torch.no_grad()
def test_published_weights_load_strictly_and_give_torchvisions_logits(depth: int) -> None:
    """In float64: how far float32 rounds apart over 152 layers is the processor's own matter."""
    theirs = _published(depth).double()
    ours = ResNet(ModelConfig.model_validate({"depth": depth, "width": 64, "stem": "imagenet"}), 3, 1000).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = _random_images(2, 3, 64, 64).double()
    expected = theirs(images)
    assert expected.std() > 0.01
    assert torch.allclose(ours.eval()(images), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("depth", "stem"), [(10, "half"), (18, "imagenet"), (50, "small")])
@torch.no_grad()
def test_folded_batch_norms_change_no_logit(depth: int, stem: str) -> None:
    """In float64, with statistics of random images; no batch norm is left, and the network itself is as it was."""
    torch.manual_seed(0)
    network = ResNet(ModelConfig.model_validate({"depth": depth, "width": 4, "stem": stem}), 3, 7).double()
    images = _random_images(4, 3, 32, 32).double()
    network(images * 2 + 1)
    expected = network.eval()(images)
    folded = fold_batch_norms(network)
    assert torch.allclose(folded(images), expected, rtol=0, atol=1e-10)
    assert not [module for module in folded.modules() if isinstance(module, nn.BatchNorm2d)]
    assert torch.equal(network(images), expected)


@torch.no_grad()
def test_stacked_head_equals_the_seed_documents_second_linear_layer() -> None:
    """Section 3.3.2 of the seed document: the published 1000-way network, then a linear layer to the classes."""
    backbone, second = _published(18).double(), nn.Linear(1000, 10).double()
    ours = ResNet(ModelConfig(depth=18, width=64, stem="imagenet", head="stack"), 3, 10).double()
    ours.load_state_dict(backbone.state_dict() | {"head.weight": second.weight, "head.bias": second.bias}, strict=True)
    images = _random_images(2, 3, 64, 64).double()
    assert torch.allclose(ours.eval()(images), second(backbone(images)), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("depth", "features"), [(10, 8 * 4), (50, 8 * 4 * 4)])
def test_stacked_head_goes_from_features_to_1000_to_classes(depth: int, features: int) -> None:
    """Hand-worked: the last stage has 8 times the width, and a bottleneck's output 4 times that."""
    network = ResNet(ModelConfig.model_validate({"depth": depth, "width": 4, "head": "stack"}), 1, 7)
    assert tuple(network.fc.weight.shape) == (1000, features)
    assert isinstance(network.head, nn.Linear)
    assert tuple(network.head.weight.shape) == (7, 1000)


@pytest.mark.parametrize(("depth", "features"), [(10, 8 * 4), (50, 8 * 4 * 4)])
def test_replaced_head_goes_from_features_to_classes(depth: int, features: int) -> None:
    network = ResNet(ModelConfig.model_validate({"depth": depth, "width": 4}), 1, 7)
    assert tuple(network.fc.weight.shape) == (7, features)
    assert count_parameters(network.head) == 0


def test_parameter_count_of_depth_10_width_16_is_308538() -> None:
    """Hand-worked for 1 channel, a 3x3 stem and 10 classes, convolutions + batch norms of each part:

    stem 144 + 32, layer1 4,608 + 64, layer2 14,336 + 192, layer3 57,344 + 384, layer4 229,376 + 768,
    linear layer 1,280 + 10.
    """
    assert count_parameters(ResNet(ModelConfig(depth=10, width=16, stem="half"), 1, 10)) == 308_538


@pytest.mark.parametrize(("width", "channels", "classes"), [(4, 1, 2), (16, 3, 10), (5, 3, 7)])
def test_parameter_count_of_depth_10_follows_the_formula(width: int, channels: int, classes: int) -> None:
    """Hand-worked: stem 9cw + 2w; layer1 18w² + 4w; a stage that doubles a channels 56a² + 12a; last 8wk + k."""
    stages = 18 * width**2 + 4 * width + sum(56 * a**2 + 12 * a for a in (width, 2 * width, 4 * width))
    expected = 9 * channels * width + 2 * width + stages + 8 * width * classes + classes
    network = ResNet(ModelConfig(depth=10, width=width, stem="small"), channels, classes)
    assert count_parameters(network) == expected


def test_parameter_count_includes_frozen_weights() -> None:
    free = ResNet(ModelConfig(width=4), 1, 2)
    frozen = ResNet(ModelConfig(width=4, pretrained="imagenet", freeze=3), 1, 2)
    assert count_parameters(frozen) == count_parameters(free)


@pytest.mark.parametrize(
    ("stem", "sides"), [("small", [28, 28, 14, 7, 4]), ("half", [14, 14, 7, 4, 2]), ("imagenet", [7, 7, 4, 2, 1])]
)
@torch.no_grad()
def test_sizes_after_stem_and_stages_of_28_pixels(stem: str, sides: list[int]) -> None:
    """Hand-worked: a stride of 2 halves and rounds up; "imagenet" has two in the stem, "half" one, "small" none."""
    network = ResNet(ModelConfig.model_validate({"width": 4, "stem": stem}), 1, 10).eval()
    x = network.maxpool(network.bn1(network.conv1(_random_images(2, 1, 28, 28))))
    seen = [x.shape[-2:]]
    for stage in STAGES[1:]:
        x = getattr(network, stage)(x)
        seen.append(x.shape[-2:])
    assert seen == [(side, side) for side in sides]


def test_preprocess_normalises_and_repeats_grey() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(4, 1, 8, 8)
    out = Preprocess(Pixels(1, (0.286,), (0.353,)), channels=3)(images)
    expected = ((images.double() / 255 - 0.286) / 0.353).repeat(1, 3, 1, 1)
    assert out.dtype == torch.float32
    assert out.shape == (4, 3, 8, 8)
    assert torch.allclose(out.double(), expected, rtol=0, atol=1e-5)


def test_preprocess_normalises_each_channel_with_its_own_statistics() -> None:
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (0.1, 0.4, 0.9), (0.2, 0.5, 1.5)
    out = Preprocess(Pixels(3, mean, std), channels=3)(images)
    for channel in range(3):
        expected = (images[:, channel].double() / 255 - mean[channel]) / std[channel]
        assert torch.allclose(out[:, channel].double(), expected, rtol=0, atol=1e-5)


def test_preprocess_with_unit_pixels_divides_by_255() -> None:
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 1, 1, 3)
    assert Preprocess(Pixels.unit(1), 1)(images).flatten().tolist() == pytest.approx([0, 0.2, 1])


@pytest.mark.parametrize("channels", [None, 1, 3])
def test_created_model_takes_the_configured_channels_or_the_datas(channels: int | None) -> None:
    network = create_model(ModelConfig.model_validate({"width": 4, "channels": channels}), 1, 2)
    assert network.conv1.weight.shape[1] == (channels or 1)


def test_created_models_differ_by_the_global_seed_alone() -> None:
    def create(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return create_model(ModelConfig(width=4), 1, 2).state_dict()

    first, again, other = create(0), create(0), create(1)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["layer4.0.conv2.weight"], other["layer4.0.conv2.weight"])


@pytest.mark.parametrize("freeze", range(6))
def test_training_step_changes_exactly_what_is_not_frozen(freeze: int) -> None:
    """Parameters and batch-norm buffers alike; frozen ones stay bit for bit, in spite of weight decay."""
    torch.manual_seed(0)
    config = ModelConfig(width=4, stem="small", pretrained="imagenet", freeze=freeze)
    network = create_model(config, 1, 3)
    before = copy.deepcopy(network.state_dict())
    optim = OptimConfig(name="sgd", lr=0.1, weight_decay=0.1, schedule="constant")
    optimization = Optimization(network, optim, steps=1)
    network.train()
    optimization.minimise(nn.functional.cross_entropy(network(_random_images(6, 1, 16, 16)), torch.arange(6) % 3))
    frozen = ("conv1.", "bn1.", "layer1.", "layer2.", "layer3.", "layer4.")[: freeze + 1 if freeze else 0]
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith(frozen), name


def test_freeze_without_pretrained_weights_is_refused() -> None:
    with pytest.raises(ValidationError, match="set pretrained, or freeze to 0"):
        ModelConfig(freeze=2)


def test_thawing_what_is_not_frozen_is_refused() -> None:
    with pytest.raises(ValidationError, match="set freeze, or unfreeze_epoch to null"):
        ModelConfig(pretrained="imagenet", unfreeze_epoch=2)


@torch.no_grad()
@pytest.mark.parametrize("freeze", range(6))
def test_nothing_is_propagated_back_through_frozen_stages(freeze: int) -> None:
    """What they give needs no gradient, and so autograd keeps nothing of them."""
    network = create_model(ModelConfig(width=4, pretrained="imagenet", freeze=freeze), 1, 3).train()
    with torch.enable_grad():
        x = network.forward_stages(_random_images(4, 1, 16, 16), 0, freeze)
        assert not x.requires_grad
        assert network(x, first=freeze).requires_grad


@torch.no_grad()
def test_frozen_batch_norm_uses_its_statistics_in_training_too() -> None:
    """Property: with all of the backbone frozen, training and evaluation give the same logits."""
    network = create_model(ModelConfig(width=4, pretrained="imagenet", freeze=5), 1, 3)
    images = _random_images(4, 1, 16, 16)
    assert torch.equal(network.train()(images), network.eval()(images))


def test_stages_are_counted_from_the_head() -> None:
    """Every parameter of a network, each kind of name once."""
    network = create_model(ModelConfig(width=4, head="stack"), 1, 3)
    found = {name.split(".")[0]: stages_to_logits(name) for name, _ in network.named_parameters()}
    stages = {"conv1": 5, "bn1": 5, "layer1": 4, "layer2": 3, "layer3": 2, "layer4": 1}
    assert found == stages | {"fc": 0, "head": 0}


@pytest.mark.parametrize("stage", range(6))
@torch.no_grad()
def test_stages_one_after_the_other_are_the_network(stage: int) -> None:
    network = create_model(ModelConfig(width=4), 1, 3).eval()
    images = _random_images(2, 1, 12, 12)
    assert torch.equal(network(network.forward_stages(images, 0, stage), first=stage), network(images))


def test_unfreezing_makes_all_parameters_trainable_and_batch_norms_learn() -> None:
    network = create_model(ModelConfig(width=4, pretrained="imagenet", freeze=5), 1, 3)
    network.unfreeze()
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert all(module.training for module in network.train().modules())


@pytest.mark.parametrize(
    ("size", "resize", "expected"), [((8, 8), 12, (12, 12)), ((9, 6), 4, (6, 4)), ((6, 9), 8, (8, 12))]
)
def test_preprocess_brings_the_shorter_side_to_resize(
    size: tuple[int, int], resize: int, expected: tuple[int, int]
) -> None:
    """Against torchvision's own resizing of float images."""
    images = torch.randint(0, 256, (2, 1, *size), dtype=torch.uint8)
    ours = Preprocess(Pixels(1, (0.5,), (0.25,), resize), 3)(images)
    assert ours.shape == (2, 3, *expected)
    theirs = functional.resize((images / 255 - 0.5) / 0.25, list(expected), antialias=True)
    assert torch.allclose(ours, theirs.expand(-1, 3, -1, -1), atol=1e-5)
