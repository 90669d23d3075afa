"""Parameter groups, the optimizer, and the learning rate over the steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LRScheduler, OneCycleLR

from fmtune.config import OptimConfig

_ONECYCLE_STEPS = 5
"""Fewest steps that torch can lay both legs of the cycle over."""


class Optimization:
    """The optimizers of a network and their schedules, stepped together.

    Args:
        network: its trainable parameters are optimised; frozen ones get no state.
        config: optimizer, peak learning rate, decay and schedule.
        steps: optimizer steps of the whole training, over which the schedule is laid.
        loss_scaling: scale losses so that fp16 gradients don't underflow, and pass over steps whose gradients
            overflow (Micikevicius et al., 2018, https://arxiv.org/abs/1710.03740).
    """

    def __init__(self, network: nn.Module, config: OptimConfig, steps: int, loss_scaling: bool = False) -> None:
        self.optimizers = _create_optimizers(network, config)
        self.schedulers = [_create_scheduler(optimizer, config, steps) for optimizer in self.optimizers]
        device = next(network.parameters()).device
        self._scaler = torch.amp.GradScaler(device.type, enabled=loss_scaling)

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next step."""
        return float(self.optimizers[0].param_groups[0]["lr"])

    def minimise(self, loss: Tensor) -> None:
        """Gradients of the loss, one update of the parameters with them, and the learning rate moved on."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self._scaler.scale(loss).backward()
        scale = self._scaler.get_scale()
        for optimizer in self.optimizers:
            if isinstance(optimizer, ConvMuon):
                optimizer.take_gradients()
            self._scaler.step(optimizer)
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
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
            _match_memory_format(optimizer)
        for scheduler, saved in zip(self.schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(saved)
        self._scaler.load_state_dict(state["scaler"])


class ConvMuon(Muon):
    """torch's Muon, which takes matrices, for convolution weights (out, in, h, w) seen as (out, in * h * w).

    The update is scaled to the size of AdamW's (Liu et al., 2025, https://arxiv.org/abs/2502.16982), so that both
    share one learning rate.
    """

    def __init__(self, weights: Sequence[Tensor], lr: float, momentum: float, weight_decay: float) -> None:
        self._weights = weights
        matrices = [nn.Parameter(_as_matrix(weight.detach(), weight)) for weight in weights]
        super().__init__(matrices, lr=lr, momentum=momentum, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    def take_gradients(self) -> None:
        """Show the weights' gradients to the matrices; must come before each step."""
        for weight, matrix in zip(self._weights, self.param_groups[0]["params"], strict=True):
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


def _create_optimizers(network: nn.Module, config: OptimConfig) -> list[Optimizer]:
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if config.name != "muon":
        return [_create_plain_optimizer(trainable, config)]
    convolutions = [parameter for parameter in trainable if parameter.ndim == 4]
    others = [parameter for parameter in trainable if parameter.ndim != 4]
    optimizers: list[Optimizer] = [AdamW(_decay_groups(others, config.weight_decay), lr=config.lr, fused=True)]
    if convolutions:
        optimizers.insert(0, ConvMuon(convolutions, config.lr, config.momentum, config.weight_decay))
    return optimizers


def _create_plain_optimizer(parameters: list[nn.Parameter], config: OptimConfig) -> Optimizer:
    groups = _decay_groups(parameters, config.weight_decay)
    match config.name:
        case "adamw":
            return AdamW(groups, lr=config.lr, fused=True)
        case "adam":
            return Adam(groups, lr=config.lr, fused=True)
        case _:
            return SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0)


def _decay_groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: weights, which decay, and norms and biases, which are vectors and do not."""
    return [
        {"params": [parameter for parameter in parameters if parameter.ndim > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.ndim <= 1], "weight_decay": 0.0},
    ]


def _create_scheduler(optimizer: Optimizer, config: OptimConfig, steps: int) -> LRScheduler:
    match config.schedule:
        case "onecycle":
            # Smith and Topin, 2019, https://arxiv.org/abs/1708.07120.
            return OneCycleLR(
                optimizer,
                config.lr,
                max(steps, _ONECYCLE_STEPS),
                pct_start=0.25,
                anneal_strategy="linear",
                cycle_momentum=False,
            )
        case "cosine":
            return CosineAnnealingLR(optimizer, T_max=steps)
        case _:
            return ConstantLR(optimizer, factor=1.0)
