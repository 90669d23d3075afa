from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

from fmtune.batches import Batches

SIZES = [(1, 1), (10, 4), (10, 5), (11, 4), (12, 12), (13, 20), (97, 32)]
"""Rows of the split, and the batch size."""


def _batches(n: int, rank: int = 0, workers: int = 1) -> Batches:
    """n rows, every third of a larger table, in which each image and label says the row it is."""
    total = 3 * n + 1
    numbers = torch.arange(total)
    images = numbers.to(torch.uint8).view(total, 1, 1, 1).expand(total, 1, 2, 2)
    return Batches(images, numbers, torch.arange(1, total, 3), rank, workers)


def _epoch(batches: Batches, batch_size: int, drop_last: bool, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """This worker's parts."""
    shuffled = batches.shuffled(batch_size, drop_last, Generator().manual_seed(seed))
    return [(images[part], labels[part]) for images, labels, part in shuffled]


@pytest.mark.parametrize(("n", "batch_size"), SIZES)
def test_every_row_comes_once_an_epoch_without_drop_last(n: int, batch_size: int) -> None:
    batches = _batches(n)
    seen = torch.cat([labels for _, labels in _epoch(batches, batch_size, drop_last=False)])
    assert sorted(seen.tolist()) == batches.rows.tolist()


@pytest.mark.parametrize(("n", "batch_size"), SIZES)
def test_batch_sizes_differ_by_one_at_most_without_drop_last(n: int, batch_size: int) -> None:
    sizes = [len(labels) for _, labels in _epoch(_batches(n), batch_size, drop_last=False)]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= batch_size


@pytest.mark.parametrize(("n", "batch_size"), [size for size in SIZES if size[0] >= size[1]])
def test_drop_last_gives_full_batches_of_distinct_rows(n: int, batch_size: int) -> None:
    batches = _batches(n)
    epoch = _epoch(batches, batch_size, drop_last=True)
    assert [len(labels) for _, labels in epoch] == [batch_size] * (n // batch_size)
    seen = torch.cat([labels for _, labels in epoch]).tolist()
    assert len(set(seen)) == len(seen)
    assert set(seen) <= set(batches.rows.tolist())


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("n", "batch_size"), [size for size in SIZES if size[0] >= size[1]])
def test_steps_counts_the_batches_of_an_epoch(n: int, batch_size: int, drop_last: bool) -> None:
    batches = _batches(n)
    assert batches.steps(batch_size, drop_last) == len(_epoch(batches, batch_size, drop_last))


def test_steps_of_10_rows_in_batches_of_4() -> None:
    """Hand-worked: 4 + 4 + 2 without the last, or 4 + 3 + 3 with all rows."""
    assert _batches(10).steps(4, drop_last=True) == 2
    assert _batches(10).steps(4, drop_last=False) == 3
    assert [len(labels) for _, labels in _epoch(_batches(10), 4, drop_last=False)] == [4, 3, 3]


def test_images_come_with_their_own_labels() -> None:
    for images, labels in [*_epoch(_batches(20), 6, drop_last=False), *_batches(20).ordered(6)]:
        assert torch.equal(images[:, 0, 0, 0].long(), labels)
        assert images.dtype == torch.uint8


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("drop_last", [False, True])
def test_workers_parts_make_up_the_batches_of_one_worker_in_order(workers: int, drop_last: bool) -> None:
    whole = _epoch(_batches(50), 12, drop_last)
    parts = [_epoch(_batches(50, rank, workers), 12, drop_last) for rank in range(workers)]
    for step, (images, labels) in enumerate(whole):
        assert torch.equal(torch.cat([part[step][0] for part in parts]), images)
        assert torch.equal(torch.cat([part[step][1] for part in parts]), labels)


@pytest.mark.parametrize("workers", [2, 3, 5])
def test_every_worker_has_a_row_of_every_batch(workers: int) -> None:
    """Of batches as small as there are workers, however many rows there are: batch norm needs something of each."""
    for n in range(workers, 6 * workers):
        for rank in range(workers):
            parts = _epoch(_batches(n, rank, workers), workers, drop_last=False)
            assert all(len(labels) > 0 for _, labels in parts)
            assert len(parts) == _batches(n, rank, workers).steps(workers, drop_last=False)


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_ordered_covers_the_rows_once_in_their_own_order(workers: int) -> None:
    seen = [labels for rank in range(workers) for _, labels in _batches(7, rank, workers).ordered(2)]
    assert torch.cat(seen).tolist() == _batches(7).rows.tolist()


def test_ordered_batches_are_of_the_size_asked_for_but_the_last() -> None:
    assert [len(labels) for _, labels in _batches(10).ordered(4)] == [4, 4, 2]


def test_order_follows_the_generator() -> None:
    """Same seed, same order; the next epoch of one generator has another order."""
    generator = Generator().manual_seed(3)
    first, second = (
        torch.cat([labels for _, labels, _ in _batches(50).shuffled(8, False, generator)]) for _ in range(2)
    )
    again = torch.cat([labels for _, labels in _epoch(_batches(50), 8, drop_last=False, seed=3)])
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_length_counts_the_split_over_all_workers() -> None:
    assert len(_batches(11, rank=1, workers=2)) == 11
