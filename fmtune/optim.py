"""Parameter groups, the optimizer, and the learning rate over the steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LRScheduler, OneCycleLR

from fmtune.config import OptimConfig
from fmtune.model import stages_to_logits

Group = dict[str, Any]
"""Parameters that an optimizer treats alike: `params`, and how."""

_SETTINGS = ("initial_lr", "max_lr", "min_lr", "weight_decay", "momentum")
"""What a group of an optimizer has from the configuration; its `lr` is where the schedule has got to."""
_ONECYCLE_STEPS = 5
"""Fewest steps that torch can lay both legs of the cycle over."""


class Optimization:
    """The optimizers of a network and their schedules, stepped together.

    Args:
        network: its trainable parameters are optimised; frozen ones get no state. By their names they belong to
            stages, which `config.layer_decay` gives rates of their own.
        config: optimizer, peak learning rate, decay and schedule.
        steps: optimizer steps of the whole training, over which the schedule is laid.
        loss_scaling: scale losses so that fp16 gradients don't underflow, and pass over steps whose gradients
            overflow (Micikevicius et al., 2018, https://arxiv.org/abs/1710.03740).
        will_unfreeze: frozen parameters are to be trained later, and join in once they have gradients.
    """

    def __init__(
        self,
        network: nn.Module,
        config: OptimConfig,
        steps: int,
        loss_scaling: bool = False,
        will_unfreeze: bool = False,
    ) -> None:
        self.optimizers = _create_optimizers(network, config, will_unfreeze)
        self.schedulers = [_create_scheduler(optimizer, config, steps) for optimizer in self.optimizers]
        device = next(network.parameters()).device
        self._scaler = torch.amp.GradScaler(device.type, enabled=loss_scaling)

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next step, of the head where stages have rates of their own."""
        group = self.optimizers[0].param_groups[0]
        return float(group["lr"] / group["share"])

    def minimise(self, loss: Tensor) -> None:
        """Gradients of the loss, one update of the parameters with them, and the learning rate moved on."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self._scaler.scale(loss).backward()
        scale = self._scaler.get_scale()
        for optimizer in self.optimizers:
            if isinstance(optimizer, ConvMuon):
                optimizer.take_gradients()
            if any(parameter.grad is not None for group in optimizer.param_groups for parameter in group["params"]):
                self._scaler.step(optimizer)
            else:
                # All frozen still, which a scaler refuses; schedulers want to see a step.
                optimizer.step()
        self._scaler.update()
        # The scale falls where gradients overflowed and the update was passed over.
        if self._scaler.get_scale() >= scale:
            for scheduler in self.schedulers:
                scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        return {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "scaler": self._scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a state was saved, with this configuration's rates, momentum and decay, if those have changed."""
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            own = [{key: group[key] for key in _SETTINGS if key in group} for group in optimizer.param_groups]
            optimizer.load_state_dict(saved)
            for group, settings in zip(optimizer.param_groups, own, strict=True):
                group["lr"] *= settings["initial_lr"] / group["initial_lr"]
                group.update(settings)
            _match_memory_format(optimizer)
        for scheduler, saved in zip(self.schedulers, state["schedulers"], strict=True):
            base = scheduler.base_lrs
            scheduler.load_state_dict(saved)
            scheduler.base_lrs = base
        self._scaler.load_state_dict(state["scaler"])


class ConvMuon(Muon):
    """torch's Muon, which takes matrices, for groups of convolution weights (out, in, h, w) seen as (out, in * h * w).

    The update is scaled to the size of AdamW's (Liu et al., 2025, https://arxiv.org/abs/2502.16982), so that both
    share one learning rate.
    """

    def __init__(self, groups: Sequence[Group], lr: float, momentum: float) -> None:
        self._weights = [weight for group in groups for weight in group["params"]]
        self._matrices = [nn.Parameter(_as_matrix(weight.detach(), weight)) for weight in self._weights]
        matrices = iter(self._matrices)
        # As the weights were given, each in the place of its own.
        own = [group | {"params": [next(matrices) for _ in group["params"]]} for group in groups]
        super().__init__(own, lr=lr, momentum=momentum, adjust_lr_fn="match_rms_adamw")

    def take_gradients(self) -> None:
        """Show the weights' gradients to the matrices; must come before each step."""
        for weight, matrix in zip(self._weights, self._matrices, strict=True):
            matrix.grad = None if weight.grad is None else _as_matrix(weight.grad, weight)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for weight in self._weights:
            weight.grad = None


def _as_matrix(tensor: Tensor, weight: Tensor) -> Tensor:
    """`tensor`, of the shape of `weight`, as (out, rest) in the order in which `weight` lies in memory.

    So a weight gives a view that shares its memory, whichever memory format it is in. The order of the columns
    differs between the formats; Muon's update commutes with a permutation of columns.
    """
    if weight.is_contiguous():
        return tensor.reshape(weight.shape[0], -1)
    return tensor.permute(0, 2, 3, 1).reshape(weight.shape[0], -1)


def _match_memory_format(optimizer: Optimizer) -> None:
    """Lay loaded state out as its parameter is: fused optimizers walk both through memory side by side."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _create_optimizers(network: nn.Module, config: OptimConfig, will_unfreeze: bool) -> list[Optimizer]:
    trainable = [(name, p) for name, p in network.named_parameters() if p.requires_grad or will_unfreeze]
    if config.name != "muon":
        return [_create_plain_optimizer(_create_groups(trainable, config), config)]
    convolutions = [(name, parameter) for name, parameter in trainable if parameter.ndim == 4]
    others = [(name, parameter) for name, parameter in trainable if parameter.ndim != 4]
    optimizers: list[Optimizer] = [AdamW(_create_groups(others, config), lr=config.lr, fused=True)]
    if convolutions:
        optimizers.insert(0, ConvMuon(_create_groups(convolutions, config), config.lr, config.momentum))
    return optimizers


def _create_plain_optimizer(groups: list[Group], config: OptimConfig) -> Optimizer:
    match config.name:
        case "adamw":
            return AdamW(groups, lr=config.lr, fused=True)
        case "adam":
            return Adam(groups, lr=config.lr, fused=True)
        case _:
            return SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0)


def _create_groups(parameters: Sequence[tuple[str, nn.Parameter]], config: OptimConfig) -> list[Group]:
    """Parameters by what they share of the learning rate and by their weight decay.

    Norms and biases, which are vectors, do not decay. `share` is the stage's part of the head's learning rate.
    """
    groups: dict[tuple[float, float], Group] = {}
    for name, parameter in parameters:
        share = config.layer_decay ** stages_to_logits(name)
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        group = {"params": [], "lr": config.lr * share, "share": share, "weight_decay": decay}
        groups.setdefault((share, decay), group)["params"].append(parameter)
    return list(groups.values())


def _create_scheduler(optimizer: Optimizer, config: OptimConfig, steps: int) -> LRScheduler:
    match config.schedule:
        case "onecycle":
            # Smith and Topin, 2019, https://arxiv.org/abs/1708.07120.
            return OneCycleLR(
                optimizer,
                [group["lr"] for group in optimizer.param_groups],
                max(steps, _ONECYCLE_STEPS),
                pct_start=0.25,
                anneal_strategy="linear",
                cycle_momentum=False,
            )
        case "cosine":
            return CosineAnnealingLR(optimizer, T_max=steps)
        case _:
            return ConstantLR(optimizer, factor=1.0)
