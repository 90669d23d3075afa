"""Images that stay in the cache, read block by block ahead of the training, through a window of bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from fmtune.stored import BlockReader, StoredImages

_LEAST_BLOCKS = 4
"""Blocks of a window at least: those that a batch lies across, and as many read ahead."""


class ImageStream:
    """Batches of stored images, of which no more are in memory than `images.memory` allows.

    A window holds some blocks. Half of them are shuffled together and trained on while the other half is read. What a
    batch takes is decided by the order of rows alone, so that it is the same for all workers; each reads all blocks.
    """

    def __init__(self, images: StoredImages) -> None:
        self._images = images
        block_bytes = images.block_rows * math.prod(images.shape[1:])
        self._window = max(_LEAST_BLOCKS, images.memory // block_bytes)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, C, H, W)."""
        return self._images.shape

    def shuffle(self, rows: Tensor, generator: Generator) -> Tensor:
        """Ascending rows int64 (M,) in a random order that `take` can follow: of blocks, and of the rows in some."""
        rows = rows.cpu()
        _, counts = torch.unique_consecutive(rows // self._images.block_rows, return_counts=True)
        blocks = rows.split(counts.tolist())
        order = _permute(len(blocks), generator).split(self._window // 2)
        mixed = [torch.cat([blocks[block] for block in part.tolist()]) for part in order]
        return torch.cat([part[_permute(len(part), generator)] for part in mixed])

    def take(self, batches: Sequence[Tensor]) -> Iterator[NDArray[np.uint8]]:
        """The images (M, C, H, W) of each batch of rows (M,), which together are ascending or ordered by `shuffle`.

        Raises:
            DataError: the file can't be read.
        """
        rows = [batch.numpy() for batch in batches]
        needed = [np.unique(batch // self._images.block_rows).tolist() for batch in rows]
        first, last = _find_uses(needed)
        # A window must hold what a batch lies across, however large that is.
        size = min(len(first), max(self._window, _count_most(first, last, len(rows))))
        window, waiting = _Window(self._images, size), iter(first)
        reader = ThreadPoolExecutor(1)
        try:
            for step, batch in enumerate(rows):
                window.fill(waiting, reader)
                window.await_blocks(needed[step])
                yield window.take(batch)
                for block in needed[step]:
                    if last[block] == step:
                        window.drop(block)
        finally:
            reader.shutdown(cancel_futures=True)


def _find_uses(needed: Sequence[Sequence[int]]) -> tuple[dict[int, int], dict[int, int]]:
    """The first and the last step that needs each block, in the order of the first."""
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for step, blocks in enumerate(needed):
        for block in blocks:
            first.setdefault(block, step)
            last[block] = step
    return first, last


def _count_most(first: Mapping[int, int], last: Mapping[int, int], steps: int) -> int:
    """The most blocks that are needed at a step or both before and after it."""
    changes = np.zeros(steps + 1, np.int64)
    np.add.at(changes, list(first.values()), 1)
    np.add.at(changes, [step + 1 for step in last.values()], -1)
    return int(changes.cumsum().max(initial=0))


class _Window:
    """Some blocks in memory, each in a place of its own.

    Args:
        images: what the blocks are of.
        size: number of places.
    """

    def __init__(self, images: StoredImages, size: int) -> None:
        self._images, self._reader = images, BlockReader(images)
        self._pixels = np.empty((size * images.block_rows, *images.shape[1:]), np.uint8)
        self._free = list(range(size))
        self._places = np.full(-(-len(images) // images.block_rows), -1)
        self._reads: dict[int, Future[None]] = {}

    def fill(self, waiting: Iterator[int], reader: ThreadPoolExecutor) -> None:
        """Have the next blocks read, for as many as there are places."""
        while self._free and (block := next(waiting, None)) is not None:
            self._places[block] = self._free.pop()
            self._reads[block] = reader.submit(self._read, block)

    def await_blocks(self, blocks: Sequence[int]) -> None:
        """Wait until they have been read."""
        for block in blocks:
            if (read := self._reads.pop(block, None)) is not None:
                read.result()

    def take(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """A copy of the images of rows whose blocks are here."""
        blocks, offsets = np.divmod(rows, self._images.block_rows)
        images: NDArray[np.uint8] = self._pixels[self._places[blocks] * self._images.block_rows + offsets]
        return images

    def drop(self, block: int) -> None:
        """Make its place free."""
        self._free.append(int(self._places[block]))

    def _read(self, block: int) -> None:
        images = self._reader.read(block)
        first = int(self._places[block]) * self._images.block_rows
        self._pixels[first : first + len(images)] = images


def _permute(count: int, generator: Generator) -> Tensor:
    return torch.randperm(count, generator=generator, device=generator.device).cpu()
