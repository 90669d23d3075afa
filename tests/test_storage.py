"""Runs whose storage is a bucket, on a server of this machine that checks every request's signature."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer
from tables import sample_rows, write_csv

from fmtune import load, train
from fmtune.checkpoint import save_training
from fmtune.errors import InputError
from fmtune.storage import Storage, check_storage, fetch
from fmtune.training import EpochMetrics

SPACE = """\
data: {{train: {source}, test: {source}, validation: 0.2}}
search: {{trials: 2, scheduler: none, finalists: 0, refit: false}}
storage: {storage}
baseline: {{epochs: 2, model: {{width: 4, stem: imagenet}}}}
trial: {{epochs: 2, batch_size: 64, model: {{width: 4, stem: imagenet}}, optim: {{lr: {{log: [0.001, 0.1]}}}}}}
"""


@dataclass(frozen=True)
class Bucket:
    """A bucket `results`, and the one pair of keys that opens it."""

    client: Any
    url: str
    key: str
    secret: str

    def names(self) -> set[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket="results")
        return {entry["Key"] for page in pages for entry in page.get("Contents", [])}

    def content(self, name: str) -> bytes:
        body: bytes = self.client.get_object(Bucket="results", Key=name)["Body"].read()
        return body


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    place = {"endpoint_url": f"http://{host}:{port}", "region_name": "us-east-1"}
    anyone = {"aws_access_key_id": "anyone", "aws_secret_access_key": "anyone"}
    boto3.client("s3", **place, **anyone).create_bucket(Bucket="results")
    iam = boto3.client("iam", **place, **anyone)
    iam.create_user(UserName="tester")
    policy = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}
    iam.put_user_policy(UserName="tester", PolicyName="all", PolicyDocument=json.dumps(policy))
    made = iam.create_access_key(UserName="tester")["AccessKey"]
    # From here on, requests without a right signature are refused.
    switch, kind = f"{place['endpoint_url']}/moto-api/reset-auth", {"Content-Type": "text/plain"}
    urllib.request.urlopen(urllib.request.Request(switch, data=b"0", headers=kind)).close()
    keys = {"aws_access_key_id": made["AccessKeyId"], "aws_secret_access_key": made["SecretAccessKey"]}
    url = f"s3://results/runs?endpoint_override={host}%3A{port}&scheme=http&region=us-east-1"
    yield Bucket(boto3.client("s3", **place, **keys), url, made["AccessKeyId"], made["SecretAccessKey"])
    server.stop()


@pytest.fixture(scope="module")
def space(bucket: Bucket, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("space")
    source = write_csv(folder / "train.csv", sample_rows("train", 20))
    (folder / "one.yaml").write_text(SPACE.format(source=source, storage=bucket.url))
    return folder / "one.yaml"


def _fmtune(bucket: Bucket, *arguments: object, secret: str | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a process and with a Ray of its own: workers have the credentials from their environment."""
    keys = {"AWS_ACCESS_KEY_ID": bucket.key, "AWS_SECRET_ACCESS_KEY": secret or bucket.secret}
    command = [sys.executable, "-m", "fmtune.cli", *map(str, arguments)]
    return subprocess.run(command, env=os.environ | keys, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_a_run_lands_in_the_bucket_and_goes_on_from_there(bucket: Bucket, space: Path) -> None:
    """All that the run folder has, the trials' checkpoints, and no secret; a longer search takes up what is there."""
    runs = space.parent / "runs"
    first = _fmtune(bucket, "search", space, "--runs", runs)
    assert first.returncode == 0, first.stderr
    names = bucket.names()
    assert {
        f"runs/one/{name}" for name in ("summary.json", "report.html", "study.db", "best/model.safetensors")
    } <= names
    for trial in ("00000", "00001"):
        assert [name for name in names if f"/ray/search/{trial}/checkpoint_" in name and "tensors" in name]
    assert not list((runs / "one" / "ray").iterdir())
    longer = _fmtune(bucket, "search", space, "--runs", runs, "--resume", "--set", "search.trials=3")
    assert longer.returncode == 0, longer.stderr
    summary = json.loads(bucket.content("runs/one/summary.json"))
    assert summary == json.loads((runs / "one" / "summary.json").read_text())
    assert summary["trials"] == {"complete": 3, "pruned": 0, "failed": 0}
    with (runs / "one" / "history.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 3 * 2, "no trial is trained again"
    for arguments, problem in [
        (("--runs", space.parent / "new"), "holds a run one already; choose another --name"),
        (("--runs", runs, "--resume", "--set", "storage=null"), "--resume with another `storage` than in its"),
    ]:
        refused = _fmtune(bucket, "search", space, *arguments)
        assert refused.returncode == 2
        assert problem in refused.stderr
    assert not (space.parent / "new").exists()
    assert len(load(runs / "one").classes) == 10
    kept = [path.read_bytes() for path in runs.rglob("*") if path.is_file()]
    assert not [
        content for content in (*map(bucket.content, bucket.names()), *kept) if bucket.secret.encode() in content
    ]


def test_a_bucket_that_can_t_be_written_to_is_told_before_anything_starts(bucket: Bucket, space: Path) -> None:
    failed = _fmtune(bucket, "search", space, "--runs", space.parent / "others", secret="wrong")
    assert failed.returncode == 2
    (line,) = failed.stderr.splitlines()
    assert line.startswith("error: storage: s3://results/runs?endpoint_override=") and "can't be written to" in line
    assert not (space.parent / "others").exists()


def test_a_folder_that_can_t_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"storage: .*file/runs: can't be written to"):
        check_storage(str(tmp_path / "file" / "runs"))


def test_a_folder_of_runs_may_be_their_storage_too(ray_cluster: None, tmp_path: Path) -> None:
    """The run folder is not copied onto itself, which would empty its files."""
    source = write_csv(tmp_path / "train.csv", sample_rows("train", 20))
    space = {"data": {"train": str(source), "validation": 0.2}, "storage": str(tmp_path / "runs")}
    found = train(space | {"trial": {"epochs": 1, "model": {"width": 4}}}, name="x", runs=tmp_path / "runs")
    assert list(found.folder.ray.glob("search/00000/checkpoint_*"))
    assert found.folder.read_summary() == found.summary
    assert found.folder.report.stat().st_size > 0


def test_the_newest_whole_checkpoint_is_found(tmp_path: Path) -> None:
    """Of two attempts' checkpoints, the one written last is half there, and the one before it is taken."""
    for number, (experiment, epoch) in enumerate([("search", 1), ("search", 2), ("search-2", 3)]):
        folder = tmp_path / experiment / "00004" / f"checkpoint_{epoch:06d}"
        folder.mkdir(parents=True)
        save_training(folder, {"network": {}}, EpochMetrics(epoch, 1.0, 1.0, 0.5, 0.1, 1.0, float(epoch)))
        for path in folder.iterdir():
            os.utime(path, (1000 + number, 1000 + number))
    (folder / "tensors.safetensors").unlink()
    (tmp_path / "search-2" / "00006-002").mkdir(parents=True)
    storage = Storage(str(tmp_path))
    trials = storage.list_trials("search")
    assert {name: len(folders) for name, folders in trials.items()} == {"00004": 2, "00006": 1}
    found = storage.find_checkpoint(trials["00004"])
    assert found is not None
    place, metrics = found
    assert (place, metrics.epoch) == (str(tmp_path / "search" / "00004" / "checkpoint_000002"), 2)
    with fetch(place) as folder:
        assert str(folder) == place
    assert storage.find_checkpoint(trials["00006"]) is None
    assert storage.find_checkpoint([]) is None
    assert storage.count("search") == 2


def test_of_a_checkpoint_in_a_bucket_the_metrics_alone_are_read(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it is whole its objects tell; of a trial that has ended none after its last epoch counts."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", bucket.key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", bucket.secret)
    monkeypatch.setattr("fmtune.storage.fetch", None)
    for epoch in (1, 2):
        save_training(tmp_path, {"network": {}}, EpochMetrics(epoch, 1.0, 1.0, 0.5, 0.1, 1.0, float(epoch)))
        for path in tmp_path.iterdir():
            bucket.client.upload_file(str(path), "results", f"runs/two/search/00001/checkpoint_{epoch:06d}/{path.name}")
    storage = Storage(bucket.url).below("two")
    folders = storage.list_trials("search")["00001"]

    def find(last: int | None = None) -> int | None:
        found = storage.find_checkpoint(folders, last)
        return None if found is None else found[1].epoch

    assert (find(), find(last=1), find(last=0)) == (2, 1, None)
    bucket.client.delete_object(Bucket="results", Key="runs/two/search/00001/checkpoint_000002/state.json")
    assert find() == 1


def test_places_in_a_bucket_keep_the_query_of_its_url() -> None:
    storage = Storage("s3://results/runs?region=us-east-1&scheme=http")
    below = storage.below("one")
    assert below.place == "s3://results/runs/one?region=us-east-1&scheme=http"
    assert below.place_of("results/runs/one/x") == "s3://results/runs/one/x?region=us-east-1&scheme=http"
    assert storage.name_of(below.place_of("results/runs/one/x")) == "one/x"


def test_a_place_in_a_folder_has_a_name_that_outlives_its_move(tmp_path: Path) -> None:
    for folder in ("before", "after"):
        (tmp_path / folder / "refit" / "x").mkdir(parents=True)
    name = Storage(str(tmp_path / "before")).name_of(str(tmp_path / "before" / "refit" / "x"))
    assert Storage(str(tmp_path / "after")).below(name).place == str(tmp_path / "after" / "refit" / "x")
