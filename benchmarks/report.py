"""How long a run's report takes to write, and its page to open in headless Chromium.

    python benchmarks/report.py RUN [--rounds 5]

A made-up search of 200 trials: `PYTHONPATH=tests python -c "from pathlib import Path; from runs import create_run;
create_run(Path('made-up'), trials=200)"`. Each round opens the page in a window of 1280 x 900 and in a phone's; the
first page of a browser that has just started is told apart. Needs selenium, and Debian's chromium and chromium-driver.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from pathlib import Path

from selenium import webdriver

from fmtune.report import write_report
from fmtune.run import RunFolder

WINDOWS = {"desktop": (1280, 900), "phone": (390, 844)}
LOADED = "const t = performance.timing; return (t.loadEventEnd - t.navigationStart) / 1000"
DRAWN = """
return document.querySelectorAll('.js-plotly-plot').length === document.querySelectorAll('.plotly-graph-div').length
"""


def open_page(driver: webdriver.Chrome, page: Path, size: tuple[int, int]) -> tuple[float, float]:
    """Seconds until the page is loaded, by the browser's clock, and until the last plot is drawn."""
    driver.set_window_size(*size)
    start = time.monotonic()
    driver.get(page.resolve().as_uri())
    while not driver.execute_script(DRAWN):
        time.sleep(0.01)
    return driver.execute_script(LOADED), time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    start = time.monotonic()
    page, *_ = write_report(RunFolder.open(options.run))
    print(f"written in {time.monotonic() - start:.1f} s, {page.stat().st_size / 1e6:.1f} MB")
    flags = webdriver.ChromeOptions()
    flags.binary_location = shutil.which("chromium") or "chromium"
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"):
        flags.add_argument(flag)
    driver = webdriver.Chrome(options=flags, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        first, *_ = open_page(driver, page, WINDOWS["desktop"])
        print(f"first page of the browser: loaded after {first:.2f} s")
        for name, size in WINDOWS.items():
            rounds = [open_page(driver, page, size) for _ in range(options.rounds)]
            for what, seconds in zip(("loaded", "drawn"), zip(*rounds, strict=True), strict=True):
                low, high = min(seconds), max(seconds)
                print(f"{name}: {what} after {statistics.median(seconds):.2f} s ({low:.2f} to {high:.2f})")
    finally:
        driver.quit()


if __name__ == "__main__":
    main()
