"""The page put together: sections from the top, style, script and Plotly in one file."""

from __future__ import annotations

import base64
import hashlib
import json
from importlib.resources import files

from plotly.offline import get_plotlyjs

from fmtune.report.markup import Html, element, join
from fmtune.report.plots import Figure, hover_texts
from fmtune.report.read import Run
from fmtune.report.sections import Section, create_sections


def create_page(run: Run) -> str:
    """The whole page as HTML."""
    sections = create_sections(run)
    plots = {name: figure for section in sections for name, figure in section.plots.items()}
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
        _data(run, plots),
        *(element("script", Html(script)) for script in scripts),
    ]
    page = element("html", element("head", *head), element("body", *body), lang="en")
    return f"<!doctype html>\n{page}\n"


def _header(run: Run, sections: list[Section]) -> Html:
    data = run.summary["dataset"]
    shape = " x ".join(map(str, data["shape"]))
    rows = f"{data['train']:,} training, {data['validation']:,} validation"
    rows += f" and {data['test']:,} test images" if data["test"] is not None else " images"
    text = f"{data['source']} ({data['origin']}): {rows}, {data['classes']} classes, {shape} (channels, height, width)."
    links = [element("li", element("a", section.title, href=f"#{section.name}")) for section in sections]
    return element(
        "header",
        element("h1", run.name),
        element("p", text, class_="muted"),
        element("nav", element("ul", *links), aria_label="Sections"),
    )


def _section(section: Section) -> Html:
    heading = element("h2", section.title, id=f"{section.name}-title")
    return element("section", heading, section.body, id=section.name, aria_labelledby=f"{section.name}-title")


def _data(run: Run, plots: dict[str, Figure]) -> Html:
    """The figures as JSON; without `<`, nothing in it can end the element."""
    content = json.dumps({"trials": hover_texts(run), "plots": plots}, separators=(",", ":"), allow_nan=False)
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
