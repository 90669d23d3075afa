"""The page put together: sections from the top, style, script and Plotly in one file."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files

from plotly.offline import get_plotlyjs

from fmtune.report import markup
from fmtune.report.document import Card, Cards, Code, Gallery, Group, Heading, Part, Picture, Plot, Section, Table, Text
from fmtune.report.findings import describe_data
from fmtune.report.markup import Html, details, element, join
from fmtune.report.plots import Figure, hover_texts
from fmtune.report.read import Run

_PARAGRAPHS = {"plain": None, "muted": "muted", "hint": "muted", "verdict": "verdict", "warning": "verdict warning"}
"""Classes of style.css for the kinds of text."""
_PIXEL_ART = 64
"""Images up to this many pixels a side are enlarged with sharp pixels; larger ones are smoothed."""


def create_page(run: Run, sections: Sequence[Section]) -> str:
    """The whole page as HTML."""
    figures = {name: figure for section in sections for name, figure in section.figures.items()}
    scripts = [get_plotlyjs(), _read("page.js")]
    head = [
        Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{_policy(scripts)}">'),
        # Browsers ask for an icon unless they are given one.
        Html('<link rel="icon" href="data:,">'),
        element("title", f"{run.name} - fmtune"),
        element("style", Html(_read("style.css"))),
    ]
    body = [
        _header(run, sections),
        element("main", *map(_section, sections), id="content"),
        element("footer", element("p", "Written by fmtune from the run folder alone; this file needs no network.")),
        _data(run, figures),
        *(element("script", Html(script)) for script in scripts),
    ]
    page = element("html", element("head", *head), element("body", *body), lang="en")
    return f"<!doctype html>\n{page}\n"


def _header(run: Run, sections: Sequence[Section]) -> Html:
    links = [element("li", element("a", section.title, href=f"#{section.name}")) for section in sections]
    return element(
        "header",
        element("h1", run.name),
        element("p", describe_data(run), class_="muted"),
        element("nav", element("ul", *links), aria_label="Sections"),
    )


def _section(section: Section) -> Html:
    heading = element("h2", section.title, id=f"{section.name}-title")
    body = map(_part, section.parts)
    return element("section", heading, *body, id=section.name, aria_labelledby=f"{section.name}-title")


def _part(part: Part) -> Html:
    match part:
        case Heading(text):
            return element("h3", text)
        case Text(text, kind):
            return element("p", text, class_=_PARAGRAPHS[kind])
        case Cards():
            return _cards(part)
        case Table(caption, header, rows, folded):
            table = markup.table(caption, header, rows)
            return table if folded is None else details(folded, table)
        case Code(text, name):
            return element("pre", element("code", text), tabindex=0, role="region", aria_label=name)
        case Plot():
            return _plot(part)
        case Group(plots, kind):
            return element("div", *map(_plot, plots), class_=kind)
        case Gallery():
            return _gallery(part)


def _cards(part: Cards) -> Html:
    return element("dl", *map(_card, part.cards), class_="cards")


def _card(card: Card) -> Html:
    note = [element("small", card.note)] if card.note else []
    return element("div", element("dt", card.name), element("dd", card.value, *note))


def _plot(plot: Plot) -> Html:
    """The place of a figure; what it shows is said in words beside it."""
    style = f"height: {plot.rows * plot.row_height + 90}px" if plot.rows else None
    classes = f"plot plotly-graph-div {plot.size}".strip()
    place = element("div", id=plot.name, class_=classes, style=style, role="img", aria_label=plot.caption)
    return element("figure", place, element("figcaption", plot.caption))


def _gallery(gallery: Gallery) -> Html:
    is_small = max(gallery.width, gallery.height) <= _PIXEL_ART
    pictures = (element("li", _picture(gallery, picture)) for picture in gallery.pictures)
    return element("ul", *pictures, class_="gallery pixels" if is_small else "gallery")


def _picture(gallery: Gallery, picture: Picture) -> Html:
    source = f"data:image/png;base64,{picture.image}"
    # The size reserves the place, so that nothing moves when the images are there.
    image = markup.image(src=source, alt=picture.alt, width=gallery.width, height=gallery.height)
    lines = (element("span", line) for line in picture.lines)
    return element("figure", image, element("figcaption", *lines))


def _data(run: Run, figures: Mapping[str, Figure]) -> Html:
    """The figures as JSON; without `<`, nothing in it can end the element."""
    content = json.dumps({"trials": hover_texts(run), "plots": figures}, separators=(",", ":"), allow_nan=False)
    script = element("script", Html(content.replace("<", "\\u003c")), type="application/json", id="figures")
    notice = element("noscript", element("p", "The plots need JavaScript; the tables and the text do not."))
    return join([notice, script])


def _policy(scripts: list[str]) -> str:
    """Content Security Policy: these scripts and no others, and nothing from any network."""
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'"


def _read(name: str) -> str:
    return (files("fmtune.report") / name).read_text(encoding="utf-8")
