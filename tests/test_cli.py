"""The command line: what it prints, and the codes that it exits with."""

from __future__ import annotations

import csv
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import optuna
import pyarrow.csv as pacsv
import pytest
import torch
from PIL import Image
from ruamel.yaml import YAML
from tables import sample_rows, write_csv

import fmtune.cli
from fmtune.config import ModelConfig
from fmtune.model import create_model

SPACES = Path(__file__).parent.parent / "search_spaces"
TINY = """\
data: {{train: {source}, validation: 0.2}}
search: {{trials: {trials}, scheduler: none, finalists: 0, refit: false}}
baseline: {{epochs: {epochs}, model: {{width: 4, stem: imagenet}}}}
trial:
  epochs: {epochs}
  batch_size: 64
  model: {{width: 4, stem: imagenet}}
  optim: {{lr: {{log: [0.001, 0.1]}}}}
"""


def _main(*arguments: object) -> int:
    """The exit code of a command in this process."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["fmtune", *map(str, arguments)])
        try:
            fmtune.cli.main()
        except SystemExit as ended:
            return int(ended.code or 0)
    return 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source, a space, and below runs/ what commands make of them."""
    folder = tmp_path_factory.mktemp("cli")
    source = write_csv(folder / "train.csv", sample_rows("train", 20))
    (folder / "tiny.yaml").write_text(TINY.format(source=source, trials=2, epochs=1))
    return folder


@pytest.fixture(scope="module")
def run(folder: Path, ray_cluster: None) -> Path:
    assert _main("search", folder / "tiny.yaml", "--runs", folder / "runs", "--name", "one") == 0
    return folder / "runs" / "one"


def test_a_full_disk_is_one_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fill(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(importlib.import_module("fmtune.export"), "export", fill)
    assert _main("export", run, "--format", "safetensors", "-o", tmp_path / "m.safetensors") == 1
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device\n"


@pytest.mark.slow
def test_a_search_that_fails_time_after_time_says_so_by_its_exit_code(
    folder: Path, ray_cluster: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """Five trials overflow, each at a step of its own; what the baseline reached is kept all the same."""
    diverging = {"trial.optim.name": "sgd", "trial.optim.lr": "{log: [1e28, 1e30]}", "trial.precision": "fp32"}
    sets = [word for key, value in {"search.trials": 20, **diverging}.items() for word in ("--set", f"{key}={value}")]
    assert _main("search", folder / "tiny.yaml", "--runs", folder / "runs", "--name", "failing", *sets) == 1
    out, err = capfd.readouterr()
    assert err.splitlines()[-1].startswith("error: the search broke off; mend the cause")
    assert "broken off after failures in a row of one cause: fmtune.errors.NonFiniteLoss" in out
    summary = json.loads((folder / "runs" / "failing" / "summary.json").read_text())
    assert summary["trials"]["complete"] == 1
    assert 5 <= summary["trials"]["failed"] < 10


def test_a_search_prints_plain_lines_and_the_last_screen(
    folder: Path, ray_cluster: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """Elsewhere than on a terminal: a line a trial, what was found, where it is, and no chatter of Ray's."""
    assert _main("search", folder / "tiny.yaml", "--runs", folder / "runs", "--name", "lines") == 0
    out, err = capfd.readouterr()
    lines = [re.sub(r"\d+\.\d+%?|\d+:\d\d", "#", line) for line in out.splitlines()]
    words = [line.split()[0] for line in lines[4:]]
    assert words == ["found", "validation", "baseline", "trials", "refit", "run", "next"]
    assert lines[1].startswith("[#] this process has a Ray already, which is used and left running")
    assert {line[:11] for line in lines[2:4]} == {"[#] trial 0", "[#] trial 1"}
    assert f"run        {folder}/runs/lines" in out
    assert err == ""


def test_evaluate_prints_json_with_the_contracts_keys(
    run: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _main("evaluate", run, "--data", folder / "train.csv", "--json") == 0
    measured = json.loads(capsys.readouterr().out)
    assert set(measured) == {"accuracy", "interval", "loss", "per_class", "confusion"}
    assert sum(map(sum, measured["confusion"])) == 200
    hits = sum(measured["confusion"][i][i] for i in range(10))
    assert measured["accuracy"] == hits / 200
    assert measured["interval"][0] < measured["accuracy"] < measured["interval"][1]
    assert measured["per_class"][3]["recall"] == measured["confusion"][3][3] / 20


def test_evaluate_finds_a_run_by_its_name(run: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main("evaluate", "one", "--data", folder / "train.csv", "--runs", run.parent) == 0
    out = capsys.readouterr().out
    assert out.startswith("accuracy  0.")
    # The confusion matrix: ten lines of a label and ten counts, twenty images each.
    matrix = [[int(cell) for cell in line.split()] for line in out.splitlines()[-10:]]
    assert [row[0] for row in matrix] == list(range(10))
    assert [sum(row[1:]) for row in matrix] == [20] * 10


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_predict_writes_a_row_for_each_image(
    ending: str, run: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Labels agree with the confusion that evaluate counts."""
    output = folder / f"out.{ending}"
    assert _main("predict", run, folder / "train.csv", "-o", output) == 0
    if ending == "csv":
        rows = pacsv.read_csv(output).to_pylist()
    else:
        import pyarrow.parquet as pq

        rows = pq.read_table(output).to_pylist()
    assert list(rows[0]) == ["row", "label", "name", *(f"probability_{i}" for i in range(10))]
    assert [row["row"] for row in rows] == list(range(200))
    for row in rows:
        probabilities = [row[f"probability_{i}"] for i in range(10)]
        assert sum(probabilities) == pytest.approx(1, abs=1e-5)
        assert row["label"] == probabilities.index(max(probabilities))
    capsys.readouterr()
    assert _main("evaluate", run, "--data", folder / "train.csv", "--json") == 0
    accuracy = json.loads(capsys.readouterr().out)["accuracy"]
    true = sample_rows("train", 20).labels
    assert accuracy == sum(row["label"] == label for row, label in zip(rows, true, strict=True)) / 200


def test_report_prints_what_it_wrote_the_page_first(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main("report", run) == 0
    first, *others = map(Path, capsys.readouterr().out.splitlines())
    assert first == run / "report.html"
    assert {run / "report.md", run / "best" / "README.md", run / "plots" / "loss.png"} <= set(others)
    assert all(path.is_file() for path in (first, *others))


def test_list_shows_what_runs_found(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main("list", "--runs", run.parent) == 0
    summary = json.loads((run / "summary.json").read_text())
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("one "))
    assert line.split()[2:5] == [f"{summary['val_accuracy']:.4f}", "-", f"{summary['baseline']['val_accuracy']:.4f}"]


def test_data_describes_a_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Twenty images, one of them twice, the second time with another label."""
    table = sample_rows("train", 2)
    table.images[1] = table.images[0]
    table.labels[1] = (table.labels[0] + 1) % 10
    source = write_csv(tmp_path / "t.csv", table)
    assert _main("data", source, "--grid", tmp_path / "grid.png") == 0
    out = capsys.readouterr().out
    assert "rows      20\n" in out
    assert "images    28 x 28, 1 channel\n" in out
    assert f"mean      {table.images.mean() / 255:.4f}" in out
    assert "problems  1 rows repeat the image of another" in out
    assert "problems  1 of those have another label" in out
    with Image.open(tmp_path / "grid.png") as sheet:
        # Of grey pixels on white, with text in black: the images are there.
        assert len(set(sheet.convert("L").tobytes())) > 50


def test_the_schema_takes_the_shipped_spaces_and_refuses_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    assert _main("schema") == 0
    schema = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for path in SPACES.glob("*.yaml"):
        content = YAML(typ="safe").load(path.read_text())
        assert not list(validator.iter_errors(content)), path
    for wrong in ({"trail": {}}, {"trial": {"epochs": "many"}}, {"trial": {"optim": {"lr": {"lag": [1, 2]}}}}):
        assert list(validator.iter_errors(wrong)), wrong


def test_the_schema_beside_the_spaces_is_the_one_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert _main("schema") == 0
    assert json.loads(capsys.readouterr().out) == json.loads((SPACES / "schema.json").read_text())


def test_a_dry_run_starts_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main("search", folder / "tiny.yaml", "--runs", folder / "dry", "--dry-run", "--set", "search.time=5m") == 0
    out = capsys.readouterr().out
    assert "rows       160 to train on, 40 to validate on" in out
    assert "time       5:00" in out
    assert "optim.lr: {'log': [0.001, 0.1]}" in out
    assert re.search(r"training   \d+\.\d s an epoch, \d+ s to its end", out)
    assert re.search(r"fits       \d+ trainings to the last epoch", out)
    assert re.search(r"disk       \d+ MiB of checkpoints at most", out)
    assert not (folder / "dry").exists()


def test_a_dry_run_refuses_weights_that_the_run_would_refuse(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(create_model(ModelConfig(width=8), 1, 10).state_dict(), folder / "wide.pth")
    options = ["--dry-run", "--set", f"trial.model.pretrained={folder / 'wide.pth'}"]
    assert _main("search", folder / "tiny.yaml", "--runs", folder / "dry", *options) == 2
    assert "expected trial.model.width: 8" in capsys.readouterr().err


def test_a_dry_run_without_the_gpu_that_trials_want_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--runs", folder / "dry", "--dry-run", "--set", "resources.gpus=1"]
    assert _main("search", folder / "tiny.yaml", *options) == 0
    assert "speed      not tried: trials want a GPU, and there is none here" in capsys.readouterr().out


def test_a_dry_run_tells_cheap_from_dear(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A network of 32 times the width takes longer; what an hour costs bounds the time."""
    options = ["--set", "trial.model.width={choice: [4, 128]}", "--set", "search.cost=1", "--set", "resources.price=60"]
    assert _main("search", folder / "tiny.yaml", "--runs", folder / "dry", "--dry-run", *options) == 0
    out = capsys.readouterr().out
    assert "time       1:00" in out
    assert "cost       1 at most, at 60 an hour" in out
    cheapest, dearest = (
        float(re.search(rf"{name} +(\d+\.\d+) s an epoch", out)[1])  # type: ignore[index]
        for name in ("cheapest", "dearest")
    )
    assert cheapest < dearest


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["search", "no.yaml"], "error: no.yaml: no such file"),
        (
            ["search", "{folder}/tiny.yaml", "--set", "search.trails=3"],
            "error: --set search.trails=3: search.trails: unknown",
        ),
        (["search", "{folder}/tiny.yaml", "--data", "no.csv"], "error: no.csv: no such file"),
        (
            ["search", "{folder}/tiny.yaml", "--runs", "{folder}/runs", "--set", "trial.model.pretrained=two"],
            "error: --set trial.model.pretrained=two: trial.model.pretrained: 'two'; there is no two and no {folder}/",
        ),
        (["train", "{folder}/tiny.yaml"], "error: trial.optim.lr: ranges; `fmtune train` takes fixed values"),
        (["evaluate", "no-run", "--data", "sample"], "error: no-run: no such run"),
        (["predict", "{folder}/runs/one", "{folder}/train.csv", "-o", "out.txt"], "error: out.txt: format not known"),
        (["evaluate", "{folder}/runs/one", "--data", "s3://me:word@bucket/x.csv"], "error: data: credentials in it"),
        (["search", "{folder}/tiny.yaml", "--set", "resources={{workers: 2, gpus: 0.5}}"], "error: --set resources="),
        (["data", "s3://me:word@bucket/x.csv"], "error: SOURCE: credentials in it"),
        (["data", "{folder}/train.csv", "--grid", "{folder}/none/x.png"], "error: {folder}/none/x.png: no folder"),
        (["data", "{folder}/train.csv", "--grid", "x.tiff"], "error: x.tiff: expected a name that ends in .png"),
        (["data", "{folder}/tiny.yaml"], "error: {folder}/tiny.yaml: format not known by its name"),
        (["data", "{folder}/train.csv", "--shape", "28,28"], "error: --shape 28,28: expected HEIGHT,WIDTH,CHANNELS"),
        (["serch"], "error: No such command 'serch'."),
        (["search"], "error: Missing argument 'SPACE.yaml'."),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], problem: str, run: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _main(*(argument.format(folder=folder) for argument in arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(problem.format(folder=folder))
    assert len(err.splitlines()) == 1


@pytest.mark.slow
def test_ctrl_c_leaves_a_run_that_goes_on_where_it_was(folder: Path, tmp_path: Path) -> None:
    """In a process of its own: interrupted in the first trials, resumed, and every epoch trained once."""
    space = tmp_path / "long.yaml"
    space.write_text(TINY.format(source=folder / "train.csv", trials=3, epochs=24))
    command = [sys.executable, "-m", "fmtune.cli", "search", str(space), "--runs", str(tmp_path)]
    environment: dict[str, Any] = {**os.environ, "PYTHONPATH": str(SPACES.parent)}
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    history = tmp_path / "long" / "history.csv"
    deadline = time.monotonic() + 90
    while not (history.exists() and len(history.read_text().splitlines()) > 10):
        assert time.monotonic() < deadline and running.poll() is None, running.communicate()
        time.sleep(0.2)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert err.startswith("error: interrupted;")
    assert f"fmtune search {space} --runs {tmp_path} --resume" in err

    resumed = subprocess.run([*command, "--resume"], capture_output=True, text=True, env=environment, check=False)
    assert resumed.returncode == 0, resumed.stderr
    summary = json.loads((tmp_path / "long" / "summary.json").read_text())
    assert summary["trials"] == {"complete": 3, "pruned": 0, "failed": 0}
    with history.open() as file:
        epochs = [(int(row["trial"]), int(row["epoch"])) for row in csv.DictReader(file)]
    assert set(epochs) == {(trial, epoch) for trial in range(3) for epoch in range(1, 25)}
    # An epoch whose checkpoint the interruption cut off is trained again: one at most of each of two running trials.
    assert len(epochs) <= 3 * 24 + 2
    study = optuna.load_study(study_name="fmtune", storage=f"sqlite:///{tmp_path}/long/study.db")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 3
