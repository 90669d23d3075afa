"""HTML by functions, so that nothing from outside gets onto the page unescaped."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence

_NUMBER = re.compile(r"[-+]?[\d.,:]+(e[-+]?\d+)?%?|-")


class Html(str):
    """Text that is markup already; every other string is escaped where it enters an element."""


def element(tag: str, *children: str, **attributes: str | int | None) -> Html:
    """An element; `class_` gives `class`, `aria_label` gives `aria-label`, None leaves an attribute out."""
    return Html(f"<{tag}{_attributes(attributes)}>{join(children)}</{tag}>")


def image(**attributes: str | int) -> Html:
    """An `img`, which has no end tag; attributes are written as those of `element`."""
    return Html(f"<img{_attributes(attributes)}>")


def join(children: Iterable[str]) -> Html:
    """Elements and texts one after the other."""
    return Html("".join(child if isinstance(child, Html) else html.escape(child) for child in children))


def table(caption: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> Html:
    """A table that scrolls sideways by itself on a narrow screen; the first cell of a row names it."""
    rows = list(rows)
    classes = ["number" if are_numbers([row[i] for row in rows]) else None for i in range(len(header))]
    heads = [element("th", text, scope="col", class_=kind) for text, kind in zip(header, classes, strict=True)]
    body = [_row(row, classes) for row in rows]
    content = element(
        "table", element("caption", caption), element("thead", element("tr", *heads)), element("tbody", *body)
    )
    # A region that scrolls must take the focus, or the keyboard can't scroll it.
    return element("div", content, class_="scroll", role="region", aria_label=caption, tabindex=0)


def are_numbers(texts: Sequence[str]) -> bool:
    """Whether a column is one of numbers, which are set flush right, under a heading that is too."""
    return all(_NUMBER.fullmatch(text) for text in texts)


def details(summary: str, *children: str) -> Html:
    """Something that opens on demand."""
    return element("details", element("summary", summary), *children)


def plot_text(text: object) -> str:
    """Text for Plotly, which takes some HTML in labels and hover texts."""
    return html.escape(str(text), quote=False)


def _attributes(attributes: Mapping[str, str | int | None]) -> str:
    return "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for name, value in attributes.items()
        if value is not None
    )


def _row(row: Sequence[str], classes: Sequence[str | None]) -> Html:
    cells = (element("td", text, class_=kind) for text, kind in zip(row[1:], classes[1:], strict=True))
    return element("tr", element("th", row[0], scope="row"), *cells)
