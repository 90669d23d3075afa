"""The report of a run: what was found, and why to believe it, as a page, as Markdown with plots, and as a model card.

The page is one file that opens with no network.
"""

from __future__ import annotations

from pathlib import Path

from fmtune.files import write_whole
from fmtune.report.card import create_card
from fmtune.report.markdown import create_markdown
from fmtune.report.page import create_page
from fmtune.report.read import read_run
from fmtune.report.sections import create_sections
from fmtune.run import RunFolder

__all__ = ["write_report"]


def write_report(folder: RunFolder) -> list[Path]:
    """Write a finished run's report from what is in its folder alone.

    Returns:
        The files written: report.html, report.md, best/README.md and the PNGs in plots/.

    Raises:
        RunFolderError: the run has not finished, or its model is not there.
        SpaceError: its space.yaml was changed to something that is no search space.
    """
    # Matplotlib takes a second to import, which a run need not wait for before its end.
    from fmtune.report.drawings import write_drawings

    run = read_run(folder)
    sections = create_sections(run)
    drawings = write_drawings(run, folder.plots)
    texts = {
        folder.report: create_page(run, sections),
        folder.markdown: create_markdown(run, sections, [path.stem for path in drawings]),
        folder.card: create_card(run),
    }
    for path, text in texts.items():
        write_whole(path, text)
    return [*texts, *drawings]
