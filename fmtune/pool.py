"""Trials of several workers that stay up from one trial to the next: DDP without a Ray Train controller a trial."""

from __future__ import annotations

import socket
import tempfile
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray import tune
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fmtune.checkpoint import save_training
from fmtune.collectives import trim_transfers
from fmtune.config import ResourcesConfig
from fmtune.errors import FmtuneError
from fmtune.failures import DEATHS
from fmtune.training import EpochMetrics, Training
from fmtune.trial import SharedData, Task, create_training, set_threads, worker_resources

_CONNECT_SECONDS = 60
"""Seconds that workers wait for one another, and in a collective operation for one that has died."""

Files = dict[str, bytes]
"""A checkpoint's files by name, as they travel between processes."""


class PooledTrial(tune.Trainable):
    """Tune's trainable of trials that are trained by several workers together, an epoch a step.

    The workers lie in the trial's placement group, which Tune hands on from trial to trial together with this process,
    and so the next trial finds them running. A worker that dies is replaced, with the others, and the epoch done again.
    """

    # Tune passes on what `tune.with_parameters` was given.
    def setup(  # type: ignore[override]
        self, config: dict[str, Any], data: SharedData, resources: ResourcesConfig
    ) -> None:
        self._data, self._resources = data, resources
        self._workers: list[Any] = []
        self._files: Files = {}
        self._begin(Task(**config))

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._begin(Task(**new_config))
        return True

    def step(self) -> dict[str, Any]:
        while True:
            try:
                metrics, self._files = self._run_epoch()
                break
            except RayError as error:
                if isinstance(error, RayTaskError) and isinstance(error.cause, FmtuneError):
                    raise
                # A worker's death shows in the others too: what they wait for with it breaks off.
                self._deaths += 1
                self.cleanup()
                if self._deaths > DEATHS:
                    what = "died" if isinstance(error, RayActorError) else "failed"
                    raise RuntimeError(f"a worker {what} for the {self._deaths}th time: {error}") from None
        return metrics.as_dict() | {"done": metrics.epoch == self._task.last_epoch}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        for name, content in self._files.items():
            (Path(checkpoint_dir) / name).write_bytes(content)

    def load_checkpoint(self, checkpoint: str) -> None:  # type: ignore[override]
        """Go on from a checkpoint after this process, or its node, has died."""
        self._files = {path.name: path.read_bytes() for path in Path(checkpoint).iterdir() if path.is_file()}
        self._has_begun = False

    def cleanup(self) -> None:
        for worker in self._workers:
            with suppress(RayActorError):
                ray.kill(worker)
        self._workers = []

    def _begin(self, task: Task) -> None:
        self._task, self._deaths, self._files = task, 0, {}
        self._has_begun = False

    def _run_epoch(self) -> tuple[EpochMetrics, Files]:
        """Train the next epoch on all workers; rank 0's metrics and checkpoint."""
        if not self._workers:
            self._start_workers()
            self._has_begun = False
        if not self._has_begun:
            ray.get([worker.begin.remote(self._task, self._files) for worker in self._workers])
            self._has_begun = True
        results: list[tuple[EpochMetrics, Files]] = ray.get([worker.run_epoch.remote() for worker in self._workers])
        return results[0]

    def _start_workers(self) -> None:
        group, count = ray.util.get_current_placement_group(), self._resources.workers
        assert group is not None
        amounts = worker_resources(self._resources)
        for rank in range(count):
            # The bundles after the one of this process, if that has any.
            bundle = PlacementGroupSchedulingStrategy(group, group.bundle_count - count + rank)
            options = {"num_cpus": amounts["CPU"], "num_gpus": amounts.get("GPU", 0), "scheduling_strategy": bundle}
            self._workers.append(_Worker.options(**options).remote(rank, self._resources, self._data))  # type: ignore[attr-defined]
        address: str = ray.get(self._workers[0].reserve_address.remote())
        ray.get([worker.connect.remote(address) for worker in self._workers])


@ray.remote
class _Worker:
    """One process of a pool."""

    def __init__(self, rank: int, resources: ResourcesConfig, data: SharedData) -> None:
        set_threads(resources)
        self._rank, self._resources, self._data = rank, resources, data
        self._device = torch.device("cuda" if resources.gpus else "cpu")
        self._training: Training | None = None

    def reserve_address(self) -> str:
        """Where the workers meet: this host, and a port that was free just now."""
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        return f"tcp://{ray.util.get_node_ip_address()}:{port}"

    def connect(self, address: str) -> None:
        dist.init_process_group(
            "nccl" if self._resources.gpus else "gloo",
            init_method=address,
            rank=self._rank,
            world_size=self._resources.workers,
            timeout=timedelta(seconds=_CONNECT_SECONDS),
        )

    def begin(self, task: Task, files: Files) -> None:
        """Make ready for a task, from a checkpoint's files if there are any."""
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                (Path(folder) / name).write_bytes(content)
            task = replace(task, resume_from=folder) if files else task
            workers = self._resources.workers
            self._training = create_training(task, self._data, self._device, self._rank, workers, self._distribute)

    def run_epoch(self) -> tuple[EpochMetrics, Files]:
        """Train the next epoch; its metrics, and at rank 0 the checkpoint after it."""
        assert self._training is not None
        metrics = self._training.run_epoch()
        if self._rank:
            return metrics, {}
        with tempfile.TemporaryDirectory() as folder:
            save_training(Path(folder), self._training.state.state_dict(), metrics)
            return metrics, {path.name: path.read_bytes() for path in Path(folder).iterdir()}

    def _distribute(self, network: nn.Module) -> nn.Module:
        devices = [torch.cuda.current_device()] if self._device.type == "cuda" else None
        return trim_transfers(DistributedDataParallel(network, device_ids=devices))
