"""cluster.yaml as it is written: no cluster, no network."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from lab import PROJECT
from packaging.requirements import Requirement
from recipe import on_premises, read_cluster, readme_lines

_PREMISES = on_premises(read_cluster(), "192.0.2.10", ["192.0.2.11", "192.0.2.12"], "~/.ssh/id_ed25519")


def _prepare(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with Ray's defaults, checked by Ray."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared: dict[str, Any] = prepare_config(config)
    validate_config(prepared)
    return prepared


@pytest.mark.parametrize("config", [read_cluster(), _PREMISES], ids=["aws", "on premises"])
def test_ray_takes_it(config: dict[str, Any]) -> None:
    """Ray refuses a key that it does not know, so this is no empty check."""
    _prepare(config)
    with pytest.raises(Exception, match="idle_timeout"):
        _prepare(config | {"idle_timeout": 5})


def test_workers_start_from_none_and_the_head_runs_no_trial() -> None:
    prepared = _prepare(read_cluster())
    head, gpu = (prepared["available_node_types"][name] for name in ("head", "gpu"))
    assert prepared["head_node_type"] == "head"
    assert head["resources"] == {"CPU": 0}
    assert head["max_workers"] == 0
    assert (gpu["min_workers"], gpu["max_workers"]) == (0, prepared["max_workers"])


@pytest.mark.parametrize("config", [read_cluster(), _PREMISES], ids=["aws", "on premises"])
def test_nothing_of_ray_s_defaults_that_is_open_or_unreleased_is_left(config: dict[str, Any]) -> None:
    """Ray's own commands install a nightly wheel and start a dashboard for everybody."""
    prepared = _prepare(config)
    commands = [*prepared["head_setup_commands"], *prepared["worker_setup_commands"]]
    starts = [*prepared["head_start_ray_commands"], *prepared["worker_start_ray_commands"]]
    assert not [command for command in commands if "wheels" in command or "nightly" in command]
    assert "--dashboard-host=127.0.0.1" in " ".join(prepared["head_start_ray_commands"])
    assert "0.0.0.0" not in " ".join(starts)
    assert any("RAY_AUTH_MODE=token" in command for command in prepared["setup_commands"])
    assert prepared["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


def test_what_is_synced_is_there_and_can_be_installed() -> None:
    """The files that pyproject.toml names, and Ray in a version that it allows."""
    import tomllib

    config = yaml.safe_load((PROJECT / "cluster.yaml").read_text(encoding="utf-8"))
    synced = {local for local in config["file_mounts"].values() if not local.startswith("~")}
    assert all((PROJECT / local).exists() for local in synced)
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {project["readme"], *(path.partition("/")[0] for path in project["license-files"])} <= synced
    (wanted,) = (Requirement(text) for text in project["dependencies"] if text.startswith("ray"))
    pinned = next(command for command in config["setup_commands"] if "pip install" in command).partition("==")[2]
    assert wanted.specifier.contains(pinned.partition("'")[0])


def test_the_readme_goes_from_up_to_down() -> None:
    assert list(readme_lines()) == ["get-auth-token", "up", "exec", "rsync-down", "down"]
