"""A worker's images on its device, cut into batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from fmtune.stored import Images, StoredImages
from fmtune.streaming import ImageStream


def place_images(images: Images, device: torch.device) -> Tensor | ImageStream:
    """Images on a device as `Batches` takes them: all of them, or a stream of those that stay in the cache."""
    if isinstance(images, StoredImages):
        return ImageStream(images)
    # A copy: what Arrow and NumPy hold may be read-only, which torch's tensors can't express.
    return torch.tensor(images, device=device)


def place_rows(rows: NDArray[np.int64], images: Tensor | ImageStream) -> Tensor:
    """Rows int64 (M,) where placed images are looked up by them: beside them, or for a stream on the CPU."""
    return torch.tensor(rows, device=images.device if isinstance(images, Tensor) else None)


@dataclass(frozen=True)
class Batches:
    """A split held whole on the device, or streamed to it.

    Args:
        images: uint8 (N, C, H, W), of all rows that any split uses; or a stream of them.
        labels: int64 (N,), on the device.
        rows: int64 (M,), the rows of this split; ascending for a stream.
        rank: this worker's place among `workers` that train together.
        workers: number of those; each global batch is shared out among them.
    """

    images: Tensor | ImageStream
    labels: Tensor
    rows: Tensor
    rank: int = 0
    workers: int = 1

    def __len__(self) -> int:
        """Rows of the split, over all workers."""
        return len(self.rows)

    @property
    def device(self) -> torch.device:
        return self.labels.device

    def steps(self, batch_size: int, drop_last: bool) -> int:
        """Batches of one epoch, each with a row for every worker; one at least, even if it is not full."""
        if drop_last:
            return max(1, len(self) // batch_size)
        return min(math.ceil(len(self) / batch_size), max(1, len(self) // self.workers))

    def shuffled(
        self, batch_size: int, drop_last: bool, generator: Generator
    ) -> Iterator[tuple[Tensor, Tensor, slice]]:
        """One epoch in random order: global batches of at most `batch_size` rows, and which of each are this worker's.

        The order is the same for every number of workers. With `drop_last` all batches are full; without, every row
        is seen, in batches whose sizes differ by one at most, so that no small last batch upsets batch norm.
        """
        order = self._shuffle(generator)
        steps = self.steps(batch_size, drop_last)
        if drop_last:
            order = order[: steps * batch_size]
        batches = order.tensor_split(steps)
        for rows, images in zip(batches, self._take(batches), strict=True):
            first, last = (len(rows) * rank // self.workers for rank in (self.rank, self.rank + 1))
            yield images, self.labels[rows], slice(first, last)

    def ordered(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This worker's part of the rows in their own order, in batches of `batch_size`."""
        batches = self.rows.tensor_split(self.workers)[self.rank].split(batch_size)
        for rows, images in zip(batches, self._take(batches), strict=True):
            yield images, self.labels[rows]

    def _shuffle(self, generator: Generator) -> Tensor:
        """The rows in random order."""
        if isinstance(self.images, ImageStream):
            return self.images.shuffle(self.rows, generator)
        return self.rows[torch.randperm(len(self), generator=generator, device=self.device)]

    def _take(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """The images of rows, batch by batch."""
        if isinstance(self.images, ImageStream):
            return (torch.from_numpy(images).to(self.device) for images in self.images.take(batches))
        held = self.images
        # Several times as fast as indexing, which copies byte by byte.
        return (held.index_select(0, rows) for rows in batches)


def count_trained(rows: int, batch_size: int, drop_last: bool) -> int:
    """How many of `rows` one epoch trains on."""
    return rows // batch_size * batch_size if drop_last and rows >= batch_size else rows
