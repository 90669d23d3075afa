"""cluster.yaml on a stand-in for AWS (moto), in a lab that leads nowhere: each instance becomes a host of the lab.

Never run `ray up` on it outside a lab: moto makes up public addresses, and Ray would open SSH connections to them.
"""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from lab import OPERATOR, Host, Lab, find_obstacle, wait_for
from recipe import read_cluster, readme_lines

from fmtune.run import RunFolder

pytest.importorskip("moto", reason="needs moto: pip install 'moto[server]'")
_OBSTACLE = find_obstacle()
pytestmark = [pytest.mark.cluster, pytest.mark.skipif(_OBSTACLE is not None, reason=str(_OBSTACLE))]

_REGION = read_cluster()["provider"]["region"]
_ENVIRONMENT = f"""\
export AWS_ENDPOINT_URL=http://{OPERATOR}:5055 AWS_DEFAULT_REGION={_REGION}
export AWS_ACCESS_KEY_ID=testing AWS_SECRET_ACCESS_KEY=testing AWS_EC2_METADATA_DISABLED=true
"""
_IDLE_MINUTES = 0.3
"""In place of cluster.yaml's, so that the test need not wait as long."""
Instance = dict[str, Any]


@dataclass
class Ec2:
    """The hardware behind moto: a host for each instance that it says is there.

    Attributes:
        operator: runs moto, and is where the user is.
        instances: by id, as last described.
        seen: those of which there ever was a host, as first described.
    """

    lab: Lab
    operator: Host
    instances: dict[str, Instance] = field(default_factory=dict)
    seen: dict[str, Instance] = field(default_factory=dict)
    _hosts: dict[str, Host] = field(default_factory=dict)

    def follow(self, descriptions: subprocess.Popen[str]) -> None:
        """Start and end hosts as instances come and go, until the descriptions end."""
        assert descriptions.stdout is not None
        for line in descriptions.stdout:
            self.instances = {instance["InstanceId"]: instance for instance in json.loads(line)}
            for name, instance in self.instances.items():
                is_on = instance["State"]["Name"] in ("pending", "running")
                if is_on and name not in self._hosts:
                    self._hosts[name] = self._start(instance)
                    self.seen[name] = instance
                elif not is_on:
                    self._hosts[name].power_off()

    def _start(self, instance: Instance) -> Host:
        key = self.operator.home / ".ssh" / f"{instance['KeyName']}.pem"
        address, public_address = instance["PrivateIpAddress"], instance["PublicIpAddress"]
        return self.lab.add_host(instance["InstanceId"], address, public_address, key)

    def running(self) -> list[str]:
        """Types of the instances that are there now."""
        states = [(instance["State"]["Name"], instance["InstanceType"]) for instance in self.instances.values()]
        return sorted(kind for state, kind in states if state == "running")

    def ask(self, service: str, call: str) -> Any:
        """The answer of AWS to a call without arguments."""
        code = f"import boto3, json; print(json.dumps(boto3.client('{service}').{call}(), default=str))"
        return json.loads(self.operator.run(f'python -c "{code}"'))


@pytest.fixture(scope="module")
def ec2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ec2]:
    """An account with the stack of aws-account.yaml and a user in the project; nothing runs."""
    with Lab(tmp_path_factory.mktemp("lab"), _ENVIRONMENT) as lab:
        operator = lab.add_operator()
        project = operator.home / "project"
        config = read_cluster() | {"idle_timeout_minutes": _IDLE_MINUTES}
        (project / "cluster.yaml").write_text(yaml.safe_dump(config))
        (project / "search_spaces" / "photos.yaml").write_text(yaml.safe_dump(_space()))
        for script in ("account.py", "instances.py"):
            (project / script).write_text(Path(__file__).with_name(script).read_text())
        operator.start("exec python -m moto.server --host 0.0.0.0 --port 5055")
        operator.run("until (: > /dev/tcp/127.0.0.1/5055) 2> /dev/null; do sleep 0.2; done", 60)
        operator.run("cd project; python account.py")
        ec2 = Ec2(lab, operator)
        descriptions = operator.start("cd project; exec python instances.py", subprocess.PIPE)
        follower = threading.Thread(target=ec2.follow, args=[descriptions])
        follower.start()
        try:
            yield ec2
        finally:
            operator.power_off()
            follower.join()


def _space() -> dict[str, Any]:
    """Two trials without GPUs, each of which wants a worker for itself; a shared folder stands in for the bucket."""
    return {
        "data": {"train": "sample"},
        "search": {"trials": 2, "scheduler": "none", "finalists": 0, "refit": False},
        "resources": {"cpus": 4},
        "storage": "/mnt/fmtune",
        "trial": {
            "epochs": 2,
            "model": {"depth": 10, "width": 4, "stem": "imagenet"},
            "optim": {"lr": {"log": [0.003, 0.03]}},
        },
    }


def test_workers_come_for_a_search_and_go_after_it(ec2: Ec2) -> None:
    """The README's lines; there is one worker a trial for as long as the search lasts, and none before and after."""
    lines = readme_lines()
    for verb in ("get-auth-token", "up"):
        ec2.operator.run(f"cd project; {lines[verb]}", 240)
    assert ec2.running() == ["m5.xlarge"]
    for verb in ("exec", "rsync-down"):
        ec2.operator.run(f"cd project; {lines[verb]}", 480)
    folder = RunFolder.open(ec2.operator.home / "project" / "runs" / "photos")
    assert folder.read_summary()["trials"] == {"complete": 2, "pruned": 0, "failed": 0}
    assert sorted(i["InstanceType"] for i in ec2.seen.values()) == ["g5.xlarge", "g5.xlarge", "m5.xlarge"]
    wait_for("the idle workers' end", lambda: ec2.running() == ["m5.xlarge"])
    ec2.operator.run(f"cd project; {lines['down']}")
    wait_for("the head's end", lambda: ec2.running() == [])
    assert {instance["State"]["Name"] for instance in ec2.instances.values()} == {"terminated"}


def test_the_head_is_on_demand_and_the_workers_are_spot(ec2: Ec2) -> None:
    markets = {i["InstanceType"]: i.get("InstanceLifecycle", "on demand") for i in ec2.seen.values()}
    assert markets == {"m5.xlarge": "on demand", "g5.xlarge": "spot"}


def test_each_node_has_the_rights_of_its_kind(ec2: Ec2) -> None:
    profiles = {i["InstanceType"]: i["IamInstanceProfile"]["Arn"].rpartition("/")[2] for i in ec2.seen.values()}
    assert profiles == {"m5.xlarge": "fmtune-head", "g5.xlarge": "fmtune-worker"}


def test_ssh_is_open_to_one_address_alone(ec2: Ec2) -> None:
    """All nodes are in the stack's group, and Ray, whose own groups are open to the world, has left its rules alone."""
    assert {group["GroupName"] for i in ec2.seen.values() for group in i["SecurityGroups"]} == {"fmtune"}
    groups = ec2.ask("ec2", "describe_security_groups")["SecurityGroups"]
    (group,) = (group for group in groups if group["GroupName"] == "fmtune")
    ssh, nodes = sorted(group["IpPermissions"], key=lambda rule: rule["IpProtocol"], reverse=True)
    assert (ssh["IpProtocol"], ssh["FromPort"], ssh["ToPort"]) == ("tcp", 22, 22)
    assert [granted["CidrIp"] for granted in ssh["IpRanges"]] == ["203.0.113.7/32"]
    assert (nodes["IpProtocol"], nodes["IpRanges"]) == ("-1", [])
    assert [pair["GroupId"] for pair in nodes["UserIdGroupPairs"]] == [group["GroupId"]]
