"""`fmtune dashboard`: the study of a run in the browser."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest

from fmtune.cli import main
from fmtune.dashboard import create_dashboard
from fmtune.errors import InputError
from fmtune.run import RunFolder

ROOT = Path(__file__).parent.parent


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run folder with a study of two trials."""
    pytest.importorskip(
        "optuna_dashboard", reason="needs the package optuna-dashboard: pip install 'fmtune[dashboard]'"
    )
    folder = RunFolder(tmp_path / "one")
    folder.path.mkdir()
    folder.space.write_text("trial: {}")
    _study(folder).optimize(_objective, 2)
    return folder


def _study(folder: RunFolder) -> optuna.Study:
    storage = f"sqlite:///{folder.study}"
    return optuna.create_study(study_name="fmtune", storage=storage, direction="maximize", load_if_exists=True)


def _objective(trial: optuna.Trial) -> float:
    return trial.suggest_float("optim.lr", 0.1, 1)


@pytest.fixture
def address(folder: RunFolder) -> Iterator[str]:
    with create_dashboard(folder, 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def _get(url: str) -> Any:
    with urllib.request.urlopen(url) as answer:
        return json.load(answer)


def test_the_study_is_shown_while_it_grows(folder: RunFolder, address: str) -> None:
    """As a search adds to it: trials that end after the page was opened are there at the next look."""
    (study,) = _get(f"{address}/api/studies")["study_summaries"]
    assert study["study_name"] == "fmtune"
    shown = _get(f"{address}/api/studies/{study['study_id']}?after=0")
    assert [trial["number"] for trial in shown["trials"]] == [0, 1]
    _study(folder).optimize(_objective, 1)
    expected = [trial.value for trial in _study(folder).trials]
    deadline = time.monotonic() + 30
    # The page's server asks the storage again after some seconds.
    while len(shown["trials"]) < 3 and time.monotonic() < deadline:
        time.sleep(0.5)
        shown = _get(f"{address}/api/studies/{study['study_id']}?after=0")
    assert [trial["values"][0] for trial in shown["trials"]] == pytest.approx(expected)


def test_the_page_cannot_change_the_study(folder: RunFolder, address: str) -> None:
    request = urllib.request.Request(f"{address}/api/studies/1", method="DELETE")
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(request)
    assert len(_study(folder).trials) == 2


def test_the_command_prints_the_address_and_ends_quietly(folder: RunFolder) -> None:
    command = [sys.executable, "-m", "fmtune.cli", "dashboard", str(folder.path), "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert running.stdout is not None
    line = running.stdout.readline()
    address = line.split()[0]
    assert line == f"{address} shows {folder.path}; Ctrl-C ends it\n"
    assert _get(f"{address}api/studies")["study_summaries"]
    running.send_signal(signal.SIGINT)
    assert running.communicate(timeout=30) == ("", "")
    assert running.returncode == 0


def test_a_port_in_use_is_one_line(folder: RunFolder) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError) as caught:
            create_dashboard(folder, port)
    assert caught.value.lines == (f"--port {port}: in use; give another, or 0 for a free one",)


def test_a_run_without_a_study_is_one_line(folder: RunFolder) -> None:
    folder.study.unlink()
    with pytest.raises(InputError, match=r"one: no study\.db yet; a run makes it with its first trial$"):
        create_dashboard(folder, 0)
    assert not folder.study.exists()


def test_without_the_package_the_command_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "space.yaml").write_text("")
    monkeypatch.setitem(sys.modules, "optuna_dashboard", None)
    monkeypatch.setattr(sys, "argv", ["fmtune", "dashboard", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    expected = "error: dashboard: needs the package optuna-dashboard; pip install 'fmtune[dashboard]'\n"
    assert capsys.readouterr() == ("", expected)
