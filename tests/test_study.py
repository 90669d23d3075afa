"""A study in a PostgreSQL database, which several runs share."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytest
from optuna.trial import TrialState
from tables import sample_rows, write_csv

import fmtune
from fmtune.errors import InputError, SpaceError
from fmtune.space import Space
from fmtune.study import STUDY, RunTrials, check_study, fail, open_database

PASSWORD = "a-secret-of-the-database"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A PostgreSQL server of the module's own on loopback, which asks for a password; its URL without a database."""
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not binaries:
        pytest.skip("needs PostgreSQL: apt-get install -y postgresql")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = Path(tempfile.mkdtemp(prefix="fmtune-postgres-"))
    is_root = os.getuid() == 0

    def run(name: str, *arguments: str) -> None:
        # PostgreSQL does not run as root.
        user = ["runuser", "-u", "postgres", "--"] if is_root else []
        subprocess.run([*user, str(binaries[-1] / name), *arguments], check=True, capture_output=True, cwd=folder)

    (folder / "password").write_text(PASSWORD)
    if is_root:
        for path in (folder, folder / "password"):
            shutil.chown(path, "postgres")
    run("initdb", "-D", f"{folder}/data", "-A", "scram-sha-256", "-U", "fmtune", f"--pwfile={folder}/password")
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
    run("pg_ctl", "-D", f"{folder}/data", "-w", "-l", f"{folder}/log", "-o", options, "start")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PGUSER", "fmtune")
        patch.setenv("PGPASSWORD", PASSWORD)
        yield f"postgresql://127.0.0.1:{port}"
    run("pg_ctl", "-D", f"{folder}/data", "-m", "immediate", "stop")
    shutil.rmtree(folder)


@pytest.fixture
def database(server: str, request: pytest.FixtureRequest) -> str:
    """The URL of an empty database of the test's own."""
    name = f"t{abs(hash(request.node.name))}"
    psycopg: Any = pytest.importorskip("psycopg")
    with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return f"{server}/{name}"


def _url(database: str) -> str:
    return database.replace("postgresql", "postgresql+psycopg")


def _space(source: Path, storage: str, **search: Any) -> dict[str, Any]:
    return {
        "data": {"train": str(source)},
        "search": {"trials": 3, "finalists": 0, "refit": False, "scheduler": "none", "storage": storage} | search,
        "resources": {"cpus": 2},
        "baseline": {"epochs": 1, "batch_size": 32, "model": {"width": 4}},
        "trial": {"epochs": 1, "batch_size": 32, "model": {"width": 4}, "optim": {"lr": {"log": [0.001, 0.1]}}},
    }


@pytest.mark.slow
def test_two_runs_share_a_study_and_each_keeps_its_own_trials(
    ray_cluster: None, database: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second goes on where the study is, with numbers of its own; its resumption finds its own trials alone."""
    source = write_csv(tmp_path / "t.csv", sample_rows("train", 20))
    space = _space(source, database)
    first = fmtune.search(space, name="first", runs=tmp_path)
    second = fmtune.search(space, name="second", runs=tmp_path)
    study = optuna.load_study(study_name=STUDY, storage=_url(database))
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 6
    frames = [pd.read_csv(result.folder.trials) for result in (first, second)]
    for frame in frames:
        assert frame["number"].tolist() == [0, 1, 2]
        assert frame["state"].tolist() == ["complete"] * 3
    drawn = [rate for frame in frames for rate in frame["params.optim.lr"][1:]]
    assert len(set(drawn)) == 4, "no two runs draw the same"
    assert sorted(t.params["optim.lr"] for t in study.trials if t.params) == pytest.approx(sorted(drawn))
    assert not first.folder.study.exists()

    more = fmtune.search(space | {"search": space["search"] | {"trials": 4}}, name="second", runs=tmp_path, resume=True)
    assert pd.read_csv(more.folder.trials)["number"].tolist() == [0, 1, 2, 3]
    assert pd.read_csv(more.folder.trials)["params.optim.lr"][:3].tolist() == frames[1]["params.optim.lr"].tolist()
    study = optuna.load_study(study_name=STUDY, storage=_url(database))
    assert len(study.trials) == 7
    assert {trial.state for trial in study.trials} == {TrialState.COMPLETE}

    for path in tmp_path.glob("*/**/*"):
        if path.is_file():
            assert PASSWORD.encode() not in path.read_bytes(), path


def test_a_run_closes_its_own_trials_alone(database: str) -> None:
    study = optuna.create_study(study_name=STUDY, storage=_url(database))
    runs = [RunTrials(name) for name in ("a", "b")]
    asked = [runs[i % 2].ask(study) for i in range(4)]
    assert [runs[i % 2].number_of(trial) for i, trial in enumerate(asked)] == [0, 0, 1, 1]
    fail(study, runs[1].study_number(1), "died")
    restored = RunTrials("a")
    assert [restored.number_of(trial) for trial in restored.restore(study)] == [0, 1]
    assert [trial.number for trial in restored.restore(study)] == [0, 2]
    assert [restored.has(trial) for trial in study.trials] == [True, False, True, False]
    assert restored.number_of(study.ask()) == 2
    assert study.trials[3].user_attrs["cause"] == "died"


def test_a_study_of_another_space_is_refused(database: str, tmp_path: Path) -> None:
    space = Space.load(_space(tmp_path / "t.csv", database))
    check_study(space)
    check_study(Space.load(_space(tmp_path / "elsewhere.csv", database, trials=9, seed=3)))
    other = _space(tmp_path / "t.csv", database)
    other["trial"]["epochs"] = 2
    with pytest.raises(InputError, match=r"search\.storage: postgresql://.*: holds the study of another space; name"):
        check_study(Space.load(other))


def test_a_dashboard_cannot_change_a_shared_study(database: str) -> None:
    optuna.create_study(study_name=STUDY, storage=_url(database)).ask()
    storage = open_database(database, is_read_only=True)
    study = optuna.load_study(study_name=STUDY, storage=storage)
    with pytest.raises(optuna.exceptions.StorageInternalError):
        study.ask()
    with pytest.raises(optuna.exceptions.StorageInternalError):
        optuna.delete_study(study_name=STUDY, storage=storage)
    storage.remove_session()
    storage.engine.dispose()
    assert len(optuna.load_study(study_name=STUDY, storage=_url(database)).trials) == 1


def test_a_database_that_can_not_be_reached_is_told_before_anything_starts(tmp_path: Path) -> None:
    pytest.importorskip("psycopg")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"postgresql://127.0.0.1:{free.getsockname()[1]}/none"
    source = write_csv(tmp_path / "t.csv", sample_rows("train", 20))
    with pytest.raises(InputError) as caught:
        fmtune.search(_space(source, place), name="x", runs=tmp_path)
    (line,) = caught.value.lines
    assert line.startswith(f"search.storage: {place}: can't be reached (")
    assert "\n" not in line
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("place", "problem"),
    [
        ("sqlite:///x.db", "should be a database such as postgresql://host/name"),
        ("postgresql://me:secret@host/name", "leave them to PGUSER and PGPASSWORD"),
        ("postgresql://host/name?password=secret", "leave them to PGUSER and PGPASSWORD"),
    ],
)
def test_a_place_that_is_none_or_tells_a_secret_is_refused(place: str, problem: str) -> None:
    with pytest.raises(SpaceError) as caught:
        Space.load(_space(Path("t.csv"), place))
    assert problem in str(caught.value)
    assert "secret" not in str(caught.value).replace(problem, "")
