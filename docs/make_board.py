"""The picture of the board in the README: `python docs/make_board.py` draws docs/board.svg.

It is taken in the middle of a real search of the bundled sample, shortly before half of the time is over.
"""

from __future__ import annotations

import importlib
import io
import re
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.terminal_theme import MONOKAI

from fmtune.board import Board
from fmtune.run import TrialRecord
from fmtune.view import draw_board

ROOT = Path(__file__).parent.parent
SPACE, DATA, TIME = "search_spaces/default.yaml", "sample", "2m"
OVERRIDES = [f"search.time={TIME}", "search.try=[]"]
COMMAND = f"fmtune search {SPACE} --data {DATA} " + " ".join(f"--set {override}" for override in OVERRIDES)
COLUMNS, LINES = 100, 24


class Photographer:
    """A view that draws the board whenever all trials under way have a value, and keeps the last of the pictures."""

    def __init__(self, board: Board, console: Console) -> None:
        self._board, self._console = board, console

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        pass

    def note(self, line: str) -> None:
        self._console.print(line)

    def on_end(self, record: TrialRecord) -> None:
        pass

    def refresh(self) -> None:
        board, flights = self._board, self._board.in_flight.values()
        if board.left is not None and board.elapsed < board.left and len(flights) > 1 and all(f.last for f in flights):
            (ROOT / "docs" / "board.svg").write_text(draw_svg(board), encoding="utf-8")


def draw_svg(board: Board) -> str:
    """The board on a terminal, as an SVG that fetches nothing."""
    console = Console(
        record=True, width=COLUMNS, height=LINES, file=io.StringIO(), color_system="truecolor", legacy_windows=False
    )
    console.print(draw_board(board, console))
    svg = console.export_svg(title=COMMAND, theme=MONOKAI, unique_id="board")
    # Rich names a font on a server; where the reader has not got it, any of one width will do.
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)


def main() -> None:
    # By `import` the name is that of the function.
    module = importlib.import_module("fmtune.search")
    module.create_view = Photographer
    with tempfile.TemporaryDirectory() as runs:
        module.search(ROOT / SPACE, data=DATA, runs=runs, overrides=OVERRIDES)


if __name__ == "__main__":
    main()
