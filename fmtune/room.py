"""What the cluster has room for."""

from __future__ import annotations

import math

import ray

from fmtune.board import Capacity
from fmtune.config import ResourcesConfig
from fmtune.errors import InputError
from fmtune.trial import worker_resources


def check_room(resources: ResourcesConfig, has_shared_storage: bool, can_grow: bool) -> None:
    """Find out before the first trial that none could run, as far as the nodes are known.

    Raises:
        InputError: a trial wants more than a single machine has, or several nodes have no folder in common.
    """
    if can_grow:
        return
    if _count_nodes() > 1:
        if not has_shared_storage:
            raise InputError("storage: null; several nodes need the path of a folder that all of them share")
        return
    available: dict[str, float] = ray.cluster_resources()
    for name, amount in worker_resources(resources).items():
        wanted, there = amount * resources.workers, available.get(name, 0)
        if wanted > there:
            raise InputError(f"resources: a trial wants {wanted:g} {name}, and this machine has {there:g}")


def count_slots(resources: ResourcesConfig) -> int:
    """Trials that fit side by side on what the cluster has now; one at least."""
    available: dict[str, float] = ray.cluster_resources()
    wanted = worker_resources(resources)
    return max(1, min(math.floor(available.get(k, 0) / (resources.workers * v) + 1e-9) for k, v in wanted.items()))


def whole_machine(resources: ResourcesConfig) -> ResourcesConfig:
    """The same workers with all CPUs of the machine shared out among them; as given on a cluster of several."""
    if _count_nodes() > 1:
        return resources
    cpus = ray.cluster_resources()["CPU"] / resources.workers
    return resources.model_copy(update={"cpus": cpus})


def refit_resources(resources: ResourcesConfig, is_own: bool) -> ResourcesConfig:
    """What the refit gets: nothing runs beside it, so one worker has the whole of a machine that is the run's own."""
    return whole_machine(resources) if is_own and resources.workers == 1 else resources


def measure_capacity(resources: ResourcesConfig) -> Capacity:
    """What the cluster has now of the resource that trials share out among them."""
    kind = "GPU" if resources.gpus else "CPU"
    total: float = ray.cluster_resources().get(kind, 0.0)
    return Capacity(f"{kind}s", total, resources.workers * worker_resources(resources)[kind])


def _count_nodes() -> int:
    """Nodes that are there; Ray lists those that have gone too."""
    return sum(node["Alive"] for node in ray.nodes())
