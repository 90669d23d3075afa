"""The page of a run, checked against the run folders that runs.py makes."""

from __future__ import annotations

import json
import math
import re
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pages import Page
from runs import DIFFERENCE, EPOCHS, HOSTILE, NAMES, SPACE, create_run, create_training, examine_test

from fmtune.calibration import Bin, Calibration
from fmtune.errors import RunFolderError
from fmtune.report import write_report
from fmtune.report.findings import (
    Gain,
    describe_weakest,
    diagnose,
    error_by_chance,
    judge,
    pareto_front,
    running_best,
    weigh,
    weigh_confidence,
)
from fmtune.report.importance import MIN_TRIALS, measure_importance
from fmtune.report.markup import Html, element, join, plot_text
from fmtune.report.plots import draw_history, draw_parallel, hover_texts, log_ticks
from fmtune.report.read import Trial, read_run
from fmtune.report.words import surely
from fmtune.run import RunFolder
from fmtune.space import Space
from fmtune.summary import describe_summary
from fmtune.training import EpochMetrics


@pytest.fixture(scope="module")
def page(searched: RunFolder) -> str:
    return searched.report.read_text(encoding="utf-8")


def write_page(folder: RunFolder) -> str:
    """The page of a run, just written."""
    return write_report(folder)[0].read_text(encoding="utf-8")


def figures_of(content: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', content, re.DOTALL)
    assert found
    figures: dict[str, Any] = json.loads(found[1])
    return figures


# The page


def test_headline_gives_what_the_summary_has(page: str, searched: RunFolder) -> None:
    text = Page(page).text
    assert "87.00%" in text and "95% interval 84.77% to 88.94%" in text
    assert "79.12%" in text and "+7.88" in text
    counts = searched.read_summary()["trials"]
    assert f"{counts['complete']} complete, {counts['pruned']} stopped early, 1 failed" in text
    assert "10:05" in text and "1,234,567 images trained" in text
    assert "84.73%" in text


def test_baseline_interval_is_wilsons(searched: RunFolder) -> None:
    # 791 of 1000 by the formula at https://en.wikipedia.org/wiki/Binomial_proportion_confidence_interval, by hand.
    around = weigh(read_run(searched)).baseline_interval
    assert around == pytest.approx((0.7647, 0.8151), abs=1e-4)


def test_page_fetches_nothing(page: str) -> None:
    parsed = Page(page)
    for tag, attributes in parsed.tags:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            target = attributes.get(name) or ""
            assert target == "" or target.startswith(("#", "data:")), f"<{tag} {name}={target!r}>"
    styles = "".join(re.findall(r"<style>(.*?)</style>", page, re.DOTALL))
    assert "@import" not in styles and "url(" not in styles
    policy = next(a["content"] or "" for t, a in parsed.tags if t == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'") and "http" not in policy


def test_page_is_one_small_file_with_plotly_once(page: str) -> None:
    assert len(page.encode()) < 8_000_000
    scripts = re.findall(r"<script>", page)
    assert len(scripts) == 2 and page.count("* plotly.js v") == 1


def test_names_from_outside_stay_text(page: str) -> None:
    # As text in tables, and as JSON in which no < can end the script element.
    assert HOSTILE not in page
    parsed = Page(page)
    assert f" {HOSTILE} " in parsed.text
    assert escape('"quoted"') in page and "Fish &amp; chips" in page
    figures = page[page.index('id="figures"') :].partition("</script>")[0]
    assert "<" not in figures
    # Plotly reads some HTML itself.
    axis = figures_of(page)["plots"]["confusion-plot"]["layout"]["xaxis"]
    assert axis["ticktext"][1].startswith("&lt;script&gt;") and axis["ticktext"][2] == "Fish &amp; chips"


def test_every_plot_has_a_place_and_a_text(page: str) -> None:
    places = {a["id"]: a for _, a in Page(page).tags if "plotly-graph-div" in (a.get("class") or "")}
    plots = figures_of(page)["plots"]
    assert set(places) == set(plots)
    assert all(len(place["aria-label"] or "") > 20 for place in places.values())
    assert len([name for name in plots if name.startswith("slice-")]) == len(Space.load(SPACE).ranges)


def test_headings_have_no_gaps_and_ids_are_unique(page: str) -> None:
    tags = Page(page).tags
    levels = [int(tag[1]) for tag, _ in tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    ids = [a["id"] for _, a in tags if "id" in a]
    assert len(ids) == len(set(ids))
    links = {a["href"] for t, a in tags if t == "a"}
    assert links <= {f"#{name}" for name in ids}


def test_hover_text_gives_number_state_value_and_all_parameters(searched: RunFolder) -> None:
    run = read_run(searched)
    pruned = next(trial for trial in run.searched if trial.state == "pruned" and trial.params["optim.name"] == "sgd")
    text = hover_texts(run)[pruned.number]
    assert f"trial {pruned.number}" in text and "stopped early" in text and f"{pruned.val_accuracy:.4f}" in text
    assert all(f"{key} = " in text for key in pruned.params) and len(pruned.params) == 9
    assert (
        "optim.momentum"
        not in hover_texts(run)[next(t.number for t in run.searched if "optim.momentum" not in t.params)]
    )


def test_per_class_table_has_dashes_where_there_is_no_ratio(page: str) -> None:
    row = re.search(r'<th scope="row">never</th>(.*?)</tr>', page)
    assert row and re.sub(r"<[^>]+>", " ", row[1]).split() == ["0", "-", "-", "-"]
    # Class 0: 200 hits of 250 true and 257 predicted.
    assert "80.00%" in page and "77.82%" in page and "78.90%" in page


def test_a_class_that_the_test_split_has_not_is_none_of_the_weakest() -> None:
    """It has an F1 of 0 once it is predicted."""
    rows = [{"name": "absent", "images": 0, "f1": 0.0}, {"name": "boot", "images": 5, "f1": 0.9}]
    assert describe_weakest({"per_class": rows}) == "Lowest F1 on the test split: boot (90.00%)."
    assert describe_weakest({"per_class": rows[:1]}) is None


def test_command_can_be_pasted(page: str, searched: RunFolder) -> None:
    environment = json.loads(searched.environment.read_text(encoding="utf-8"))
    environment["command"] = ["/somewhere/fmtune", "search", "a space.yaml", "--set", "search.time=1m"]
    searched.environment.write_text(json.dumps(environment), encoding="utf-8")
    content = write_page(searched)
    assert escape("fmtune search 'a space.yaml' --set search.time=1m\nfmtune search ", quote=True) in content


# Variants


def test_run_without_test_split(tmp_path: Path) -> None:
    text = Page(write_page(create_run(tmp_path / "run", test=False))).text
    assert "Validation accuracy" in text and "There was no test split" in text
    assert "84.73%" in text and "74.29%" in text and "+10.44" in text
    assert "No test split was measured class by class" in text


def test_single_training(tmp_path: Path) -> None:
    content = write_page(create_training(tmp_path / "run"))
    assert set(figures_of(content)["plots"]) == {"loss-plot", "accuracy-plot"}
    text = Page(content).text
    assert "Baseline" not in text and "Search history" not in text and "84.73%" in text
    assert "There was no test split. Measure" in text


def test_search_by_loss_takes_less_as_better(tmp_path: Path) -> None:
    folder = create_run(tmp_path / "run")
    folder.space.write_text(folder.space.read_text().replace("metric: val_accuracy", "metric: val_loss"))
    run = read_run(folder)
    values = [value for _, value in running_best(run)]
    assert len(values) > 1 and values == sorted(values, reverse=True)
    assert next(iter(measure_importance(run).shares)) == "optim.lr"
    assert "by which the search chose" not in write_page(folder)


def test_unfinished_run_is_refused(tmp_path: Path) -> None:
    folder = create_training(tmp_path / "run")
    folder.summary.unlink()
    with pytest.raises(RunFolderError, match="has not finished"):
        write_report(folder)
    assert not folder.report.exists()


def test_losses_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    folder = create_training(tmp_path / "run")
    folder.append_history(0, EpochMetrics(EPOCHS + 1, math.inf, math.nan, 0.1, 0.01, 1.0, 20.0))
    plots = figures_of(write_page(folder))["plots"]
    assert [trace["y"][-1] for trace in plots["loss-plot"]["data"]] == [None, None]


def test_report_of_200_trials_is_small(tmp_path: Path) -> None:
    assert write_report(create_run(tmp_path / "run", trials=200))[0].stat().st_size < 8_000_000


# Mistakes and calibration


def test_mistakes_are_shown_with_their_images(page: str, searched: RunFolder) -> None:
    """A picture each, with the folder's own PNG, a text for who can't see it, and a caption."""
    mistakes = examine_test()["mistakes"]
    images = [attributes for tag, attributes in Page(page).tags if tag == "img"]
    assert [image["src"] for image in images] == [f"data:image/png;base64,{m['image']}" for m in mistakes]
    assert [image["alt"] for image in images] == [
        f"Test image of row {m['row']}: {NAMES[m['true']]}, taken for {NAMES[m['predicted']]}" for m in mistakes
    ]
    first = mistakes[0]
    caption = f"taken for {NAMES[first['predicted']]} with {100 * first['probability']:.1f}%, is "
    caption += f"{NAMES[first['true']]}, row {first['row']}"
    assert caption in Page(page).text
    assert "130 of 1,000 test images were taken for another class" in page


def test_calibration_is_said_and_drawn(page: str) -> None:
    calibration = examine_test()["calibration"]
    text = Page(page).text
    assert f"{100 * calibration['ece']:.2f} percentage points" in text
    assert "Over-confident" in text and "trial.optim.label_smoothing, here 0.1" in text
    spread, ideal, points = figures_of(page)["plots"]["reliability-plot"]["data"]
    filled = [entry for entry in calibration["bins"] if entry["images"]]
    assert points["x"] == pytest.approx([100 * entry["confidence"] for entry in filled])
    assert points["y"] == pytest.approx([100 * entry["accuracy"] for entry in filled])
    assert spread["y"] == pytest.approx([entry["images"] / 10 for entry in filled])
    assert ideal["x"] == ideal["y"]


@pytest.mark.parametrize("test", [True, False])
def test_a_run_without_calibration_says_why(tmp_path: Path, test: bool) -> None:
    """Runs of older versions have a test split and no such keys; others have no test split."""
    folder = create_run(tmp_path / "run", test=test)
    metrics = json.loads((folder.best / "metrics.json").read_text(encoding="utf-8"))
    for key in ("calibration", "mistakes") if test else ():
        del metrics["test"][key]
    (folder.best / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    content = write_page(folder)
    text = Page(content).text
    for what in ("calibration", "mistakes"):
        known = f"There is no record of {what}" if test else f"There was no test split to measure {what} on"
        assert known in text
    assert "reliability-plot" not in figures_of(content)["plots"] and "<img" not in content


def test_a_model_without_mistakes_is_no_error(tmp_path: Path) -> None:
    folder = create_run(tmp_path / "run")
    metrics = json.loads((folder.best / "metrics.json").read_text(encoding="utf-8"))
    metrics["test"]["mistakes"] = []
    (folder.best / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    assert "Every image of the test split was taken for what it is." in Page(write_page(folder)).text


def _calibration(*filled: tuple[int, float, float]) -> Calibration:
    """Of bins with (images, mean confidence, accuracy), and an empty one."""
    bins = [Bin(0, 1, *entry) for entry in filled]
    images = sum(entry[0] for entry in filled)
    error = sum(n * abs(confidence - accuracy) for n, confidence, accuracy in filled) / images
    return Calibration(error, [Bin(0, 1, 0, None, None), *bins])


@pytest.mark.parametrize(
    ("filled", "kind", "words"),
    [
        ([(500, 0.95, 0.85), (500, 0.7, 0.6)], "over", "temperature above 1"),
        ([(500, 0.85, 0.95), (500, 0.6, 0.7)], "under", "temperature below 1"),
        ([(500, 0.95, 0.85), (500, 0.6, 0.7)], "mixed", "can't mend both"),
        ([(500, 0.95, 0.94), (500, 0.7, 0.69)], "fair", "Well calibrated"),
        # The same distances over few images are what chance gives.
        ([(10, 0.95, 0.85), (10, 0.7, 0.6)], "fair", "as far as so many images can tell"),
    ],
)
def test_confidence_is_weighed(filled: list[tuple[int, float, float]], kind: str, words: str) -> None:
    trust = weigh_confidence(_calibration(*filled), 0.1)
    assert trust.kind == kind and words in trust.text
    assert trust.confidence == pytest.approx(sum(n * c for n, c, _ in filled) / sum(n for n, *_ in filled))


def test_error_by_chance_is_what_calibrated_models_come_to() -> None:
    """Against the mean over models whose every image is right with the probability of its bin's confidence."""
    sizes, confidence = np.array([200, 300, 500]), np.array([0.6, 0.8, 0.95])
    hits = np.random.default_rng(0).binomial(sizes, confidence, (20_000, 3))
    simulated = np.abs(hits - sizes * confidence).sum(axis=1).mean() / sizes.sum()
    bins = [Bin(0, 1, int(n), float(c), float(c)) for n, c in zip(sizes, confidence, strict=True)]
    assert error_by_chance(bins) == pytest.approx(simulated, rel=0.02)


# Findings


def _curve(train: list[float], validation: list[float | None]) -> list[EpochMetrics]:
    pairs = zip(train, validation, strict=True)
    return [EpochMetrics(e, t, v, 0.5, 0.01, 1.0, float(e)) for e, (t, v) in enumerate(pairs, 1)]


@pytest.mark.parametrize(
    ("train", "validation", "kind", "epoch"),
    [
        ([1.0, 0.8, 0.6, 0.4], [1.0, 0.8, 0.9, 1.0], "overfitting", 2),
        ([1.0, 0.8, 0.9, 1.0], [1.0, 0.8, 0.9, 1.0], "level", 2),  # both turn up: it diverges
        ([1.0, 0.8, 0.6, 0.4], [1.0, 0.8, 0.9, 0.81], "level", 2),  # a bump on the way
        ([1.0, 0.8, 0.6, 0.4], [1.0, 0.8, 0.7, 0.6], "learning", 4),
        ([1.0, 0.8, 0.6, 0.4], [1.0, 0.8, 0.7, 0.699], "level", 4),
        ([1.0], [1.0], "short", None),
        ([1.0, 0.8], [None, None], "short", None),
    ],
)
def test_diagnosis(train: list[float], validation: list[float | None], kind: str, epoch: int | None) -> None:
    diagnosis = diagnose(_curve(train, validation), len(train))
    assert (diagnosis.kind, diagnosis.epoch) == (kind, epoch)


def test_run_that_the_time_cut_short_says_so(tmp_path: Path) -> None:
    """A winner of two epochs of six, never refitted, beside a baseline that did not finish one."""
    folder = create_run(tmp_path / "run", trials=4)
    summary = folder.read_summary()
    nothing = {"val_accuracy": None, "test_accuracy": None, "difference": None, "epochs": 0}
    folder.write_summary(
        summary | {"best_trial": 3, "refit": False, "finalists": [], "baseline": summary["baseline"] | nothing}
    )
    content = write_page(folder)
    card = folder.card.read_text(encoding="utf-8")
    for text in (content, card):
        assert "The baseline had no time to finish an epoch" in text and "training longer" not in text
    assert "it had 2 of its 6 epochs, and more time (search.time) may do better" in content
    assert "Trial 3 of 4 trials, trained for 2 of its 6 epochs." in card
    assert "3 searched trials came to a value" in content


@pytest.mark.parametrize("epochs", [0, 3])
def test_a_baseline_that_failed_is_not_said_to_have_had_no_time(epochs: int, tmp_path: Path) -> None:
    folder = create_run(tmp_path / "run", trials=4)
    summary = folder.read_summary()
    missing = {} if epochs else {"val_accuracy": None, "test_accuracy": None, "difference": None}
    summary["baseline"] |= missing | {"epochs": epochs, "cause": "NonFiniteLoss: nan"}
    folder.write_summary(summary)
    content = write_page(folder)
    assert f"The baseline failed {'after 3 of its 6 epochs ' if epochs else ''}(NonFiniteLoss: nan), so" in content
    said = dict(describe_summary(folder, summary))["baseline"]
    assert "failed: NonFiniteLoss: nan" in said and "time" not in said


def test_plots_over_parameters_want_some_trials(tmp_path: Path) -> None:
    content = write_page(create_run(tmp_path / "run", trials=2))
    assert "Plots over the parameters are missing: 1 searched trial came to a value" in content
    assert not {"parallel-plot", "slice-0"} & set(figures_of(content)["plots"])


@pytest.mark.parametrize("overfit", [True, False])
def test_overfitting_is_named_exactly_where_it_is(tmp_path: Path, overfit: bool) -> None:
    content = write_page(create_run(tmp_path / "run", overfit=overfit))
    assert ("Over-fitting from epoch 3 on: validation loss turns up" in content) == overfit
    assert bool(figures_of(content)["plots"]["loss-plot"]["layout"].get("shapes")) == overfit


def _trial(number: int, accuracy: float | None, seconds: float = 1.0, state: str = "complete") -> Trial:
    return Trial(number, state, 1, accuracy, 0.5, seconds, {}, [])


def test_pareto_front_has_what_nothing_beats() -> None:
    trials = [_trial(0, 0.5, 1.0), _trial(1, 0.4, 2.0), _trial(2, 0.7, 3.0), _trial(3, 0.7, 4.0), _trial(4, None, 0.0)]
    assert [trial.number for trial in pareto_front([*trials, _trial(5, 0.6, 1.0)])] == [5, 2]


def test_running_best_rises_over_complete_trials(searched: RunFolder) -> None:
    run = read_run(searched)
    steps = running_best(run)
    complete = [trial.val_accuracy for trial in run.trials if trial.state == "complete" and trial.val_accuracy]
    assert [value for _, value in steps] == sorted({value for _, value in steps})
    assert steps[-1][1] == max(complete)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "120 test images right, the baseline alone 41 test images"),
        ({}, "Chance in which images were drawn does not explain it"),
        ({"p_value": 0.0513}, "p = 0.051). So few images can't rule out"),
        ({"gained": 41, "lost": 120}, "The baseline is better"),
    ],
)
def test_judgement(changes: dict[str, Any], words: str) -> None:
    gain = Gain("test", 0.87, (0.8477, 0.8894), 0.7912, (0.7647, 0.8151), DIFFERENCE | changes)
    assert words in (judge(gain) or "")


def test_page_says_what_more_trials_would_bring(page: str) -> None:
    text = " ".join(Page(page).text.split())
    assert "39 more trials would add about 0.31 points of validation accuracy (95% interval 0.00 to 1.12)" in text


def test_importance_finds_the_parameter_that_decides(searched: RunFolder) -> None:
    importance = measure_importance(read_run(searched))
    assert next(iter(importance.shares)) == "optim.lr"
    assert sum(importance.shares.values()) == pytest.approx(1)


def test_importance_says_why_it_is_missing(tmp_path: Path) -> None:
    folder = create_run(tmp_path / "run", trials=MIN_TRIALS)  # the baseline is one, another failed
    importance = measure_importance(read_run(folder))
    assert not importance.shares and f"{MIN_TRIALS - 2} searched trials" in importance.text
    assert importance.text in Page(write_page(folder)).text


def test_stopped_trials_and_the_baseline_have_markers_of_their_own(searched: RunFolder) -> None:
    run = read_run(searched)
    traces = {trace["name"]: trace for trace in draw_history(run)["data"]}
    symbols = {traces[name]["marker"]["symbol"] for name in ("complete", "stopped early", "baseline", "best")}
    assert len(symbols) == 4
    assert traces["baseline"]["customdata"] == [0]
    drawn = sorted(number for trace in traces.values() for number in trace.get("customdata", []))
    assert drawn == [trial.number for trial in run.trials if trial.val_accuracy is not None]


def test_parallel_coordinates_lie_within_their_axes(searched: RunFolder) -> None:
    run = read_run(searched)
    others, best = draw_parallel(run)["data"]
    places = [x for trace in (others, best) for x in trace["x"] if x is not None]
    assert min(places) >= 0 and max(places) <= 1
    rows = len(run.space.ranges)
    numbers = [number for number, y in zip(best["customdata"], best["y"], strict=True) if y == rows]
    assert run.summary["best_trial"] in numbers


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(1e-4, 3e-2, [1e-4, 1e-3, 1e-2]), (3e-3, 0.1, [3e-3, 0.01, 0.03, 0.1]), (0.01, 0.06, [0.01, 0.02, 0.05])],
)
def test_ticks_of_logarithms_are_round_and_few(low: float, high: float, ticks: list[float]) -> None:
    assert log_ticks(low, high) == ticks


# Words and markup


def test_a_probability_is_not_rounded_to_certainty() -> None:
    assert [surely(p) for p in (0.5, 0.9994, 0.9996, 1.0)] == ["50.0%", "99.9%", "over 99.9%", "over 99.9%"]


def test_texts_are_escaped_and_markup_is_not() -> None:
    assert element("p", "<b>", Html("<i>x</i>"), title='"&') == '<p title="&quot;&amp;">&lt;b&gt;<i>x</i></p>'
    assert join(["a<", Html("<br>")]) == "a&lt;<br>"
    assert plot_text("<b>&") == "&lt;b&gt;&amp;"
