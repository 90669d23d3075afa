from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import rotate

from fmtune.augment import (
    augment,
    batch_cutmix,
    batch_erase,
    batch_flip,
    batch_mixup,
    batch_rotate,
    batch_translate,
)
from fmtune.config import AugmentConfig

Augmentation = Callable[[Tensor, Generator], Tensor]

GEOMETRIC: dict[str, Augmentation] = {
    "flip": batch_flip,
    "translate": lambda images, generator: batch_translate(images, 3, generator),
    "rotate": lambda images, generator: batch_rotate(images, 30.0, generator),
    "erase": lambda images, generator: batch_erase(images, 0.7, generator),
}
MIXING: dict[str, Augmentation] = {
    "mixup": lambda images, generator: batch_mixup(images.float(), 0.8, generator)[0],
    "cutmix": lambda images, generator: batch_cutmix(images.float(), 0.8, generator)[0],
}
ALL = GEOMETRIC | MIXING


def _generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def _images(n: int = 12, channels: int = 3, height: int = 10, width: int = 14) -> Tensor:
    return torch.randint(0, 256, (n, channels, height, width), dtype=torch.uint8, generator=_generator(99))


def test_flip_mirrors_the_drawn_images_and_no_others() -> None:
    """Second implementation: slicing one image at a time, after drawing the same numbers."""
    images = _images()
    flipped = torch.rand(len(images), generator=_generator()) < 0.5
    expected = [image[:, :, ::-1] if flip else image for image, flip in zip(images.numpy(), flipped, strict=True)]
    assert 0 < int(flipped.sum()) < len(images)
    assert np.array_equal(batch_flip(images, _generator()).numpy(), np.stack(expected))


def test_flip_mirrors_half_of_many_images() -> None:
    images = torch.tensor([1, 2], dtype=torch.uint8).expand(4000, 1, 1, 2)
    mirrored = batch_flip(images, _generator())[:, 0, 0, 0] == 2
    # Within four standard deviations of the binomial distribution.
    assert abs(int(mirrored.sum()) - 2000) < 4 * math.sqrt(4000 / 4)


def _shift(image: NDArray[np.uint8], down: int, right: int) -> NDArray[np.uint8]:
    _, height, width = image.shape
    out = np.zeros_like(image)
    for row in range(height):
        for column in range(width):
            if 0 <= row - down < height and 0 <= column - right < width:
                out[:, row, column] = image[:, row - down, column - right]
    return out


def test_translate_shifts_each_image_by_its_draw() -> None:
    """Second implementation: pixel by pixel, after drawing the same numbers."""
    images = _images()
    draws = 3 - torch.randint(7, (2, len(images)), generator=_generator())
    expected = [_shift(image, int(down), int(right)) for image, down, right in zip(images.numpy(), *draws, strict=True)]
    assert np.array_equal(batch_translate(images, 3, _generator()).numpy(), np.stack(expected))


def test_translate_reaches_every_shift_and_no_other() -> None:
    """Property: of many copies of one image, each of the 25 shifts by up to 2 pixels occurs."""
    image = torch.arange(1, 31, dtype=torch.uint8).view(1, 5, 6)
    shifts = {_shift(image.numpy(), down, right).tobytes() for down in range(-2, 3) for right in range(-2, 3)}
    moved = batch_translate(image.expand(500, 1, 5, 6), 2, _generator())
    assert {one.tobytes() for one in moved.numpy()} == shifts


@pytest.mark.parametrize(("height", "width"), [(14, 14), (10, 16), (15, 9)])
def test_rotate_turns_as_torchvision_does(height: int, width: int) -> None:
    """Second implementation: torchvision's rotation of one image at a time, within one grey level."""
    images = _images(height=height, width=width)
    angles = (torch.rand(len(images), generator=_generator()) * 2 - 1) * 40
    expected = [
        rotate(image, float(angle), InterpolationMode.BILINEAR) for image, angle in zip(images, angles, strict=True)
    ]
    turned = batch_rotate(images, 40.0, _generator())
    assert turned.dtype == torch.uint8
    assert int((turned.int() - torch.stack(expected).int()).abs().max()) <= 1


def test_rotate_is_as_exact_under_autocast() -> None:
    """Its grid is a product of matrices, which would be of bfloat16: at 224 pixels half of one off."""
    images = _images(n=2, height=224, width=224)
    with torch.autocast("cpu", torch.bfloat16):
        turned = batch_rotate(images, 40.0, _generator())
    assert torch.equal(turned, batch_rotate(images, 40.0, _generator()))


def test_rotate_turns_both_ways() -> None:
    """Property: a pixel right of the centre moves up in some images and down in others."""
    images = torch.zeros(50, 1, 21, 21, dtype=torch.uint8)
    images[:, :, 10, 18] = 255
    turned = batch_rotate(images, 60.0, _generator())[:, 0]
    upwards = turned[:, :10].sum(dim=(1, 2)) > turned[:, 11:].sum(dim=(1, 2))
    assert 10 < int(upwards.sum()) < 40


def _erase(image: NDArray[np.uint8], probability: float, draw: list[float]) -> NDArray[np.uint8]:
    _, height, width = image.shape
    area = (0.02 + (0.33 - 0.02) * draw[0]) * height * width
    aspect = 0.3 * (3.3 / 0.3) ** draw[1]
    rectangle_height, rectangle_width = math.sqrt(area * aspect), math.sqrt(area / aspect)
    out = image.copy()
    for row in range(height):
        for column in range(width):
            in_rows = abs(row + 0.5 - draw[2] * height) < rectangle_height / 2
            in_columns = abs(column + 0.5 - draw[3] * width) < rectangle_width / 2
            if in_rows and in_columns and draw[4] < probability:
                out[:, row, column] = 0
    return out


def test_erase_blanks_each_images_own_rectangle() -> None:
    """Second implementation: pixel by pixel, after drawing the same numbers."""
    images = _images(n=20).clamp(min=1)
    draws = torch.rand(5, len(images), generator=_generator()).T.tolist()
    expected = [_erase(image, 0.6, draw) for image, draw in zip(images.numpy(), draws, strict=True)]
    assert np.array_equal(batch_erase(images, 0.6, _generator()).numpy(), np.stack(expected))


def test_erase_with_probability_0_changes_nothing() -> None:
    images = _images()
    assert torch.equal(batch_erase(images, 0.0, _generator()), images)


def test_erase_with_probability_1_changes_every_image() -> None:
    white = torch.full((300, 1, 28, 28), 255, dtype=torch.uint8)
    # The smallest area is 2 % of the image, 16 pixels, of which a corner may leave a quarter inside.
    assert bool((batch_erase(white, 1.0, _generator()) == 0).flatten(1).any(dim=1).all())


def test_erase_changes_the_share_of_images_that_probability_asks_for() -> None:
    white = torch.full((2000, 1, 16, 16), 255, dtype=torch.uint8)
    erased = (batch_erase(white, 0.3, _generator()) == 0).flatten(1).any(dim=1)
    assert float(erased.float().mean()) == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / 2000))


def test_mixup_blends_each_image_with_its_partner() -> None:
    """Second implementation: one image at a time, from the partners and shares that are returned."""
    images = _images().float()
    mixed, partner, share = batch_mixup(images, 0.8, _generator())
    assert sorted(partner.tolist()) == list(range(len(images)))
    assert bool(((share >= 0) & (share <= 1)).all())
    for i in range(len(images)):
        own = float(share[i])
        blend = own * images[i].numpy() + (1 - own) * images[int(partner[i])].numpy()
        np.testing.assert_allclose(mixed[i].numpy(), blend, atol=1e-3)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_mixup_shares_have_the_mean_and_variance_of_their_beta_distribution(alpha: float) -> None:
    """Hand-worked: Beta(a, a) has mean 1/2 and variance 1 / (4 (2a + 1))."""
    _, _, share = batch_mixup(torch.zeros(20_000, 1, 1, 1), alpha, _generator())
    assert float(share.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(share.var()) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.05)


def _paste(
    image: NDArray[np.float32], other: NDArray[np.float32], own: float, down: float, right: float
) -> tuple[NDArray[np.float32], float]:
    """A collage of two images (C, H, W), and the share of the pixels that are the first's."""
    _, height, width = image.shape
    side = math.sqrt(1 - own)
    out, pasted = image.copy(), 0
    for row in range(height):
        for column in range(width):
            in_rows = abs((row + 0.5) / height - down) < side / 2
            in_columns = abs((column + 0.5) / width - right) < side / 2
            if in_rows and in_columns:
                out[:, row, column] = other[:, row, column]
                pasted += 1
    return out, 1 - pasted / (height * width)


def test_cutmix_pastes_each_partners_rectangle() -> None:
    """Second implementation: pixel by pixel, after drawing the same numbers."""
    images = _images().float()
    generator = _generator()
    gamma = torch._standard_gamma(torch.full((2, len(images)), 0.8), generator=generator).double()
    shares = (gamma[0] / (gamma[0] + gamma[1])).tolist()
    partners = torch.randperm(len(images), generator=generator).tolist()
    centres = torch.rand(2, len(images), generator=generator).T.tolist()
    mixed, partner, own = batch_cutmix(images, 0.8, _generator())
    assert partner.tolist() == partners
    for i, (down, right) in enumerate(centres):
        expected, share = _paste(images[i].numpy(), images[partners[i]].numpy(), shares[i], down, right)
        assert np.array_equal(mixed[i].numpy(), expected)
        assert float(own[i]) == pytest.approx(share)


def test_cutmix_pastes_one_rectangle_and_returns_the_share_of_own_pixels() -> None:
    """Property: of images that are each of one colour, the foreign pixels fill their bounding box."""
    n = 40
    images = torch.arange(n, dtype=torch.float32).view(n, 1, 1, 1).expand(n, 2, 9, 13)
    mixed, partner, own = batch_cutmix(images, 1.0, _generator())
    pasted_somewhere = 0
    for i in range(n):
        if int(partner[i]) == i:
            continue
        foreign = mixed[i, 0] == partner[i]
        assert torch.equal(mixed[i, 0], mixed[i, 1])
        assert bool(((mixed[i, 0] == i) | foreign).all())
        assert float(own[i]) == pytest.approx(1 - float(foreign.float().mean()))
        rows, columns = foreign.any(dim=1), foreign.any(dim=0)
        assert int(foreign.sum()) == int(rows.sum()) * int(columns.sum())
        pasted_somewhere += int(foreign.any())
    assert pasted_somewhere > n / 2


@pytest.mark.parametrize("name", ALL)
def test_input_is_never_changed(name: str) -> None:
    images = _images().float() if name in MIXING else _images()
    before = images.clone()
    changed = ALL[name](images, _generator())
    assert not torch.equal(changed, before)
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", ALL)
def test_same_seed_gives_the_same_and_another_seed_another_result(name: str) -> None:
    images = _images()
    first = ALL[name](images, _generator(5))
    assert torch.equal(first, ALL[name](images, _generator(5)))
    assert not torch.equal(first, ALL[name](images, _generator(6)))


@pytest.mark.parametrize("name", GEOMETRIC)
def test_geometric_ones_keep_shape_and_type(name: str) -> None:
    images = _images(channels=1)
    changed = GEOMETRIC[name](images, _generator())
    assert (changed.shape, changed.dtype) == (images.shape, torch.uint8)


@pytest.mark.parametrize("name", GEOMETRIC)
def test_all_channels_of_an_image_change_alike(name: str) -> None:
    grey = _images(channels=1).expand(-1, 3, -1, -1)
    changed = GEOMETRIC[name](grey, _generator())
    assert torch.equal(changed, changed[:, :1].expand(-1, 3, -1, -1))


@pytest.mark.parametrize("amount", [0, 0.0])
def test_translate_and_rotate_by_0_change_nothing(amount: float) -> None:
    images = _images()
    assert torch.equal(batch_translate(images, int(amount), _generator()), images)
    assert torch.equal(batch_rotate(images, amount, _generator()), images)


def test_augment_with_everything_off_changes_nothing_and_draws_nothing() -> None:
    images, generator = _images(), _generator()
    assert torch.equal(augment(images, AugmentConfig(flip=False, translate=0), generator), images)
    assert torch.equal(torch.rand(3, generator=generator), torch.rand(3, generator=_generator()))


def test_augment_flips_rotates_translates_and_erases_in_this_order() -> None:
    images, generator = _images(), _generator()
    expected = batch_flip(images, generator)
    expected = batch_rotate(expected, 20.0, generator)
    expected = batch_translate(expected, 2, generator)
    expected = batch_erase(expected, 0.5, generator)
    config = AugmentConfig(flip=True, rotate=20.0, translate=2, erase=0.5)
    assert torch.equal(augment(images, config, _generator()), expected)
