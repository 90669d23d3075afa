"""What is kept off the screen, and where it goes."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest

from fmtune.session import quiet


def test_what_is_printed_before_there_is_a_log_is_in_it_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """By Python and from below it; the screen has the console's lines alone, and afterwards all again."""
    log = tmp_path / "log.txt"
    with quiet() as screen:
        print("early")
        os.write(2, b"from below\n")
        screen.console.print("on the screen")
        screen.log_to(log)
        print("late", file=sys.stderr)
        os.write(1, b"from below again\n")
    print("after")
    assert capfd.readouterr() == ("on the screen\nafter\n", "")
    assert log.read_text() == "early\nfrom below\nlate\nfrom below again\n"


def test_the_console_has_the_screens_encoding(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What it can't write becomes a question mark, and no error."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    monkeypatch.setattr(sys, "__stdout__", sys.stdout)
    with quiet() as screen:
        assert screen.console.options.ascii_only
        screen.console.print("Größe")
    assert capfd.readouterr().out == "Gr??e\n"
