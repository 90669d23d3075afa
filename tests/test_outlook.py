from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from fmtune.board import Board
from fmtune.config import SearchConfig, TrialConfig
from fmtune.outlook import MIN_VALUES, _expected_best, describe_outlook, look_ahead, project_error
from fmtune.run import TrialRecord
from fmtune.summary import _look_ahead
from fmtune.training import EpochMetrics

STUDIES = 300


def _draw(kind: str, trials: int, random: np.random.Generator) -> list[float]:
    """Independent values of which no sampler could learn anything."""
    match kind:
        case "uniform":
            values = random.uniform(0.5, 0.9, trials)
        case "triangular":  # thin toward its end, as accuracies are
            values = 0.9 - 0.4 * (1 - np.sqrt(random.uniform(0, 1, trials)))
        case _:
            values = random.normal(0.8, 0.02, trials)
    return [float(value) for value in values]


@pytest.mark.parametrize("trials", [24, 60])
@pytest.mark.parametrize("kind", ["uniform", "triangular", "normal"])
def test_mean_outlook_of_synthetic_studies_is_the_mean_gain_of_doubling_them(kind: str, trials: int) -> None:
    """Against what as many draws again did bring, over 300 studies: right to within a factor of two."""
    random = np.random.default_rng(0)
    expected, found = [], []
    for _ in range(STUDIES):
        values, more = _draw(kind, trials, random), _draw(kind, trials, random)
        outlook = look_ahead(values, limit=1.0)
        assert outlook is not None
        found.append(outlook.gain)
        expected.append(max(0.0, max(more) - max(values)))
    assert 1 / 2 < np.mean(found) / np.mean(expected) < 2


def test_interval_holds_the_mean_gain_more_often_than_not() -> None:
    """The expectation is one number for a distribution; intervals from 24 trials each should mostly have it."""
    random = np.random.default_rng(1)
    truth = np.mean(
        [max(0.0, max(_draw("normal", 24, random)) - max(_draw("normal", 24, random))) for _ in range(4000)]
    )
    outlooks = [look_ahead(_draw("normal", 24, random), limit=1.0) for _ in range(200)]
    assert np.mean([o is not None and o.low <= truth <= o.high for o in outlooks]) > 0.6


def test_a_search_that_has_come_to_its_end_has_little_to_gain() -> None:
    """Where the later half of the trials is level at the best, as many again bring next to nothing."""
    climbing = [0.5 + 0.01 * i for i in range(30)]
    level = [0.8 + 1e-4 * (i % 5) for i in range(30)]
    outlook = look_ahead(climbing + level, limit=1.0)
    assert outlook is not None
    assert outlook.gain < 1e-3
    assert outlook.trials == 60


def test_no_gain_goes_beyond_the_limit() -> None:
    random = np.random.default_rng(2)
    values = [float(v) for v in np.minimum(random.normal(0.97, 0.03, 40), 0.999)]
    outlook = look_ahead(values, limit=1.0)
    assert outlook is not None
    assert outlook.gain <= outlook.high <= 1.0 - max(values)


def test_equal_values_promise_nothing() -> None:
    outlook = look_ahead([0.7] * 40, limit=1.0)
    assert outlook is not None
    assert outlook.gain == outlook.high == 0.0


def test_few_trials_have_no_outlook() -> None:
    assert look_ahead([0.1 * i for i in range(MIN_VALUES - 1)], limit=10.0) is None
    assert look_ahead([0.1 * i for i in range(MIN_VALUES)], limit=10.0) is not None


def test_expected_best_is_the_mean_over_all_choices() -> None:
    """Against counting them."""
    values = np.array([0.3, 0.9, 0.1, 0.4, 0.8, 0.4])
    for k in range(1, 7):
        counted = np.mean([max(chosen) for chosen in combinations(values, k)])
        assert _expected_best(values, k) == pytest.approx(counted)


@pytest.mark.parametrize(
    ("metric", "words"),
    [("val_accuracy", "add about 0.42 points of validation accuracy"), ("val_loss", "take about 0.0042 off the")],
)
def test_outlook_is_said_in_the_metrics_own_unit(metric: str, words: str) -> None:
    said = describe_outlook({"metric": metric, "gain": 0.0042, "low": 0.0, "high": 0.01, "trials": 30})
    assert said.startswith("30 more trials would ") and words in said


def test_what_is_ahead_of_all_draws_leaves_less_to_gain() -> None:
    """A configuration to start with may be better than anything that is drawn for a long time."""
    values = _draw("normal", 40, np.random.default_rng(3))
    alone = look_ahead(values, limit=1.0)
    near, far = (look_ahead(values, limit=1.0, best=max(values) + ahead) for ahead in (0.002, 0.5))
    assert alone is not None and near is not None and far is not None
    assert near.gain == pytest.approx(alone.gain - 0.002)
    assert far.gain == far.high == 0.0


def test_a_stopped_training_is_projected_by_those_that_went_on() -> None:
    """After two epochs others halved their error, or brought it to a third, until the end: the median of both."""
    whole = [[0.5, 0.4, 0.3, 0.2], [0.6, 0.3, 0.2, 0.1]]
    assert project_error([0.4, 0.24], whole) == pytest.approx(0.24 * (1 / 2 + 1 / 3) / 2)
    assert project_error([0.4, 0.24], []) == 0.24
    assert project_error([0.5, 0.4, 0.3, 0.2], whole) == pytest.approx(0.2)


def _create_trials(accuracies: list[float]) -> Board:
    board = Board("", 99, "val_accuracy", True, started=0.0, deadline=None)
    for number, accuracy in enumerate(accuracies):
        history = [EpochMetrics(1, 0.5, 0.5, accuracy, 0.01, 100.0, 1.0)]
        board.records[number] = TrialRecord(number, TrialConfig(epochs=1), {}, "complete", history)
    return board


def test_a_baseline_that_leads_is_what_there_is_to_gain_on() -> None:
    drawn = [float(value) for value in np.random.default_rng(0).normal(0.8, 0.02, 40)]
    behind, ahead = (_look_ahead(_create_trials([first, *drawn]), SearchConfig()) for first in (0.5, 0.95))
    assert behind is not None and ahead is not None
    assert behind["gain"] > 0.001
    assert ahead["gain"] == 0
    assert behind["trials"] == ahead["trials"] == 40


def test_a_grid_has_no_more_trials_to_look_ahead_to() -> None:
    board = _create_trials([0.01 * value for value in range(40)])
    assert _look_ahead(board, SearchConfig()) is not None
    assert _look_ahead(board, SearchConfig(sampler="grid")) is None
