"""Per-sample augmentation of a batch, on the device that holds it.

The `batch_*` functions draw from the generator that they are given, one draw a sample, and never
change their input. Geometric ones take and give uint8 (N, C, H, W); mixing ones work on what the
network sees.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from fmtune.config import AugmentConfig


def augment(images: Tensor, config: AugmentConfig, generator: Generator) -> Tensor:
    """Flip, rotate, translate and erase as configured: uint8 (N, C, H, W) to the same."""
    if config.flip:
        images = batch_flip(images, generator)
    if config.rotate:
        images = batch_rotate(images, config.rotate, generator)
    if config.translate:
        images = batch_translate(images, config.translate, generator)
    if config.erase:
        images = batch_erase(images, config.erase, generator)
    return images


def batch_flip(images: Tensor, generator: Generator) -> Tensor:
    """Mirror each image left to right with probability 1/2."""
    flipped = torch.rand(len(images), generator=generator, device=images.device) < 0.5
    return torch.where(flipped.view(-1, 1, 1, 1), images.flip(-1), images)


def batch_translate(images: Tensor, pixels: int, generator: Generator) -> Tensor:
    """Shift each image by whole pixels, uniform in -pixels..pixels on each axis; zeros come in."""
    n, channels, height, width = images.shape
    shifts = torch.randint(2 * pixels + 1, (2, n), generator=generator, device=images.device)
    padded = F.pad(images, (pixels, pixels, pixels, pixels))
    rows = (shifts[0].unsqueeze(1) + torch.arange(height, device=images.device)).view(n, 1, height, 1)
    columns = (shifts[1].unsqueeze(1) + torch.arange(width, device=images.device)).view(n, 1, 1, width)
    moved = padded.gather(2, rows.expand(n, channels, height, padded.shape[3]))
    return moved.gather(3, columns.expand(n, channels, height, width))


def batch_rotate(images: Tensor, degrees: float, generator: Generator) -> Tensor:
    """Turn each image about its centre by an angle uniform in -degrees..degrees, bilinear; zeros come in."""
    n, _, height, width = images.shape
    turn = torch.rand(n, generator=generator, device=images.device) * 2 - 1
    angle = turn * math.radians(degrees)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    # affine_grid works in coordinates scaled to -1..1 on each axis, so a turn of a non-square image needs the ratio.
    matrix = torch.stack(
        [
            torch.stack([cos, -sin * height / width, zero], dim=1),
            torch.stack([sin * width / height, cos, zero], dim=1),
        ],
        dim=1,
    )
    # Under autocast it would be a grid of bfloat16, half a pixel coarse at the edge of a large image.
    with torch.autocast(images.device.type, enabled=False):
        grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    turned = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return turned.round_().to(torch.uint8)


def batch_erase(images: Tensor, probability: float, generator: Generator) -> Tensor:
    """Fill a rectangle of each image with zero, with the given probability.

    As random erasing (Zhong et al., 2020, https://arxiv.org/abs/1708.04896): area uniform in 0.02..0.33
    of the image, aspect ratio log-uniform in 0.3..3.3, cut where it leaves the image.
    """
    n, _, height, width = images.shape
    draw = torch.rand(5, n, generator=generator, device=images.device)
    area = (0.02 + 0.31 * draw[0]) * height * width
    aspect = torch.exp(math.log(0.3) + draw[1] * (math.log(3.3) - math.log(0.3)))
    half_height, half_width = (area * aspect).sqrt() / 2, (area / aspect).sqrt() / 2
    rows = torch.arange(height, device=images.device).view(1, -1) + 0.5
    columns = torch.arange(width, device=images.device).view(1, -1) + 0.5
    in_rows = (rows - draw[2].unsqueeze(1) * height).abs() < half_height.unsqueeze(1)
    in_columns = (columns - draw[3].unsqueeze(1) * width).abs() < half_width.unsqueeze(1)
    inside = in_rows.unsqueeze(2) & in_columns.unsqueeze(1) & (draw[4] < probability).view(-1, 1, 1)
    return images.masked_fill(inside.unsqueeze(1), 0)


def batch_mixup(images: Tensor, alpha: float, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Blend each float image with another of the batch (Zhang et al., 2018, https://arxiv.org/abs/1710.09412).

    Returns:
        The blends (N, C, H, W), the partner's index (N,), and the own share (N,) of each blend, in 0..1.
    """
    share = _sample_beta(len(images), alpha, generator, images.device)
    partner = torch.randperm(len(images), generator=generator, device=images.device)
    weight = share.view(-1, 1, 1, 1)
    return torch.lerp(images[partner], images, weight), partner, share


def batch_cutmix(images: Tensor, alpha: float, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Paste a rectangle of another image of the batch into each (Yun et al., 2019, https://arxiv.org/abs/1905.04899).

    Returns:
        The collages (N, C, H, W), the partner's index (N,), and the share (N,) of own pixels, in 0..1.
    """
    n, _, height, width = images.shape
    share = _sample_beta(n, alpha, generator, images.device)
    partner = torch.randperm(n, generator=generator, device=images.device)
    centre = torch.rand(2, n, generator=generator, device=images.device)
    side = (1 - share).sqrt()
    inside_rows = _interval(centre[0], side, height)
    inside_columns = _interval(centre[1], side, width)
    pasted = (inside_rows.unsqueeze(2) & inside_columns.unsqueeze(1)).unsqueeze(1)
    own = 1 - pasted.float().mean(dim=(1, 2, 3))
    return torch.where(pasted, images[partner], images), partner, own


def _interval(centre: Tensor, side: Tensor, length: int) -> Tensor:
    """Mask (N, length) of the pixels whose middle lies within side / 2 of centre, both as fractions of length."""
    middles = (torch.arange(length, device=centre.device) + 0.5) / length
    return (middles - centre.unsqueeze(1)).abs() < side.unsqueeze(1) / 2


def _sample_beta(n: int, alpha: float, generator: Generator, device: torch.device) -> Tensor:
    """n draws of Beta(alpha, alpha), as the share of one of two Gamma(alpha) draws."""
    concentration = torch.full((2, n), alpha, device=device)
    gamma = torch._standard_gamma(concentration, generator=generator)
    return gamma[0] / gamma.sum(dim=0).clamp_min(torch.finfo(gamma.dtype).tiny)
