"""The page of a run in headless Chromium: drawn, silent, and with nothing from any network.

Needs Debian's packages chromium and chromium-driver, and selenium.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import HOSTILE, create_run, create_training

from fmtune.report import write_report
from fmtune.report.read import read_run
from fmtune.run import RunFolder

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install selenium")
wait = pytest.importorskip("selenium.webdriver.support.wait")

_FLAGS = (
    "--headless",
    "--no-sandbox",  # root, as in containers, may not have one
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_IS_DRAWN = """
return document.querySelectorAll('.js-plotly-plot').length === document.querySelectorAll('.plotly-graph-div').length
"""
# Each trace, and what holds it: an svg's shapes, or the image that a heatmap is.
_COUNT_SHAPES = """
return [...document.querySelectorAll('.plotly-graph-div')].map(div => [
  div.id,
  div.data.length,
  div.querySelectorAll('.scatterlayer .point, .scatterlayer .js-line, .barlayer path, .heatmaplayer image').length,
  div.getBoundingClientRect().width,
])
"""
_PICTURES = """
return [...document.querySelectorAll('#mistakes img')].map(image => {
  const box = image.getBoundingClientRect();
  return [[image.naturalWidth, image.naturalHeight], box.width, box.left, box.right];
})
"""
_CONTRASTS = """
const luminance = color => {
  const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ground = node => {
  for (; node; node = node.parentElement) {
    const color = getComputedStyle(node).backgroundColor;
    if (color !== 'rgba(0, 0, 0, 0)') return color;
  }
  return 'rgb(255, 255, 255)';
};
const contrast = (ink, paper) => {
  const [low, high] = [luminance(ink), luminance(paper)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
};
const words = 'h1, h2, h3, p, a, dt, dd, small, th, td, caption, figcaption, summary, code';
const html = [...document.querySelectorAll(words)]
  .map(node => [node.textContent.slice(0, 40), contrast(getComputedStyle(node).color, ground(node))]);
const svg = [...document.querySelectorAll('.plotly-graph-div .xtick text, .plotly-graph-div .ytick text, .legendtext')]
  .map(node => [node.textContent, contrast(getComputedStyle(node).fill, ground(node.closest('.plotly-graph-div')))]);
return [...html, ...svg];
"""


class Browser:
    """A page open in Chromium, and what the browser logged of it."""

    def __init__(self, profile: Path) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium")
        for flag in (*_FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        service = webdriver.ChromeService(shutil.which("chromedriver"))
        self.driver = webdriver.Chrome(options=options, service=service)

    def open(self, page: Path, width: int = 1280, scheme: str = "light") -> None:
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.set_scheme(scheme)
        self.driver.get(page.resolve().as_uri())
        # Plots are drawn one after the other, and the first is there when the page is.
        wait.WebDriverWait(self.driver, 60).until(lambda _: self.run(_IS_DRAWN))

    def set_scheme(self, scheme: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def console(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self, page: Path) -> list[str]:
        """Addresses of all that a page asked for since the last call; Chromium's own first tab asks for things too."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [request["request"]["url"] for request in sent if request["documentURL"] == page.resolve().as_uri()]

    def hover(self, selector: str) -> str:
        """What shows when the pointer comes to rest on an element."""
        element = self.driver.find_element("css selector", selector)
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        webdriver.ActionChains(self.driver).move_to_element(element).pause(0.5).perform()
        return "\n".join(e.text for e in self.driver.find_elements("css selector", ".hoverlayer .hovertext tspan.line"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)}: apt-get install -y chromium chromium-driver")
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.driver.quit()


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = create_run(tmp_path_factory.mktemp("runs") / "search", overfit=True)
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = create_training(tmp_path_factory.mktemp("runs") / "train")
    write_report(folder)
    return folder


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("kind", ["searched", "trained"])
def test_every_plot_is_drawn_in_silence(
    browser: Browser, kind: str, width: int, scheme: str, request: pytest.FixtureRequest
) -> None:
    folder: RunFolder = request.getfixturevalue(kind)
    browser.requests(folder.report)
    browser.open(folder.report, width, scheme)
    drawn = browser.run(_COUNT_SHAPES)
    # A slice of each of nine parameters, and nine others.
    assert len(drawn) == (18 if kind == "searched" else 2)
    assert all(traces and shapes for _, traces, shapes, _ in drawn), drawn
    assert all(200 < plot_width <= width for *_, plot_width in drawn), drawn
    assert browser.console() == []
    requests = browser.requests(folder.report)
    asked = {url for url in requests if not url.startswith(("data:", "blob:"))}
    assert asked == {folder.report.resolve().as_uri()}


@pytest.mark.parametrize("width", [390, 1280])
def test_mistakes_are_seen(browser: Browser, searched: RunFolder, width: int) -> None:
    """Every picture is loaded, large enough to see, in a row with others, and within the screen."""
    browser.open(searched.report, width)
    pictures = browser.run(_PICTURES)
    assert len(pictures) == 24
    assert all(natural == [28, 28] for natural, *_ in pictures)
    assert all(80 <= size <= 200 and left >= 0 and right <= width for _, size, left, right in pictures)
    assert len({left for *_, left, _ in pictures}) >= (3 if width == 390 else 6)


@pytest.mark.parametrize("width", [390, 1280])
def test_reliability_is_drawn(browser: Browser, searched: RunFolder, width: int) -> None:
    """A bar and a point for each bin with images, and an interval at each point."""
    browser.open(searched.report, width)
    filled = len(browser.run("return document.getElementById('reliability-plot').data[0].x"))
    assert filled > 5
    for marks in (".barlayer path", ".scatterlayer .point", ".errorbar"):
        assert len(browser.driver.find_elements("css selector", f"#reliability-plot {marks}")) == filled, marks


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_screen(browser: Browser, searched: RunFolder, width: int) -> None:
    browser.open(searched.report, width)
    assert browser.run("return document.documentElement.scrollWidth") <= width


def test_hovering_a_trial_shows_its_parameters(browser: Browser, searched: RunFolder) -> None:
    browser.open(searched.report)
    run = read_run(searched)
    assert run.best
    shown = browser.hover("#history-plot .scatterlayer .trace:last-child path.point")
    assert f"trial {run.best.number} (best), complete" in shown
    assert f"{run.value(run.best):.4f}" in shown
    assert all(f"{key} = " in shown for key in run.best.params)


def test_a_class_named_as_a_script_stays_text(browser: Browser, searched: RunFolder) -> None:
    browser.open(searched.report)
    assert browser.run("return document.querySelectorAll('body script').length") == 3
    names = [e.text for e in browser.driver.find_elements("css selector", "#classes tbody th")]
    assert HOSTILE in names
    ticks = browser.run("return [...document.querySelectorAll('#confusion-plot .xtick text')].map(t => t.textContent)")
    assert any(tick.startswith("<script>alert") for tick in ticks)


def test_an_injected_script_would_not_run(browser: Browser, searched: RunFolder, tmp_path: Path) -> None:
    content = searched.report.read_text(encoding="utf-8")
    injected = tmp_path / "report.html"
    injected.write_text(content.replace("<main", "<script>window.injected = 1</script><main", 1), encoding="utf-8")
    browser.open(injected)
    assert browser.run("return window.injected") is None
    assert any("Content Security Policy" in line for line in browser.console())


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_is_wcag_aa(browser: Browser, searched: RunFolder, scheme: str) -> None:
    browser.open(searched.report, scheme=scheme)
    contrasts = browser.run(_CONTRASTS)
    assert len(contrasts) > 200
    assert [(text, ratio) for text, ratio in contrasts if ratio < 4.5] == []


def test_plots_follow_the_scheme(browser: Browser, searched: RunFolder) -> None:
    ink = "return getComputedStyle(document.querySelector('#loss-plot .xtick text')).fill"
    browser.open(searched.report, scheme="light")
    before = browser.run(ink)
    browser.set_scheme("dark")
    after = browser.run(f"return new Promise(done => setTimeout(() => done((() => {{ {ink} }})()), 300))")
    assert before != after


def test_focus_is_visible(browser: Browser, searched: RunFolder) -> None:
    browser.open(searched.report)
    browser.driver.find_element("css selector", "body").send_keys("\ue004")  # Tab
    style = browser.run("const s = getComputedStyle(document.activeElement); return [s.outlineStyle, s.outlineWidth]")
    assert style == ["solid", "3px"]
