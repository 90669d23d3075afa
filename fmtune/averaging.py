"""The mean of the weights along a training, which predicts better than those of any one step."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

_INTERVAL = 4
"""Steps from one update to the next: the mean loses nothing by it, and the steps between cost nothing."""
_EMA_SHARE = 0.02
"""Share of the training's steps over which the exponential mean forgets all but 1/e."""
_LAST_SHARE = 0.25
"""Share of the training's steps, its last ones, that the plain mean is over."""


class WeightAverage:
    """A network whose weights are the mean of another's, updated as that one is trained.

    Batch norm's statistics are averaged with the weights that they belong to. `ema` is an exponential moving mean
    (Polyak and Juditsky, 1992, https://doi.org/10.1137/0330046), `last` the plain mean over the last quarter of the
    steps (Izmailov et al., 2018, https://arxiv.org/abs/1803.05407).

    Args:
        network: the one that is trained.
        kind: which mean.
        steps: optimizer steps of the whole training.
    """

    def __init__(self, network: nn.Module, kind: Literal["ema", "last"], steps: int) -> None:
        self._steps = steps
        self._first = 0 if kind == "ema" else round((1 - _LAST_SHARE) * steps)
        share = min(1.0, _INTERVAL / (_EMA_SHARE * steps)) if kind == "ema" else None
        self._averaged = AveragedModel(network, multi_avg_fn=partial(_move, share=share), use_buffers=True)

    @property
    def network(self) -> nn.Module | None:
        """The network of mean weights; None before there are any."""
        return self._averaged.module if int(self._averaged.n_averaged) else None

    def update(self, network: nn.Module, step: int) -> None:
        """Take the weights after `step`, counted from 1 over the whole training, into the mean if it is their turn."""
        if step >= self._first and (step % _INTERVAL == 0 or step == self._steps):
            self._averaged.update_parameters(network)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self._averaged.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._averaged.load_state_dict(state)


@torch.no_grad()
def _move(averaged: list[Tensor], current: list[Tensor], count: Tensor, share: float | None) -> None:
    """Move means of `count` earlier values toward the current ones, by a share or, if None, as a plain mean does.

    torch's own functions fail on, or round, batch norm's counts of batches; of those the latest is taken.
    """
    if averaged[0].is_floating_point():
        torch._foreach_lerp_(averaged, current, share or 1 / (int(count) + 1))
    else:
        torch._foreach_copy_(averaged, current)
