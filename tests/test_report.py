"""The page of a run, checked against run folders that are made here."""

from __future__ import annotations

import json
import math
import random
import re
import time
from html import escape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fmtune.errors import RunFolderError
from fmtune.report import write_report
from fmtune.report.findings import Gain, diagnose, judge, pareto_front, running_best, weigh
from fmtune.report.importance import MIN_TRIALS, measure_importance
from fmtune.report.markup import Html, element, join, plot_text
from fmtune.report.plots import draw_history, draw_parallel, hover_texts, log_ticks
from fmtune.report.read import Trial, read_run
from fmtune.run import RunFolder, TrialRecord
from fmtune.space import Space
from fmtune.training import EpochMetrics

HOSTILE = "<script>alert(1)</script>"
EPOCHS = 6
SPACE = {
    "data": {"train": "sample"},
    "search": {"trials": 40, "time": "10m"},
    "baseline": "seed",
    "trial": {
        "epochs": EPOCHS,
        "batch_size": {"choice": [128, 256, 512]},
        "model": {"depth": {"choice": [10, 18, 34]}, "width": {"int": [8, 64]}},
        "augment": {"erase": {"float": [0, 0.5]}},
        "optim": {
            "name": {"choice": ["adamw", "sgd", "muon"]},
            "lr": {"log": [1.0e-4, 3.0e-2]},
            "momentum": {"float": [0.8, 0.99], "when": {"optim.name": ["sgd", "muon"]}},
        },
    },
}
CLASSES = ["T-shirt/top", HOSTILE, "Fish & chips", '"quoted"']
CONFUSION = [[200, 20, 20, 10], [25, 220, 3, 2], [30, 10, 205, 5], [2, 3, 0, 245]]


# Run folders


def create_run(path: Path, trials: int = 40, *, test: bool = True, overfit: bool = False) -> RunFolder:
    """A search's folder: the learning rate decides, and two trials of three are stopped early."""
    space = Space.load(SPACE)
    folder = RunFolder.create(path, space.to_yaml())
    records = [_create_record(space, number, overfit) for number in range(trials)]
    if trials > 5:
        records[5].state, records[5].history = "failed", []
    _write(folder, records, list(space.ranges))
    complete = [record for record in records[1:] if record.state == "complete"]
    best = max(complete or records, key=_accuracy)
    folder.write_summary(_summarise(records, best, test))
    folder.best.mkdir()
    metrics = {"refit": True, "test": describe_test() if test else None}
    (folder.best / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    return folder


def create_training(path: Path) -> RunFolder:
    """A single training's folder, without a test split."""
    space = Space.load({"data": {"train": "images.csv"}, "trial": {"epochs": EPOCHS}}).as_single_training()
    folder = RunFolder.create(path, space.to_yaml())
    record = TrialRecord(0, space.baseline, {}, "complete", _create_history(0.8, EPOCHS, False))
    _write(folder, [record], [])
    summary = _summarise([record], record, test=False)
    folder.write_summary(summary | {"baseline": None, "finalists": [], "refit": False})
    return folder


def _create_record(space: Space, number: int, overfit: bool) -> TrialRecord:
    if number == 0:
        return TrialRecord(
            0, space.baseline, space.params_of(space.baseline), "complete", _create_history(0.8, 6, False)
        )
    drawn = space.suggest(_Draws(number))
    quality = 0.9 - 0.05 * abs(math.log10(float(drawn["optim.lr"] or 0)) + 2) ** 2  # best at 0.01
    epochs = EPOCHS if number % 3 == 1 else 1 + number % 2
    state: Any = "complete" if epochs == EPOCHS else "pruned"
    cost = 1 + float(drawn["model.width"] or 0) / 32
    return TrialRecord(number, space.trial_config(drawn), drawn, state, _create_history(quality, epochs, overfit, cost))


class _Draws:
    """A trial's draws, the same ones each time."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return self._random.choice(choices)

    def suggest_int(self, name: str, low: int, high: int) -> int:
        return self._random.randint(low, high)

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return math.exp(self._random.uniform(math.log(low), math.log(high))) if log else self._random.uniform(low, high)


def _create_history(quality: float, epochs: int, overfit: bool, cost: float = 1.0) -> list[EpochMetrics]:
    losses = [0.9, 0.7, 0.6, 0.65, 0.75, 0.9] if overfit else [0.9, 0.7, 0.6, 0.55, 0.52, 0.51]
    return [
        EpochMetrics(e, 1.2 / e, losses[e - 1] / quality, quality * (1 - 0.5 / (e + 1)), 0.01, 1500.0, 2.0 * e * cost)
        for e in range(1, epochs + 1)
    ]


def _write(folder: RunFolder, records: list[TrialRecord], columns: list[str]) -> None:
    for record in records:
        for epoch in record.history:
            folder.append_history(record.number, epoch)
    folder.write_trials(records, columns)


def _accuracy(record: TrialRecord) -> float:
    return (record.last and record.last.val_accuracy) or 0.0


def _summarise(records: list[TrialRecord], best: TrialRecord, test: bool) -> dict[str, Any]:
    """What fmtune/summary.py writes."""
    sizes = {"train": 5400, "validation": 600, "test": 1000 if test else None}
    return {
        "dataset": {"source": "sample", "origin": f"from {HOSTILE}", **sizes, "shape": [1, 28, 28], "classes": 4},
        "trials": {state: sum(r.state == state for r in records) for state in ("complete", "pruned", "failed")},
        "best_trial": best.number,
        "params": best.params,
        "val_accuracy": 0.8473,
        "test_accuracy": 0.87 if test else None,
        "test_interval": [0.8477, 0.8894] if test else None,
        "test_loss": 0.4 if test else None,
        "baseline": {"val_accuracy": 0.7429, "test_accuracy": 0.7912 if test else None, "epochs": 6, "of_epochs": 6},
        "seconds": 605.0,
        "images_trained": 1234567,
        "finalists": [
            {
                "trial": best.number,
                "val_accuracy": 0.8473,
                "val_loss": 0.45,
                "seeds": [{"val_accuracy": 0.84, "val_loss": 0.4}, {"val_accuracy": 0.8546, "val_loss": 0.5}],
            }
        ],
        "refit": True,
        "failures": [{"trial": r.number, "cause": HOSTILE, "config": {}} for r in records if r.state == "failed"],
    }


def describe_test() -> dict[str, Any]:
    """`Measured.as_dict()` of `CONFUSION`, and a class that never occurs nor is predicted."""
    matrix = [[*row, 0] for row in CONFUSION] + [[0] * 5]
    classes = []
    for i, name in enumerate([*CLASSES, "never"]):
        hits, true, predicted = matrix[i][i], sum(matrix[i]), sum(row[i] for row in matrix)
        ratios = {
            "precision": hits / predicted if predicted else None,
            "recall": hits / true if true else None,
            "f1": 2 * hits / (true + predicted) if true + predicted else None,
        }
        classes.append({"label": i, "name": name, "images": true, **ratios})
    return {"accuracy": 0.87, "interval": [0.8477, 0.8894], "loss": 0.4, "per_class": classes, "confusion": matrix}


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = create_run(tmp_path_factory.mktemp("runs") / "default")
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def page(searched: RunFolder) -> str:
    return searched.report.read_text(encoding="utf-8")


class _Page(HTMLParser):
    """Elements, attributes and the text outside of scripts and styles."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if not self._open or self._open[-1] not in ("script", "style"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.texts)


def figures_of(content: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', content, re.DOTALL)
    assert found
    figures: dict[str, Any] = json.loads(found[1])
    return figures


# The page


def test_headline_gives_what_the_summary_has(page: str, searched: RunFolder) -> None:
    text = _Page(page).text
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
    parsed = _Page(page)
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
    parsed = _Page(page)
    assert f" {HOSTILE} " in parsed.text
    assert escape('"quoted"') in page and "Fish &amp; chips" in page
    figures = page[page.index('id="figures"') :].partition("</script>")[0]
    assert "<" not in figures
    # Plotly reads some HTML itself.
    axis = figures_of(page)["plots"]["confusion-plot"]["layout"]["xaxis"]
    assert axis["ticktext"][1].startswith("&lt;script&gt;") and axis["ticktext"][2] == "Fish &amp; chips"


def test_every_plot_has_a_place_and_a_text(page: str) -> None:
    places = {a["id"]: a for _, a in _Page(page).tags if "plotly-graph-div" in (a.get("class") or "")}
    plots = figures_of(page)["plots"]
    assert set(places) == set(plots)
    assert all(len(place["aria-label"] or "") > 20 for place in places.values())
    assert len([name for name in plots if name.startswith("slice-")]) == len(Space.load(SPACE).ranges)


def test_headings_have_no_gaps_and_ids_are_unique(page: str) -> None:
    tags = _Page(page).tags
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
    assert all(f"{key} = " in text for key in pruned.params) and len(pruned.params) == 7
    assert (
        "optim.momentum"
        not in hover_texts(run)[next(t.number for t in run.searched if "optim.momentum" not in t.params)]
    )


def test_per_class_table_has_dashes_where_there_is_no_ratio(page: str) -> None:
    row = re.search(r'<th scope="row">never</th>(.*?)</tr>', page)
    assert row and re.sub(r"<[^>]+>", " ", row[1]).split() == ["0", "-", "-", "-"]
    # Class 0: 200 hits of 250 true and 257 predicted.
    assert "80.00%" in page and "77.82%" in page and "78.90%" in page


def test_command_can_be_pasted(page: str, searched: RunFolder) -> None:
    environment = json.loads(searched.environment.read_text(encoding="utf-8"))
    environment["command"] = ["/somewhere/fmtune", "search", "a space.yaml", "--set", "search.time=1m"]
    searched.environment.write_text(json.dumps(environment), encoding="utf-8")
    content = write_report(searched).read_text(encoding="utf-8")
    assert escape("fmtune search 'a space.yaml' --set search.time=1m\nfmtune search ", quote=True) in content


# Variants


def test_run_without_test_split(tmp_path: Path) -> None:
    text = _Page(write_report(create_run(tmp_path / "run", test=False)).read_text(encoding="utf-8")).text
    assert "Validation accuracy" in text and "There was no test split" in text
    assert "84.73%" in text and "74.29%" in text and "+10.44" in text
    assert "No test split was measured class by class" in text


def test_single_training(tmp_path: Path) -> None:
    content = write_report(create_training(tmp_path / "run")).read_text(encoding="utf-8")
    assert set(figures_of(content)["plots"]) == {"loss-plot", "accuracy-plot"}
    text = _Page(content).text
    assert "Baseline" not in text and "Search history" not in text and "84.73%" in text
    assert "There was no test split. Measure" in text


def test_search_by_loss_takes_less_as_better(tmp_path: Path) -> None:
    folder = create_run(tmp_path / "run")
    folder.space.write_text(folder.space.read_text().replace("metric: val_accuracy", "metric: val_loss"))
    run = read_run(folder)
    values = [value for _, value in running_best(run)]
    assert len(values) > 1 and values == sorted(values, reverse=True)
    assert next(iter(measure_importance(run).shares)) == "optim.lr"
    assert "by which the search chose" not in write_report(folder).read_text(encoding="utf-8")


def test_unfinished_run_is_refused(tmp_path: Path) -> None:
    folder = create_training(tmp_path / "run")
    folder.summary.unlink()
    with pytest.raises(RunFolderError, match="has not finished"):
        write_report(folder)
    assert not folder.report.exists()


def test_losses_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    folder = create_training(tmp_path / "run")
    folder.append_history(0, EpochMetrics(EPOCHS + 1, math.inf, math.nan, 0.1, 0.01, 1.0, 20.0))
    plots = figures_of(write_report(folder).read_text(encoding="utf-8"))["plots"]
    assert [trace["y"][-1] for trace in plots["loss-plot"]["data"]] == [None, None]


def test_report_of_200_trials_is_quick(tmp_path: Path) -> None:
    folder = create_run(tmp_path / "run", trials=200)
    start = time.monotonic()
    assert write_report(folder).stat().st_size < 8_000_000
    assert time.monotonic() - start < 10


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
    diagnosis = diagnose(_curve(train, validation))
    assert (diagnosis.kind, diagnosis.epoch) == (kind, epoch)


@pytest.mark.parametrize("overfit", [True, False])
def test_overfitting_is_named_exactly_where_it_is(tmp_path: Path, overfit: bool) -> None:
    content = write_report(create_run(tmp_path / "run", overfit=overfit)).read_text(encoding="utf-8")
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
    ("interval", "baseline", "words"),
    [
        ((0.84, 0.88), (0.75, 0.80), "do not overlap: chance"),
        ((0.84, 0.88), (0.80, 0.85), "overlap: this many"),
        ((0.70, 0.74), (0.80, 0.85), "The baseline is better"),
    ],
)
def test_judgement(interval: tuple[float, float], baseline: tuple[float, float], words: str) -> None:
    assert words in (judge(Gain("test", sum(interval) / 2, interval, sum(baseline) / 2, baseline)) or "")


def test_importance_finds_the_parameter_that_decides(searched: RunFolder) -> None:
    importance = measure_importance(read_run(searched))
    assert next(iter(importance.shares)) == "optim.lr"
    assert sum(importance.shares.values()) == pytest.approx(1)


def test_importance_says_why_it_is_missing(tmp_path: Path) -> None:
    folder = create_run(tmp_path / "run", trials=MIN_TRIALS)  # the baseline is one, another failed
    importance = measure_importance(read_run(folder))
    assert not importance.shares and f"{MIN_TRIALS - 2} searched trials" in importance.text
    assert importance.text in _Page(write_report(folder).read_text(encoding="utf-8")).text


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


# Markup


def test_texts_are_escaped_and_markup_is_not() -> None:
    assert element("p", "<b>", Html("<i>x</i>"), title='"&') == '<p title="&quot;&amp;">&lt;b&gt;<i>x</i></p>'
    assert join(["a<", Html("<br>")]) == "a&lt;<br>"
    assert plot_text("<b>&") == "&lt;b&gt;&amp;"
