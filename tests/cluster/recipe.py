"""What the cluster tests bring up: cluster.yaml, and the lines of the README."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import yaml
from lab import PROJECT


def read_cluster() -> dict[str, Any]:
    """cluster.yaml, asking for the Ray that is installed here: there is no other in a lab."""
    config: dict[str, Any] = yaml.safe_load((PROJECT / "cluster.yaml").read_text(encoding="utf-8"))
    config["setup_commands"] = [
        re.sub(r"ray\[default\]==[\d.]+", f"ray[default]=={version('ray')}", command)
        for command in config["setup_commands"]
    ]
    return config


def on_premises(config: Mapping[str, Any], head: str, workers: Sequence[str], key: str) -> dict[str, Any]:
    """The form for machines that are there already, as the end of cluster.yaml says."""
    taken_out = ("max_workers", "head_node_type", "available_node_types")
    return {name: value for name, value in config.items() if name not in taken_out} | {
        "provider": {"type": "local", "head_ip": head, "worker_ips": list(workers)},
        "auth": {"ssh_user": config["auth"]["ssh_user"], "ssh_private_key": key},
    }


def readme_lines() -> dict[str, str]:
    """The lines of the README's section on many machines, by the verb of Ray's that each calls."""
    section = (PROJECT / "README.md").read_text(encoding="utf-8").partition("\n## Many machines\n")[2]
    lines = [line for line in section.partition("\n## ")[0].splitlines() if line.startswith("ray ")]
    return {line.split()[1]: line for line in lines}
