"""Sums over workers through memory that they share, against sums by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fmtune.collectives
from fmtune.collectives import sum_over_workers, trim_transfers

WORKERS = 3
SIZES = (1, 130, 50_000)
"""Values of a sum; the last takes several parts."""


def _work(rank: int, folder: str, is_shared: bool) -> None:
    fmtune.collectives._PART = 4096
    if not is_shared:
        fmtune.collectives._MEMORY = Path(folder) / "none"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORKERS)
    found = []
    for dtype in (torch.float32, torch.float64):
        for size in SIZES:
            for turn in range(5):
                values = torch.arange(size, dtype=dtype) * (rank + 1) + turn
                sum_over_workers(values)
                found.append(values)
    assert (fmtune.collectives._shared_sums() is not None) == is_shared
    network = trim_transfers(DistributedDataParallel(nn.Linear(300, 50)))
    network.module.weight.data.fill_(0.01)
    for _ in range(2):
        network.zero_grad()
        network(torch.full((4, 300), float(rank))).sum().backward()
    found.append(network.module.weight.grad)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("is_shared", [True, False])
def test_every_worker_has_the_sum_of_all(is_shared: bool, tmp_path: Path) -> None:
    """1 + 2 + 3 times the values, sum after sum, in memory or by torch; and the mean of gradients, 4 rows of 1."""
    before = set(Path("/dev/shm").iterdir())
    mp.spawn(_work, (str(tmp_path), is_shared), nprocs=WORKERS)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORKERS)]
    expected = [
        torch.arange(size, dtype=dtype) * 6 + 3 * turn
        for dtype in (torch.float32, torch.float64)
        for size in SIZES
        for turn in range(5)
    ]
    for found in results:
        for values, wanted in zip(found[:-1], expected, strict=True):
            assert torch.equal(values, wanted)
        assert torch.equal(found[-1], torch.full((50, 300), 4.0))
    assert {path for path in Path("/dev/shm").iterdir() if path.name.startswith("fmtune-")} <= before


def test_memory_that_is_full_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fmtune.collectives, "_MEMORY", tmp_path)

    def refuse(size: int) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fmtune.collectives, "bytes", refuse, raising=False)
    assert fmtune.collectives._create(4096) is None
    assert not list(tmp_path.iterdir())


def _wait_in_vain(rank: int, folder: str) -> None:
    fmtune.collectives._PATIENCE = 0.2
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    sum_over_workers(torch.ones(3))
    if rank == 0:
        with pytest.raises(RuntimeError, match=r"a worker has not come to sum 2 within 0"):
            sum_over_workers(torch.ones(3))
        Path(folder, "told").touch()
    dist.barrier()


def test_a_worker_that_does_not_come_is_told(tmp_path: Path) -> None:
    mp.spawn(_wait_in_vain, (str(tmp_path),), nprocs=2)
    assert (tmp_path / "told").exists()
