from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor, nn

from fmtune.convolution import Conv2d, SubsampledConv2d, used_taps


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=Generator().manual_seed(seed))


def _gradients(layer: nn.Conv2d, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, and gradients of images and weight, for a fixed gradient of the output."""
    images = images.clone().requires_grad_()
    output = layer(images)
    output.backward(_random(*output.shape, seed=1).to(output.dtype))
    assert images.grad is not None
    assert layer.weight.grad is not None
    return output.detach(), images.grad, layer.weight.grad


def _pair(channels: int, outputs: int, kernel: int, stride: int) -> tuple[Conv2d, nn.Conv2d]:
    """One of ours and torch's own, of the same weights."""
    ours = Conv2d(channels, outputs, kernel, stride)
    theirs = nn.Conv2d(channels, outputs, kernel, stride, padding=kernel // 2, bias=False)
    with torch.no_grad():
        ours.weight.copy_(_random(*ours.weight.shape, seed=2))
        theirs.weight.copy_(ours.weight)
    return ours, theirs


@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_used_taps_are_those_that_some_position_lays_on_a_pixel(kernel: int, stride: int) -> None:
    """Against counting: tap t at output o reads pixel o * stride + t - kernel // 2."""
    for size in range(1, 20):
        outputs = (size + 2 * (kernel // 2) - kernel) // stride + 1
        taps = [t for t in range(kernel) if any(0 <= o * stride + t - kernel // 2 < size for o in range(outputs))]
        assert used_taps(size, kernel, stride) == (taps[0], taps[-1] + 1), size


@pytest.mark.parametrize("kernel", [1, 3, 7])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 3), (4, 2), (7, 7), (8, 5)])
def test_convolution_and_gradients_are_torchs(size: tuple[int, int], stride: int, kernel: int) -> None:
    """Against torch's own in fp32, on maps of a pixel as on larger ones, square or not."""
    ours, theirs = _pair(18, 4, kernel, stride)
    images = _random(3, 18, *size)
    for own, expected in zip(_gradients(ours, images), _gradients(theirs, images), strict=True):
        assert own.shape == expected.shape
        assert torch.allclose(own, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("size", "stride", "kernel"), [(2, 1, 3), (1, 1, 3), (7, 2, 3), (4, 2, 3), (2, 1, 1), (9, 2, 7)]
)
def test_bf16_gradients_by_a_matrix_product_are_those_of_fp32_but_for_rounding(
    size: int, stride: int, kernel: int, memory_format: torch.memory_format
) -> None:
    """Each gradient is a sum of products of numbers that bf16 keeps 8 bits of, so it is right to about 1%."""
    ours, theirs = _pair(20, 6, kernel, stride)
    images = _random(5, 20, size, size).to(memory_format=memory_format)
    ours = ours.to(memory_format=memory_format)  # type: ignore[call-overload]
    with torch.autocast("cpu", torch.bfloat16):
        output = ours(images)
        assert type(output.grad_fn).__name__ == "_MatrixGradientBackward"
        found = _gradients(ours, images)
    for own, expected in zip(found, _gradients(theirs, images), strict=True):
        assert float((own.float() - expected).norm() / expected.norm()) < 0.02


def test_large_maps_and_few_channels_keep_torchs_own_gradient() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert "MatrixGradient" not in type(Conv2d(20, 6, 3)(_random(2, 20, 7, 7)).grad_fn).__name__
        assert "MatrixGradient" not in type(Conv2d(3, 6, 3, 2)(_random(2, 3, 8, 8)).grad_fn).__name__


def test_taps_that_meet_padding_alone_have_a_gradient_of_zero() -> None:
    """So that an optimizer treats them as it would with torch's own convolution."""
    ours, _ = _pair(18, 4, 3, 1)
    _, _, gradient = _gradients(ours, _random(3, 18, 1, 1))
    middle = torch.zeros(3, 3, dtype=torch.bool)
    middle[1, 1] = True
    assert bool((gradient[:, :, middle] != 0).all())
    assert bool((gradient[:, :, ~middle] == 0).all())


@pytest.mark.parametrize("size", [7, 8])
def test_a_subsampled_convolution_is_the_strided_one(size: int) -> None:
    ours, theirs = SubsampledConv2d(6, 10, 2), nn.Conv2d(6, 10, 1, stride=2, bias=False)
    theirs.load_state_dict(ours.state_dict())
    images = _random(3, 6, size, size)
    assert torch.allclose(ours(images), theirs(images), atol=1e-6)
