"""Batch norm over several workers against torch's over their images together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from fmtune.normalization import BatchNorm2d

CHANNELS = 6
PARTS = (slice(0, 3), slice(3, 4), slice(4, 10))


def _batch() -> tuple[Tensor, Tensor]:
    """Images whose means are far from zero, and a gradient of the outputs."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(10, CHANNELS, 5, 4, generator=random) * 3 + torch.arange(CHANNELS).view(1, -1, 1, 1) * 20
    return x.contiguous(memory_format=torch.channels_last), torch.randn(x.shape, generator=random)


def _train_on(norm: nn.BatchNorm2d, x: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, CHANNELS))
        norm.bias.copy_(torch.linspace(-1, 1, CHANNELS))
    x = x.clone().requires_grad_()
    norm(x * 2)  # a second step, so that the statistics kept are of two batches
    output = norm(x)
    output.backward(gradient)
    assert x.grad is not None and norm.weight.grad is not None and norm.bias.grad is not None
    found = {"output": output.detach(), "x": x.grad, "weight": norm.weight.grad, "bias": norm.bias.grad}
    return found | {name: buffer.double() for name, buffer in norm.named_buffers()}


def _work(rank: int, folder: str, momentum: float | None) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=len(PARTS))
    x, gradient = (tensor[PARTS[rank]] for tensor in _batch())
    found = _train_on(BatchNorm2d(CHANNELS, momentum=momentum), x, gradient)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("momentum", [0.1, None])
def test_workers_normalise_together_as_one_does_alone(momentum: float | None, tmp_path: Path) -> None:
    """Outputs, gradients and kept statistics, of parts of different sizes, against torch over the whole batch."""
    mp.spawn(_work, (str(tmp_path), momentum), nprocs=len(PARTS))
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(PARTS))]
    expected = _train_on(nn.BatchNorm2d(CHANNELS, momentum=momentum), *_batch())
    for name in ("output", "x"):
        torch.testing.assert_close(torch.cat([part[name] for part in found]), expected[name], rtol=1e-4, atol=1e-4)
    for name in ("weight", "bias"):
        torch.testing.assert_close(sum(part[name] for part in found), expected[name], rtol=1e-4, atol=1e-4)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        for part in found:
            torch.testing.assert_close(part[name], expected[name], rtol=1e-5, atol=1e-5)
