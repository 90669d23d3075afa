"""What the cluster has room for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray

from fmtune.board import Capacity
from fmtune.config import ResourcesConfig
from fmtune.errors import InputError
from fmtune.trial import worker_resources


def check_room(
    resources: ResourcesConfig, has_shared_storage: bool, can_grow: bool, note: Callable[[str], None]
) -> None:
    """Find out before the first trial that none could run on the nodes that are there.

    Where nodes may come that have what is wanted, `note` is told.

    Raises:
        InputError: none could, or several nodes have no folder in common.
    """
    nodes = [node["Resources"] for node in _list_nodes()]
    if len(nodes) > 1 and not has_shared_storage:
        raise InputError("storage: null; several nodes need the path of a folder that all of them share")
    shortage = find_shortage(resources, nodes)
    if shortage and not can_grow:
        raise InputError(f"resources: {shortage}")
    if shortage:
        note("no node there has room for a trial yet; trials wait for the cluster to grow")


def find_shortage(resources: ResourcesConfig, nodes: Sequence[Mapping[str, float]]) -> str | None:
    """What a trial wants that the nodes, by the resources of each, lack; a worker has to fit on one of them."""
    place = "this machine has" if len(nodes) == 1 else f"the {len(nodes)} nodes together have"
    for name, each in worker_resources(resources).items():
        amounts = [node.get(name, 0.0) for node in nodes]
        wanted, total, most = each * resources.workers, sum(amounts), max(amounts)
        if wanted > total:
            return f"a trial wants {wanted:g} {name}, and {place} {total:g}"
        if each > most:
            return f"a worker wants {each:g} {name}, and the largest of {len(nodes)} nodes has {most:g}"
    return None


def count_slots(resources: ResourcesConfig) -> int:
    """Trials that fit side by side on what the cluster has now; one at least."""
    available: dict[str, float] = ray.cluster_resources()
    wanted = worker_resources(resources)
    return max(1, min(math.floor(available.get(k, 0) / (resources.workers * v) + 1e-9) for k, v in wanted.items()))


def whole_machine(resources: ResourcesConfig) -> ResourcesConfig:
    """The same workers with all CPUs of the machine shared out among them; as given on a cluster of several."""
    if len(_list_nodes()) > 1:
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


def _list_nodes() -> list[dict[str, Any]]:
    """Nodes that are there; Ray lists those that have gone too."""
    return [node for node in ray.nodes() if node["Alive"]]
