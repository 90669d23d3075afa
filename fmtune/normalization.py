"""Batch norm whose statistics are those of the global batch, however many workers share it out among them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fmtune.collectives import sum_over_workers


class BatchNorm2d(nn.BatchNorm2d):
    """torch's `BatchNorm2d`, and in training with several workers one over all of their images.

    torch's own `SyncBatchNorm` does the same on GPUs alone.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(x)
        normalized: Tensor
        normalized, mean, variance, count = _NormalizeGlobally.apply(x, self.weight, self.bias, self.eps)
        self._track(mean, variance, count)
        return normalized

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        weight = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, weight)
        # As torch does: biased to normalise by, unbiased to keep.
        self.running_var.lerp_(variance * (count / (count - 1)), weight)


class _NormalizeGlobally(torch.autograd.Function):
    """Normalisation by mean and variance over all workers' (N, H, W), with its gradient through both.

    The passes over the images are those of torch's kernels for fixed statistics; what those leave out of the gradient
    is added to it (Ioffe and Szegedy, 2015, https://arxiv.org/abs/1502.03167, with sums over all workers).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, variance, count = _measure(x)
        # Sums of squares about zero would cancel where the mean is far from it: the float64 ones do not.
        sums = torch.cat([mean * count, (variance + mean.square()) * count, mean.new_tensor([count])])
        sum_over_workers(sums)
        total = sums[-1]
        mean, square = (sums[:-1] / total).chunk(2)
        variance = (square - mean.square()).clamp_min(0)
        mean, variance = mean.float(), variance.float()
        ctx.save_for_backward(x, weight, mean, variance, total)
        ctx.eps = eps
        values = total.float()
        ctx.mark_non_differentiable(mean, variance, values)
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps), mean, variance, values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance, total = ctx.saved_tensors
        # Empty statistics of the batch stand for none; the kernel for GPUs does not take None.
        empty = mean.new_empty(0)
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, mean, variance, empty, empty, False, ctx.eps, [True, True, True]
        )
        sums = torch.stack([grad_bias, grad_weight]).double()
        sum_over_workers(sums)
        of_bias, of_weight = (sums / total).float()
        # What comes through mean and variance: scale * (of_bias + normalised x * of_weight), linear in x.
        scale = (variance + ctx.eps).rsqrt()
        slope = weight * scale.square() * of_weight
        offset = weight * scale * of_bias - slope * mean
        through = torch.addcmul(_per_channel(offset, x), x, _per_channel(slope, x))
        return grad_x.sub_(through), grad_weight, grad_bias, None


def _measure(x: Tensor) -> tuple[Tensor, Tensor, float]:
    """Mean and biased variance float64 (C,) of each channel of (N, C, H, W), and how many values each has."""
    # As rows of channels, which is how channels_last lies in memory; torch.var_mean takes ten times as long.
    rows = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).float()
    mean = rows.mean(dim=0)
    variance = (rows - mean).square_().mean(dim=0)
    return mean.double(), variance.double(), float(len(rows))


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.to(x.dtype).view(1, -1, 1, 1)
