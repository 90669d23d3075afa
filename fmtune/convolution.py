"""Convolutions that are cheap to train on the small feature maps of small images."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

_SMALL_MAP = 4
"""Pixels of an output map up to which a weight gradient is best taken as a matrix product, whatever the stride."""
_FEW_CHANNELS = 16
"""Input channels below which it is not."""


class Conv2d(nn.Conv2d):
    """A convolution without bias, zero-padded by half its kernel: torch's numbers, and less work in training on a CPU.

    oneDNN computes with every tap of a kernel, also with those that only ever meet padding: of a 3x3 kernel on a map of
    one pixel all but the middle one. They are left out here. And its bf16 weight gradient is slow where the convolution
    is strided or the map small; there it is a matrix product here (`benchmarks/README.md` has the times).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        if images.device.type != "cpu" or not torch.is_grad_enabled():
            return super().forward(images)
        kernel, stride = self.kernel_size[0], self.stride[0]
        (top, bottom), (left, right) = (used_taps(size, kernel, stride) for size in images.shape[2:])
        weight = self.weight[:, :, top:bottom, left:right]
        padding = (kernel // 2 - top, kernel // 2 - left)
        if not self._multiplies(images):
            return F.conv2d(images, weight, None, stride, padding)
        result: Tensor = _MatrixGradient.apply(images.bfloat16(), weight.bfloat16(), stride, padding)
        return result

    def _multiplies(self, images: Tensor) -> bool:
        """Whether the gradient of the weight is to be a matrix product."""
        bf16 = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        if not bf16 or self.in_channels < _FEW_CHANNELS:
            return False
        stride = self.stride[0]
        pixels = -(-images.shape[2] // stride) * -(-images.shape[3] // stride)
        return stride > 1 or pixels <= _SMALL_MAP


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


def used_taps(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """First tap of a kernel that meets one of `size` pixels, and one past the last, at a padding of half the kernel."""
    padding = kernel // 2
    last_start = (size - 1) // stride * stride - padding
    return max(0, -last_start), min(kernel, size + padding)


class _MatrixGradient(Function):
    """A convolution of images (N, C, H, W) whose weight gradient is the output's gradient times the input's patches."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, stride: int, padding: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(images, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(images, weight, None, stride, padding)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (gradient,) = gradients
        images, weight = ctx.saved_tensors
        for_images = for_weight = None
        if ctx.needs_input_grad[0]:
            stride, padding = [ctx.stride] * 2, list(ctx.padding)
            for_images, _, _ = torch.ops.aten.convolution_backward(
                gradient, images, weight, None, stride, padding, [1, 1], False, [0, 0], 1, [True, False, False]
            )
        if ctx.needs_input_grad[1]:
            for_weight = _weight_gradient(images, gradient, weight.shape, ctx.stride, ctx.padding)
        return for_images, for_weight, None, None


def _weight_gradient(
    images: Tensor, gradient: Tensor, shape: torch.Size, stride: int, padding: tuple[int, int]
) -> Tensor:
    """Gradient (O, C, h, w) of a weight from images (N, C, H, W) and the output's gradient (N, O, H', W')."""
    outputs, channels, height, width = shape
    padded = F.pad(images.permute(0, 2, 3, 1), (0, 0, padding[1], padding[1], padding[0], padding[0])).contiguous()
    image, row, column, _ = padded.stride()
    size = (len(images), *gradient.shape[2:], height, width, channels)
    patches = padded.as_strided(size, (image, row * stride, column * stride, row, column, 1))
    product = gradient.permute(0, 2, 3, 1).reshape(-1, outputs).t() @ patches.reshape(-1, height * width * channels)
    return product.view(outputs, height, width, channels).permute(0, 3, 1, 2)
