"""The report as Markdown, by functions, so that nothing from outside gets into it unescaped.

It is GitHub's Markdown (https://github.github.com/gfm): CommonMark with tables.
"""

from __future__ import annotations

import html
import re
from collections.abc import Collection, Iterable, Sequence

from fmtune.report.document import Cards, Code, Gallery, Group, Heading, Part, Plot, Section, Table, Text
from fmtune.report.findings import describe_data
from fmtune.report.markup import are_numbers
from fmtune.report.read import Run

_INLINE = re.compile(r"[\\`*_\[\]|~$#]")
"""What begins code, emphasis, links, cells of a table, formulas and the end of a heading."""
_BLOCK = re.compile(r"^(\d*)([-+=.)])")
"""What begins a list or a rule at the start of a line."""


def escape(text: str) -> str:
    """Text on one line that reads as it is within a heading or a cell of a table."""
    return _INLINE.sub(r"\\\g<0>", html.escape(" ".join(text.split()), quote=False))


def paragraph(text: str) -> str:
    """Text on one line that reads as it is at the start of a line, too."""
    return _BLOCK.sub(r"\1\\\2", escape(text))


def create_markdown(run: Run, sections: Sequence[Section], drawn: Collection[str]) -> str:
    """The report as report.md; `drawn` are the names of the PNGs in plots/, without their endings."""
    blocks = [
        f"# {escape(run.name)}",
        paragraph(describe_data(run)),
        "Written by fmtune from the run folder alone. [report.html](report.html) has the plots to look into.",
        *(block for section in sections for block in _section(section, drawn)),
    ]
    return "\n\n".join(blocks) + "\n"


def _section(section: Section, drawn: Collection[str]) -> list[str]:
    return [f"## {escape(section.title)}", *(block for part in section.parts for block in _write(part, drawn))]


def _write(part: Part, drawn: Collection[str]) -> list[str]:
    match part:
        case Heading(text):
            return [f"### {escape(text)}"]
        case Text(text, kind):
            return _text(text, kind)
        case Cards(cards):
            return [table(["figure", "value", "note"], [[card.name, card.value, card.note] for card in cards])]
        case Table():
            return _captioned(part)
        case Code(text):
            return [fence(text)]
        case Plot():
            return _plot(part, drawn)
        case Group(plots):
            return [block for plot in plots for block in _plot(plot, drawn)]
        case Gallery():
            image = [f"![{escape(part.table.caption)}](plots/{part.name}.png)"] if part.name in drawn else []
            return [*image, *_captioned(part.table)]


def _text(text: str, kind: str) -> list[str]:
    if kind == "hint":
        return []
    return [f"> {paragraph(text)}" if kind in ("verdict", "warning") else paragraph(text)]


def _captioned(part: Table) -> list[str]:
    content = table(part.header, part.rows)
    if part.folded is None:
        return [f"**{escape(part.caption)}**", content]
    return [f"<details><summary>{html.escape(part.folded)}</summary>", content, "</details>"]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, with columns of numbers flush right."""
    marks = ["---:" if rows and are_numbers([row[i] for row in rows]) else "---" for i in range(len(header))]
    return "\n".join([_row(map(escape, header)), _row(marks), *(_row(map(escape, row)) for row in rows)])


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def fence(text: str, language: str = "") -> str:
    """Code between fences that are longer than any in it."""
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    marks = "`" * max(3, longest + 1)
    return f"{marks}{language}\n{text.rstrip()}\n{marks}"


def _plot(plot: Plot, drawn: Collection[str]) -> list[str]:
    """What the plot shows in words, under its PNG or with a link to its place on the page."""
    name = plot.name.removesuffix("-plot")
    if name in drawn:
        return [f"![{name} plot](plots/{name}.png)", paragraph(plot.caption)]
    return [f"{paragraph(plot.caption)} ([plot](report.html#{plot.name}))"]
