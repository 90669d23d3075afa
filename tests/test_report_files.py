"""The report beside its page: Markdown, PNGs and the model card, from the run folders that runs.py makes."""

from __future__ import annotations

import re
import subprocess
import sys
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markdown_it import MarkdownIt
from pages import Page
from PIL import Image
from ruamel.yaml import YAML
from runs import CONFUSION, HOSTILE, create_run, create_training, examine_test

from fmtune import datasets
from fmtune.report import write_report
from fmtune.report.markdown import escape, fence, paragraph, table
from fmtune.run import RunFolder

NASTY = [
    HOSTILE,
    "*a* _b_ **c**",
    "[name](https://example.org)",
    "![name](https://example.org/x.png)",
    "`code`",
    "a | b",
    "# heading #",
    "- item",
    "12. item",
    "+ item",
    "---",
    "===",
    "> quote",
    "```",
    "~~gone~~",
    "&amp; &lt;",
    "back\\slash\\",
    "<!-- comment -->",
    "<https://example.org>",
    "[a]: https://example.org",
    "two\n\nblocks",
]
PLOTS = {"loss", "accuracy", "history", "cost", "confusion", "mistakes", "reliability"}


def _render(markdown: str) -> Page:
    """As CommonMark with tables, HTML and all."""
    return Page(MarkdownIt("commonmark").enable("table").render(markdown))


def _without_header(card: str) -> str:
    return card.split("---\n", 2)[2]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = create_training(tmp_path_factory.mktemp("runs") / "a_training")
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def markdown(searched: RunFolder) -> str:
    return searched.markdown.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def card(searched: RunFolder) -> str:
    return searched.card.read_text(encoding="utf-8")


def test_every_file_written_is_named_the_page_first(searched: RunFolder) -> None:
    paths = write_report(searched)
    assert paths[:3] == [searched.report, searched.markdown, searched.card]
    assert set(paths[3:]) == {searched.plots / f"{name}.png" for name in PLOTS}
    assert all(path.is_file() for path in paths)
    assert not list(searched.path.rglob("*.part"))


def test_matplotlib_is_not_imported_before_something_is_drawn() -> None:
    """It takes a second, which no verb but the report need wait for."""
    code = "import sys, fmtune.search, fmtune.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Markdown


def test_markdown_has_the_pages_sections_in_their_order(markdown: str, searched: RunFolder) -> None:
    page = searched.report.read_text(encoding="utf-8")
    titles = [re.sub("<[^>]+>", "", title) for title in re.findall(r"<h2[^>]*>(.*?)</h2>", page)]
    assert re.findall(r"^## (.*)$", markdown, re.MULTILINE) == titles


def test_markdown_says_what_the_page_says(markdown: str, searched: RunFolder) -> None:
    """Every cell of every table, and every caption."""
    page, text = searched.report.read_text(encoding="utf-8"), _render(markdown).text
    cells = re.findall(r"<t[dh](?: [^>]*)?>(.*?)</t[dh]>", page)
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert len(cells) > 400 and len(captions) > 15
    # A picture's lines are a row of the table of mistakes.
    words = [unescape(cell) for cell in [*cells, *captions] if not cell.startswith("<span>")]
    assert [missing for missing in words if " ".join(missing.split()) not in text] == []


def test_markdown_links_lead_somewhere(markdown: str, searched: RunFolder) -> None:
    """To PNGs that are there, and to places on the page."""
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", markdown)
    assert {f"plots/{name}.png" for name in PLOTS} == set(pictures)
    assert all((searched.path / picture).is_file() for picture in pictures)
    ids = {attributes.get("id") for _, attributes in Page(searched.report.read_text(encoding="utf-8")).tags}
    places = re.findall(r"\(report\.html#([^)]+)\)", markdown)
    assert len(places) > 5 and set(places) <= ids


@pytest.mark.parametrize("kind", ["markdown", "card"])
def test_a_class_named_as_a_script_stays_text(kind: str, searched: RunFolder) -> None:
    content = (searched.markdown if kind == "markdown" else searched.card).read_text(encoding="utf-8")
    assert HOSTILE not in content
    rendered = _render(content if kind == "markdown" else _without_header(content))
    assert HOSTILE in rendered.text
    assert "script" not in {tag for tag, _ in rendered.tags}


@pytest.mark.parametrize("text", NASTY)
def test_text_from_outside_reads_as_it_is(text: str) -> None:
    """As a paragraph, and in a table beside another cell: one element each, and the words as they were."""
    words = " ".join(text.split())
    alone = _render(paragraph(text))
    assert [tag for tag, _ in alone.tags] == ["p"]
    assert alone.text.strip() == words
    rendered = _render(table(["name", "value"], [[text, "1"], ["x", "2"]]))
    assert [tag for tag, _ in rendered.tags].count("td") == 4
    assert {tag for tag, _ in rendered.tags} == {"table", "thead", "tbody", "tr", "th", "td"}
    assert words in rendered.text
    assert _render(f"# {escape(text)}").text.strip() == words


@pytest.mark.parametrize("text", ["plain", "```\nfenced\n```", "````", "~~~\n# x"])
def test_code_keeps_its_fences(text: str) -> None:
    rendered = _render(fence(text))
    assert [tag for tag, _ in rendered.tags] == ["pre", "code"]
    assert "".join(rendered.texts).strip() == text


def test_markdown_of_a_training_without_a_test_split(trained: RunFolder) -> None:
    text = trained.markdown.read_text(encoding="utf-8")
    assert "There was no test split to measure calibration on." in text
    assert text.startswith("# a\\_training\n")
    assert {path.stem for path in trained.plots.iterdir()} == {"loss", "accuracy"}


# PNGs


def test_signals_as_images_make_no_sheet_of_a_kilometre(tmp_path: Path) -> None:
    """A thousand times as high as wide: the sheet of mistakes would be of gigabytes."""
    folder = create_run(tmp_path / "run", trials=4)
    summary = folder.read_summary()
    summary["dataset"]["shape"] = [1, 1000, 1]
    folder.write_summary(summary)
    write_report(folder)
    with Image.open(folder.plots / "mistakes.png") as picture:
        assert max(picture.size) < 10_000


@pytest.mark.parametrize("name", sorted(PLOTS))
def test_plots_are_pngs_and_not_blank(name: str, searched: RunFolder) -> None:
    """More than a frame and letters: ink of the plot's own colours, over a good part of both axes."""
    with Image.open(searched.plots / f"{name}.png") as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert min(pixels.shape[:2]) >= 400
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    # The mistakes are grey images; all else has colour.
    marks = pixels.min(axis=2) < 200 if name == "mistakes" else np.ptp(pixels, axis=2) > 40
    for axis in (0, 1):
        assert marks.any(axis=axis).mean() > 0.3, (name, axis)


def test_names_that_look_like_formulas_or_lack_a_glyph_are_drawn(tmp_path: Path) -> None:
    """Matplotlib takes $ for the start of a formula, and warns of letters that its font has not."""
    folder = create_run(tmp_path / "run")
    for path in (folder.best / "metrics.json", folder.best / "classes.json"):
        content = path.read_text(encoding="utf-8").replace("Fish & chips", "$\\\\frac{$").replace("T-shirt/top", "𐎠ب")
        path.write_text(content, encoding="utf-8")
    assert len(write_report(folder)) == 3 + len(PLOTS)


# The model card


def test_card_has_a_header_of_yaml(card: str) -> None:
    _, header, _ = card.split("---\n", 2)
    content: dict[str, Any] = YAML(typ="safe").load(header)
    assert content["pipeline_tag"] == "image-classification"
    assert content["metrics"] == ["accuracy"]


def test_card_gives_metrics_with_intervals(card: str) -> None:
    assert "| test accuracy | 87.00% | 84.77% to 88.94% |" in card
    assert "| test accuracy of the untuned baseline | 79.12% | 76.47% to 81.51% |" in card
    error = examine_test()["calibration"]["ece"]
    assert f"| expected calibration error on the test split | {100 * error:.2f} percentage points | - |" in card
    # Wilson's interval of 245 of 250, by hand.
    hits = CONFUSION[3][3]
    assert hits == 245
    assert f'| "quoted" | 250 | 98.00% | 95.40% to 99.14% | {245 / 262:.2%} | {490 / 512:.2%} |' in card
    assert "| never | 0 | - | - | - | - |" in card


def test_card_says_what_the_model_is_and_is_not(card: str, searched: RunFolder) -> None:
    text = _render(_without_header(card)).text
    summary = searched.read_summary()
    assert (
        f"A ResNet-{summary['params']['model.depth']} of width {summary['params']['model.width']} (12 parameters"
        in text
    )
    assert "tells 5 classes of images apart, of 28 x 28 pixels and 1 channel" in text
    assert f"Trial {summary['best_trial']} of 40 trials, trained for 6 epochs, then once more" in text
    assert "Over-confident" in text and "little of classes with fewer than 50 test images: never." in text
    assert "2 others of the same configuration, each with a seed of its own, came to validation accuracies" in text
    assert f"| trial.optim.lr | {summary['params']['optim.lr']} |" in card
    assert "fmtune predict default FILE -o out.csv" in card and "fmtune.load('default')" in card


def test_licence_is_given_where_it_is_known(card: str, trained: RunFolder) -> None:
    assert "| licence of the data | MIT, https://github.com/zalandoresearch/fashion-mnist |" in card
    assert "| licence of the data | not known to fmtune; whoever" in trained.card.read_text(encoding="utf-8")
    assert set(datasets.LICENCES) <= set(datasets.NAMES)


def test_card_of_a_training_without_a_test_split(trained: RunFolder) -> None:
    text = _render(_without_header(trained.card.read_text(encoding="utf-8"))).text
    assert "It was not measured on a test split." in text
    assert "How far its probabilities can be believed was not measured." in text
    assert "It is one training; another one" in text and "test accuracy" not in text
