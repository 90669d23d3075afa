"""What the report says, part by part, before it becomes HTML or Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fmtune.report.plots import Figure


@dataclass(frozen=True)
class Heading:
    """Of a part of a section."""

    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph; a `hint` is on how to use the page, and the other forms leave it out."""

    text: str
    kind: Literal["plain", "muted", "hint", "verdict", "warning"] = "plain"


@dataclass(frozen=True)
class Card:
    """A figure in large print."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Cards:
    """The figures that come first."""

    cards: Sequence[Card]


@dataclass(frozen=True)
class Table:
    """The first cell of a row names it; with `folded`, a line to click on, the table opens on demand."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: str | None = None


@dataclass(frozen=True)
class Code:
    """Text as it stands; `name` says what it is."""

    text: str
    name: str


@dataclass(frozen=True)
class Plot:
    """A figure by its id, and what it shows in words.

    `size` is a class of style.css; with `rows`, the plot is high enough for as many of `row_height` pixels.
    """

    name: str
    caption: str
    figure: Figure
    size: Literal["", "low", "square"] = ""
    rows: int = 0
    row_height: int = 30


@dataclass(frozen=True)
class Group:
    """Plots side by side where there is room; `kind` is a class of style.css."""

    plots: Sequence[Plot]
    kind: Literal["pair", "slices"]


@dataclass(frozen=True)
class Picture:
    """An image, a PNG in base64, with the lines below it; `alt` describes it to those who can't see it."""

    image: str
    alt: str
    lines: Sequence[str]


@dataclass(frozen=True)
class Gallery:
    """Pictures in a grid, each of `width` times `height` pixels; `table` says the same without them."""

    name: str
    pictures: Sequence[Picture]
    width: int
    height: int
    table: Table


Part = Heading | Text | Cards | Table | Code | Plot | Group | Gallery


@dataclass(frozen=True)
class Section:
    """A chapter of the report; `name` is its id."""

    name: str
    title: str
    parts: Sequence[Part]

    @property
    def figures(self) -> Mapping[str, Figure]:
        """The figures of its plots by their ids."""
        groups = [part.plots if isinstance(part, Group) else [part] for part in self.parts]
        return {plot.name: plot.figure for plots in groups for plot in plots if isinstance(plot, Plot)}
