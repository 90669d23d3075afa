"""The page of a run: one file that opens with no network and shows what was found, and why to believe it."""

from __future__ import annotations

from pathlib import Path

from fmtune.report.page import create_page
from fmtune.report.read import read_run
from fmtune.run import RunFolder

__all__ = ["write_report"]


def write_report(folder: RunFolder) -> Path:
    """Write `report.html` from what is in a finished run's folder, and return its path.

    Raises:
        RunFolderError: the run has not finished.
        SpaceError: its space.yaml was changed to something that is no search space.
    """
    page = create_page(read_run(folder))
    # Written aside and moved, so that a browser never opens half a page.
    aside = folder.report.with_name(folder.report.name + ".part")
    aside.write_text(page, encoding="utf-8")
    aside.replace(folder.report)
    return folder.report
