"""The on-premises form of cluster.yaml on three hosts: up, a search, its run folder, a power cut, down.

The lines are the README's, run by a user's host. Each test goes on where the one before it ends.
"""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from lab import Host, Lab, find_obstacle, wait_for
from recipe import on_premises, read_cluster, readme_lines

from fmtune import load
from fmtune.run import RunFolder

_OBSTACLE = find_obstacle()
pytestmark = [pytest.mark.cluster, pytest.mark.skipif(_OBSTACLE is not None, reason=str(_OBSTACLE))]

_ADDRESSES = {"head": "172.31.0.1", "worker-1": "172.31.0.2", "worker-2": "172.31.0.3"}
# One trial at a time on each host, whatever the machine has; and an autoscaler that starts all workers.
_ENVIRONMENT = """\
export RAY_OVERRIDE_RESOURCES='{"CPU": 1, "object_store_memory": 200000000}'
export RAY_UP_enable_autoscaler_v2=0
"""
_COUNT_NODES = """python -c '
import ray
ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
print("alive", sum(node["Alive"] for node in ray.nodes()))
'"""

_TELL_RESULTS = """
cd "$(ls -td /tmp/ray/session_latest/artifacts/*/search/driver_artifacts | head -1)"
for file in */result.json; do echo "$file"; cat "$file"; echo; done
"""
_FIND_RAY = "grep -lx raylet /proc/[0-9]*/comm || true"


@dataclass(frozen=True)
class Cluster:
    """Hosts on which Ray runs, and the one that brought them up."""

    lab: Lab
    nodes: dict[str, Host]
    operator: Host

    def write_space(self, name: str, epochs: int, width: int, **search: Any) -> None:
        """A search on the bundled sample, as a user would have it among search_spaces."""
        fixed = {"epochs": epochs, "model": {"depth": 10, "width": width, "stem": "imagenet"}}
        space = {
            "data": {"train": "sample"},
            "search": {"scheduler": "none", "finalists": 0} | search,
            "storage": "/mnt/fmtune",
            "baseline": fixed,
            "trial": fixed | {"optim": {"lr": {"log": [0.003, 0.03]}}},
        }
        for host in (self.operator.home / "project", self.nodes["head"].home / "fmtune"):
            if host.exists():
                (host / "search_spaces" / f"{name}.yaml").write_text(yaml.safe_dump(space))

    def hosts_of_trials(self, name: str) -> dict[int, list[str]]:
        """The address at which each epoch of each trial was trained, once the search has ended."""
        return {
            int(path.parent.name): [json.loads(line)["node_ip"] for line in path.read_text().splitlines()]
            for path in (self.lab.shared / "fmtune" / name / "ray" / "search").glob("*/result.json")
        }

    def hosts_so_far(self) -> list[list[str]]:
        """The same of each trial of the newest search while it runs: Tune brings that to the storage in turns."""
        results = self.nodes["head"].run(_TELL_RESULTS).split("result.json\n")[1:]
        # The last line may still be being written.
        return [[json.loads(line)["node_ip"] for line in text.split("\n") if line.endswith("}")] for text in results]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Lab(tmp_path_factory.mktemp("lab"), _ENVIRONMENT) as lab:
        nodes = {name: lab.add_host(name, address) for name, address in _ADDRESSES.items()}
        operator = lab.add_operator()
        head, *workers = _ADDRESSES.values()
        config = on_premises(read_cluster(), head, workers, "~/.ssh/id")
        (operator.home / "project" / "cluster.yaml").write_text(yaml.safe_dump(config))
        cluster = Cluster(lab, nodes, operator)
        cluster.write_space("photos", epochs=2, width=4, trials=4)
        for verb in ("get-auth-token", "up"):
            operator.run(f"cd project; {readme_lines()[verb]}", 240)
        wait_for("the workers", lambda: "alive 3" in nodes["head"].run(_COUNT_NODES))
        yield cluster


def test_a_search_runs_on_several_hosts_and_its_run_folder_is_fetched(cluster: Cluster) -> None:
    for verb in ("exec", "rsync-down"):
        cluster.operator.run(f"cd project; {readme_lines()[verb]}", 240)
    folder = RunFolder.open(cluster.operator.home / "project" / "runs" / "photos")
    assert folder.read_summary()["trials"] == {"complete": 4, "pruned": 0, "failed": 0}
    assert folder.read_summary()["test_accuracy"] > 0.3
    assert folder.report.exists()
    assert len(load(folder.path).classes) == 10
    hosts = cluster.hosts_of_trials("photos")
    assert sorted(hosts) == [0, 1, 2, 3]
    # The trials are short, and may be over before the third host has its first; each has one in the next search.
    assert len({address for addresses in hosts.values() for address in addresses}) > 1


def test_what_lies_on_the_head_alone_is_predicted_by_the_cluster(cluster: Cluster) -> None:
    """Six files, whose readers Ray would spread over all hosts."""
    images = "fmtune/fmtune/datasets/sample/t10k-images-idx3-ubyte.gz"
    output = cluster.nodes["head"].run(
        f"mkdir here; for i in 1 2 3 4 5 6; do cp {images} here/$i-images-idx3-ubyte.gz; done;"
        " fmtune predict photos 'here/*.gz' -o out.csv --address auto; wc -l < out.csv"
    )
    assert output.split()[-1] == "6001"


def test_fmtune_is_the_one_that_was_synced(cluster: Cluster) -> None:
    """pip has built it on each host; what is in the tests' own Python does not count."""
    for host in cluster.nodes.values():
        assert host.run("python -c 'import fmtune; print(fmtune.__file__)'").startswith("/root/venv/lib/")


def test_nobody_gets_in_without_the_token(cluster: Cluster) -> None:
    """The dashboard answers on the head alone, and there to nobody without a token; so does Ray itself."""
    head = cluster.nodes["head"]
    ask = "curl --silent --output /dev/null --write-out '%{http_code}' http://ADDRESS:8265/api/jobs/"
    token = '--header "Authorization: Bearer $(cat ~/.ray/auth_token)"'
    assert head.run(f"{ask.replace('ADDRESS', '127.0.0.1')} {token}") == "200"
    assert head.run(ask.replace("ADDRESS", "127.0.0.1")) == "401"
    assert cluster.operator.run(f"{ask.replace('ADDRESS', head.address)} {token} || true") == "000"
    status = f"ray status --address {head.address}:6379"
    assert "Active" in cluster.operator.run(f"RAY_AUTH_MODE=token {status}")
    assert "Active" not in cluster.operator.run(f"HOME=/tmp RAY_AUTH_MODE=disabled {status} || true")


def test_a_power_cut_costs_no_trial_and_one_epoch_at_most(cluster: Cluster, tmp_path: Path) -> None:
    """A host goes off in the middle of a trial: all trials end complete, the one that it ran on another host."""
    trials, epochs = 6, 12
    cluster.write_space("outage", epochs, width=12, trials=trials, refit=False)
    line = readme_lines()["exec"].replace("photos", "outage")
    history = cluster.nodes["head"].home / "runs" / "outage" / "history.csv"
    victim = cluster.nodes["worker-2"]
    with (tmp_path / "output").open("w") as output:
        search = cluster.operator.start(f"cd project; {line}", output)

        def is_under_way() -> bool:
            """Whether a trial of the victim has some epochs behind it, more than any before had, and many to come."""
            hosts = cluster.hosts_so_far()
            assert search.poll() is None, f"over too soon: {hosts}; {Path(output.name).read_text()}"
            return any(3 <= len(addresses) <= epochs // 2 and addresses[-1] == victim.address for addresses in hosts)

        wait_for("a trial under way on the victim", is_under_way, seconds=240)
        victim.power_off()
        assert search.wait(timeout=400) == 0, Path(output.name).read_text()
    told = _epochs_told(history)
    assert sorted(told) == list(range(trials))
    for trial, addresses in cluster.hosts_of_trials("outage").items():
        was_hit = victim.address in addresses and addresses[-1] != victim.address
        assert sorted(set(told[trial])) == list(range(1, epochs + 1))
        assert len(told[trial]) <= epochs + was_hit
    assert [a for a in cluster.hosts_of_trials("outage").values() if victim.address in a and a[-1] != victim.address]
    with history.with_name("trials.csv").open() as file:
        assert [row["state"] for row in csv.DictReader(file)] == ["complete"] * trials


def test_down_ends_ray(cluster: Cluster) -> None:
    cluster.operator.run(f"cd project; {readme_lines()['down']}")
    assert cluster.nodes["head"].run(_FIND_RAY) == ""
    wait_for("the worker's end", lambda: cluster.nodes["worker-1"].run(_FIND_RAY) == "")


def _epochs_told(history: Path) -> dict[int, list[int]]:
    """The epochs of each trial in the order in which they were told; empty before the first."""
    told: dict[int, list[int]] = defaultdict(list)
    if history.exists():
        with history.open() as file:
            for row in csv.DictReader(file):
                told[int(row["trial"])].append(int(row["epoch"]))
    return told
