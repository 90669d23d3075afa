"""Sums over the workers of a training: through memory that they share on one machine's CPUs, else by torch.

Where many small sums follow one another, as those of batch norms do, torch's own spend their time in waking up threads:
a millisecond each, and more, on a virtual machine (benchmarks/README.md).
"""

from __future__ import annotations

import mmap
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

_MEMORY = Path("/dev/shm")
"""Where Linux keeps files that are memory."""
_ORDERED = ("x86_64", "AMD64")
"""Machines on which other processors see writes in the order in which they were made."""
_PART = 2**20
"""Bytes that a worker shares at a time."""
_LINE = 64
"""Bytes of a processor's cache line, which no two workers should write to."""
_SPINS, _YIELDS = 2_000, 2_000
"""Looks at the others' progress before giving way to other processes, and before sleeping between looks."""
_SLEEP = 1e-4
_PATIENCE = 60.0
"""Seconds without progress after which another worker is taken for dead."""


def sum_over_workers(values: Tensor) -> None:
    """Replace float32 or float64 values by their sums over all workers, the same ones bit for bit on each."""
    shared = None if values.is_cuda else _shared_sums()
    if shared is None:
        dist.all_reduce(values)
    else:
        shared.add(values.detach().view(-1).numpy())


def trim_transfers(network: DistributedDataParallel) -> DistributedDataParallel:
    """Have a network's gradients averaged in the same way where it is on CPUs, and its buffers left to their workers.

    Those are the same on all workers: batch norms see to that themselves.
    """
    network.broadcast_buffers = False
    if next(network.parameters()).device.type == "cpu" and _shared_sums() is not None:
        # torch looks for the types of a hook's arguments as objects, and finds strings.
        network.register_comm_hook(None, lambda _, bucket: _average(bucket))
    return network


def _average(bucket: Any) -> Future[Tensor]:
    gradients = bucket.buffer()
    sum_over_workers(gradients)
    averaged: Future[Tensor] = Future()
    averaged.set_result(gradients.div_(dist.get_world_size()))
    return averaged


_sums: dict[Any, _SharedSums | None] = {}
"""What the workers of a process group share, if they can."""


def _shared_sums() -> _SharedSums | None:
    """The memory of this process's group of workers, which all of them must ask for first at the same place."""
    group = dist.group.WORLD
    if group not in _sums:
        _sums.clear()
        _sums[group] = _connect()
    return _sums[group]


def _connect() -> _SharedSums | None:
    """Map one file into all workers; None where one of them is on another machine, or there is no such file."""
    rank, workers = dist.get_rank(), dist.get_world_size()
    size = workers * (_LINE + 2 * _PART)
    path = _create(size) if rank == 0 else None
    shared: list[Any] = [path]
    try:
        dist.broadcast_object_list(shared)
        memory = None if shared[0] is None else _map(Path(shared[0]), size)
        found: list[Any] = [None] * workers
        dist.all_gather_object(found, memory is not None)
    finally:
        if path is not None:
            # Mapped memory stays until the last worker has ended, however it does.
            path.unlink()
    return _SharedSums(memory, rank, workers) if memory is not None and all(found) else None


def _create(size: int) -> Path | None:
    if platform.machine() not in _ORDERED or not _MEMORY.is_dir():
        return None
    try:
        descriptor, path = tempfile.mkstemp(prefix="fmtune-", dir=_MEMORY)
    except OSError:
        return None
    try:
        with os.fdopen(descriptor, "wb") as file:
            # Written, not only reserved: a full memory must be noticed here.
            file.write(bytes(size))
    except OSError:
        os.unlink(path)
        return None
    return Path(path)


def _map(path: Path, size: int) -> mmap.mmap | None:
    try:
        with path.open("r+b") as file:
            return mmap.mmap(file.fileno(), size)
    except OSError:
        return None


class _SharedSums:
    """Sums through a block of memory: each worker writes its own values there, and adds up all of them.

    Every worker has a counter of the sums that it has written, and room for two: by the time that it writes a third,
    all have read the first, since they have written the second.
    """

    def __init__(self, memory: mmap.mmap, rank: int, workers: int) -> None:
        self._rank = rank
        self._counters = np.frombuffer(memory, np.int64, workers * _LINE // 8)[:: _LINE // 8]
        rooms = np.frombuffer(memory, np.uint8, offset=workers * _LINE)
        self._rooms = rooms.reshape(2, workers, _PART)
        self._done = 0

    def add(self, values: NDArray[Any]) -> None:
        """Replace values (n,) by their sums over the workers."""
        step = _PART // values.itemsize
        for first in range(0, len(values), step):
            self._add_part(values[first : first + step])

    def _add_part(self, values: NDArray[Any]) -> None:
        self._done += 1
        rooms = self._rooms[self._done % 2, :, : values.nbytes].view(values.dtype)
        rooms[self._rank] = values
        self._counters[self._rank] = self._done
        self._await_others()
        # In the order of ranks on each, so that rounding is the same.
        np.sum(rooms, axis=0, out=values)

    def _await_others(self) -> None:
        looks, started = 0, 0.0
        while self._counters.min() < self._done:
            looks += 1
            if looks <= _SPINS:
                continue
            if looks <= _SPINS + _YIELDS:
                os.sched_yield()
                continue
            started = started or time.monotonic()
            if time.monotonic() - started > _PATIENCE:
                raise RuntimeError(f"a worker has not come to sum {self._done} within {_PATIENCE:.0f} s")
            time.sleep(_SLEEP)
