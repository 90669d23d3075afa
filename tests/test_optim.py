from __future__ import annotations

import copy
import io
import math
from typing import Any, Literal

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.optim import Muon

from fmtune.config import AugmentConfig, ModelConfig, OptimConfig, TrialConfig
from fmtune.model import Pixels, Preprocess, ResNet, create_model
from fmtune.optim import ConvMuon, Optimization
from fmtune.training import _training_loss

Name = Literal["adamw", "adam", "sgd", "muon"]
NAMES: tuple[Name, ...] = ("adamw", "adam", "sgd", "muon")


def _network(freeze: int = 0, seed: int = 0) -> ResNet:
    """A tiny network; its parameters are all random, batch norms' and biases' too."""
    config = ModelConfig(width=4, stem="small", pretrained="imagenet" if freeze else None, freeze=freeze)
    network = create_model(config, 1, 3)
    generator = Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return network


def _decaying_weights(network: nn.Module) -> set[str]:
    return {f"{name}.weight" for name, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}


def _learning_rates(config: OptimConfig, steps: int) -> list[float]:
    """The rate of each step of a training."""
    network = nn.Linear(1, 1)
    optimization = Optimization(network, config, steps)
    rates = []
    for _ in range(steps):
        rates.append(optimization.learning_rate)
        optimization.minimise(_sum_of_parameters(network))
    return rates


def _step_without_gradient(name: Name) -> tuple[dict[str, Tensor], dict[str, Tensor], set[str]]:
    """Parameters before and after a step with lr 0.1 and weight decay 0.5 whose gradients are zero."""
    network = _network()
    before = {key: parameter.detach().clone() for key, parameter in network.named_parameters()}
    config = OptimConfig(name=name, lr=0.1, momentum=0.9, weight_decay=0.5, schedule="constant")
    optimization = Optimization(network, config, steps=1)
    optimization.minimise(_sum_of_parameters(network) * 0.0)
    after = {key: parameter.detach() for key, parameter in network.named_parameters()}
    return before, after, _decaying_weights(network)


@pytest.mark.parametrize("name", NAMES)
def test_weight_decay_moves_weights_and_leaves_norms_and_biases(name: Name) -> None:
    before, after, decaying = _step_without_gradient(name)
    assert {key for key in before if not torch.equal(before[key], after[key])} == decaying


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_decoupled_decay_shrinks_weights_by_rate_times_decay(name: Name) -> None:
    """Hand-worked: w (1 - 0.1 * 0.5)."""
    before, after, decaying = _step_without_gradient(name)
    for key in decaying:
        assert torch.allclose(after[key], before[key] * 0.95, rtol=1e-6)


def test_sgds_decay_is_added_to_the_gradient() -> None:
    """Hand-worked: the gradient is 0.5 w, Nesterov's first step takes 1.9 of it, so w (1 - 0.1 * 1.9 * 0.5)."""
    before, after, decaying = _step_without_gradient("sgd")
    for key in decaying:
        assert torch.allclose(after[key], before[key] * 0.905, rtol=1e-5)


def test_adams_decay_is_added_to_the_gradient() -> None:
    """Hand-worked: Adam's first step is the learning rate against the sign of the gradient 0.5 w."""
    before, after, decaying = _step_without_gradient("adam")
    for key in decaying:
        large = before[key].abs() > 0.01
        assert torch.allclose(after[key][large], (before[key] - 0.1 * before[key].sign())[large], atol=1e-5)


def test_label_smoothing_gives_the_hand_worked_loss() -> None:
    """Logits (1, 0, 0), label 0, smoothing 0.3: targets are (0.8, 0.1, 0.1), so the loss is ln(e + 2) - 0.8."""
    config = TrialConfig(augment=AugmentConfig(flip=False, translate=0), optim=OptimConfig(label_smoothing=0.3))
    images = torch.tensor([255, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1)
    loss = _training_loss(nn.Flatten(), Preprocess(Pixels.unit(3), 3)(images), torch.tensor([0]), config, Generator())
    assert loss.item() == pytest.approx(math.log(math.e + 2) - 0.8, abs=1e-6)


def test_onecycle_rises_over_a_quarter_and_falls_to_the_end() -> None:
    """Hand-worked for 100 steps to a peak of 0.5: from 1/25 of it up in 24 steps, then down in 75 to 1/250,000."""
    rates = _learning_rates(OptimConfig(name="sgd", lr=0.5, schedule="onecycle"), 100)
    last = 0.5 / 25 / 10_000
    assert rates[0] == pytest.approx(0.02)
    assert rates[12] == pytest.approx((0.02 + 0.5) / 2)
    assert rates[24] == pytest.approx(0.5)
    assert rates[49] == pytest.approx(0.5 + (last - 0.5) * 25 / 75)
    assert rates[99] == pytest.approx(last)


def test_cosine_falls_to_zero() -> None:
    """Hand-worked for 100 steps from 0.5: 0.25 (1 + cos(pi t / 100)), which is zero after the last."""
    rates = _learning_rates(OptimConfig(name="sgd", lr=0.5, schedule="cosine"), 100)
    assert rates[0] == pytest.approx(0.5)
    assert rates[25] == pytest.approx(0.25 * (1 + math.sqrt(0.5)))
    assert rates[50] == pytest.approx(0.25)
    assert rates[99] == pytest.approx(0.25 * (1 - math.cos(math.pi / 100)))


def test_constant_stays() -> None:
    assert _learning_rates(OptimConfig(name="sgd", lr=0.5, schedule="constant"), 100) == [0.5] * 100


@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "constant"])
@pytest.mark.parametrize("name", NAMES)
def test_all_groups_of_an_optimizer_share_the_scheduled_rate(name: Name, schedule: Any) -> None:
    network = _network()
    optimization = Optimization(network, OptimConfig(name=name, lr=0.01, schedule=schedule), steps=10)
    for _ in range(10):
        rates = {group["lr"] for optimizer in optimization.optimizers for group in optimizer.param_groups}
        assert rates == {optimization.learning_rate}
        optimization.minimise(_sum_of_parameters(network))


@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "constant"])
@pytest.mark.parametrize("name", NAMES)
def test_layer_decay_lowers_the_rate_stage_by_stage_toward_the_input(name: Name, schedule: Any) -> None:
    """Hand-worked for a factor of 0.5: the head has the rate, layer4 half of it, ..., the stem 1/32, at every step."""
    network = _network()
    config = OptimConfig(name=name, lr=0.01, schedule=schedule, layer_decay=0.5)
    optimization = Optimization(network, config, steps=10)
    halvings = {"fc": 0, "layer4": 1, "layer3": 2, "layer2": 3, "layer1": 4, "conv1": 5, "bn1": 5}
    expected = {p.data_ptr(): halvings[key.split(".")[0]] for key, p in network.named_parameters()}
    for _ in range(10):
        groups = [group for optimizer in optimization.optimizers for group in optimizer.param_groups]
        rates = {p.data_ptr(): group["lr"] for group in groups for p in group["params"]}
        assert rates == pytest.approx({key: optimization.learning_rate / 2**n for key, n in expected.items()})
        optimization.minimise(_sum_of_parameters(network))


@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "constant"])
@pytest.mark.parametrize("steps", range(1, 10))
def test_a_training_of_few_steps_has_a_rate_for_each(steps: int, schedule: Any) -> None:
    """Property: 0 < rate <= peak, however short the training is."""
    rates = _learning_rates(OptimConfig(name="sgd", lr=0.5, schedule=schedule), steps)
    assert len(rates) == steps
    assert all(0 < rate <= 0.5 for rate in rates)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(8, 4, 3, 3), (32, 1, 3, 3), (16, 8, 1, 1), (6, 3, 7, 7)])
def test_conv_muon_steps_as_torchs_muon_on_the_flattened_weight(
    shape: tuple[int, ...], memory_format: torch.memory_format
) -> None:
    generator = Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(shape, generator=generator).to(memory_format=memory_format))
    matrix = nn.Parameter(weight.detach().reshape(shape[0], -1).clone())
    ours = ConvMuon([{"params": [weight], "weight_decay": 0.1}], lr=0.1, momentum=0.9)
    theirs = Muon([matrix], lr=0.1, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    step_size = 0.1 * 0.2 * math.sqrt(max(matrix.shape))
    for _ in range(3):
        gradient = torch.randn(shape, generator=generator)
        weight.grad = gradient.to(memory_format=memory_format)
        matrix.grad = gradient.reshape(shape[0], -1)
        ours.take_gradients()
        ours.step()
        theirs.step()
        # Muon orthogonalises in bfloat16, whose sums depend on the order of the columns, so on the memory format.
        tolerance = 0.0 if memory_format == torch.contiguous_format else 0.02 * step_size
        assert torch.allclose(weight.detach().reshape(shape[0], -1), matrix.detach(), rtol=0, atol=tolerance)


def test_conv_muons_update_is_of_the_size_of_adamws() -> None:
    """Property of the scaling of Liu et al., 2025: the update's root mean square is about 0.2 of the learning rate."""
    generator = Generator().manual_seed(0)
    weight = nn.Parameter(torch.zeros(32, 8, 3, 3))
    weight.grad = torch.randn(weight.shape, generator=generator)
    muon = ConvMuon([{"params": [weight], "weight_decay": 0.0}], lr=0.1, momentum=0.9)
    muon.take_gradients()
    muon.step()
    assert float(weight.detach().square().mean().sqrt()) == pytest.approx(0.2 * 0.1, rel=0.3)


def test_muon_trains_the_convolutions_and_adamw_the_rest() -> None:
    network = _network()
    muon, adamw = Optimization(network, OptimConfig(name="muon"), steps=1).optimizers
    convolutions = {module.weight.data_ptr() for module in network.modules() if isinstance(module, nn.Conv2d)}
    parameters = {parameter.data_ptr() for parameter in network.parameters()}
    assert isinstance(muon, ConvMuon)
    assert _addresses(muon.param_groups) == convolutions
    assert isinstance(adamw, torch.optim.AdamW)
    assert _addresses(adamw.param_groups) == parameters - convolutions


def _addresses(groups: list[dict[str, Any]]) -> set[int]:
    return {parameter.data_ptr() for group in groups for parameter in group["params"]}


def _train(network: nn.Module, optimization: Optimization, steps: int, seed: int) -> None:
    generator = Generator().manual_seed(seed)
    network.train()
    for _ in range(steps):
        images = torch.randn(6, 1, 8, 8, generator=generator)
        optimization.minimise(nn.functional.cross_entropy(network(images), torch.arange(6) % 3))


@pytest.mark.parametrize("freeze", [0, 2, 5])
@pytest.mark.parametrize("name", NAMES)
def test_trainable_parameters_alone_are_in_groups_and_have_state(name: Name, freeze: int) -> None:
    """Optimizers see Muon's matrices in place of the weights, so memory addresses tell which they are."""
    network = _network(freeze)
    optimization = Optimization(network, OptimConfig(name=name), steps=2)
    _train(network, optimization, steps=1, seed=0)
    trainable = {parameter.data_ptr() for parameter in network.parameters() if parameter.requires_grad}
    groups = [group for optimizer in optimization.optimizers for group in optimizer.param_groups]
    with_state = {parameter.data_ptr() for optimizer in optimization.optimizers for parameter in optimizer.state}
    assert _addresses(groups) == trainable
    assert with_state == trainable


@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "constant"])
@pytest.mark.parametrize("name", NAMES)
def test_restored_state_continues_bit_for_bit(name: Name, schedule: Any) -> None:
    """3 + 3 steps with a saved and loaded state in between equal 6 steps."""
    config = OptimConfig(name=name, lr=0.01, schedule=schedule)
    network = _network()
    optimization = Optimization(network, config, steps=6)
    _train(network, optimization, steps=3, seed=0)
    saved, weights = io.BytesIO(), copy.deepcopy(network.state_dict())
    torch.save(optimization.state_dict(), saved)
    saved.seek(0)

    resumed = _network(seed=1)
    resumed_optimization = Optimization(resumed, config, steps=6)
    resumed.load_state_dict(weights)
    resumed_optimization.load_state_dict(torch.load(saved, weights_only=True))
    _train(network, optimization, steps=3, seed=1)
    _train(resumed, resumed_optimization, steps=3, seed=1)
    for key, value in network.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key
    assert resumed_optimization.learning_rate == optimization.learning_rate


@pytest.mark.parametrize("name", NAMES)
def test_a_step_that_overflows_under_loss_scaling_leaves_no_trace(name: Name) -> None:
    """After a skipped first step the weights, after one more they equal those of a run that never overflowed.

    All gradients are powers of two, which scaling down and up again does not round.
    """
    config = OptimConfig(name=name, lr=0.125, weight_decay=0.0, schedule="constant")
    skipping, plain = _network(), _network()
    before = copy.deepcopy(skipping.state_dict())
    optimization = Optimization(skipping, config, steps=2, loss_scaling=True)
    # The scale starts at 65,536, so that the gradient of this loss overflows float32.
    optimization.minimise(_sum_of_parameters(skipping) * 2.0**120)
    assert all(torch.equal(value, before[key]) for key, value in skipping.state_dict().items())

    optimization.minimise(_sum_of_parameters(skipping))
    plain_optimization = Optimization(plain, config, steps=1)
    plain_optimization.minimise(_sum_of_parameters(plain))
    for key, value in plain.state_dict().items():
        assert torch.allclose(skipping.state_dict()[key], value, rtol=1e-5, atol=1e-5), key


def test_loss_scaling_goes_with_convolutions_that_are_all_frozen_still() -> None:
    network = _network(freeze=5).train()
    before = copy.deepcopy(network.state_dict())
    optimization = Optimization(
        network, OptimConfig(name="muon", lr=0.01), steps=3, loss_scaling=True, will_unfreeze=True
    )
    for _ in range(2):
        optimization.minimise(network(torch.ones(2, 1, 8, 8)).sum())
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"fc.weight", "fc.bias"}


def _sum_of_parameters(network: nn.Module) -> Tensor:
    return torch.stack([parameter.sum() for parameter in network.parameters()]).sum()
