"""What is drawn of a run under way, on terminals of several kinds."""

from __future__ import annotations

import io
import time
from itertools import pairwise

import pytest
from rich.console import Console

from fmtune.board import Board, Capacity, Flight
from fmtune.config import TrialConfig
from fmtune.run import TrialRecord
from fmtune.training import EpochMetrics
from fmtune.view import create_view, draw_board, draw_sparkline

EPOCHS = 12
ENDS = [(0, 0.75), (2, 0.61), (1, 0.8125), (4, 0.8), (5, 0.91), (3, 0.5)]
"""Trials in the order in which they ended, and their last accuracies."""


def _metrics(epoch: int, accuracy: float | None, rate: float = 1234.5) -> EpochMetrics:
    loss = None if accuracy is None else 1 - accuracy
    return EpochMetrics(epoch, 0.5, loss, accuracy, 0.01, rate, 2.0 * epoch)


def _create_board(in_flight: int = 2, metric: str = "val_accuracy") -> Board:
    """A search of 60 trials, a third of its 10 minutes over, of which six have ended and one more has failed."""
    now = time.monotonic()
    title = "default: fashion-mnist (downloaded), 54,000 training and 6,000 validation images"
    board = Board(title, 60, metric, metric == "val_accuracy", now - 200.5, now + 400.5, phase="searching")
    config = TrialConfig(epochs=EPOCHS)
    params = {"optim.name": "muon", "optim.lr": 0.0213, "model.width": 16, "optim.weight_decay": 0.0531}
    for number, accuracy in ENDS:
        history = [_metrics(epoch, accuracy - 0.01 * (EPOCHS - epoch)) for epoch in range(1, EPOCHS + 1)]
        state = "pruned" if number in (3, 4) else "complete"
        board.records[number] = TrialRecord(number, config, params if number else {}, state, history)
        board.ended.append(number)
    # It led when it died.
    board.records[6] = TrialRecord(6, config, params, "failed", [_metrics(1, 0.99)], cause="out of memory")
    board.ended.append(6)
    for number in range(7, 7 + in_flight):
        board.records[number] = TrialRecord(number, config, params, "running", [_metrics(3, 0.7)])
        board.in_flight[f"{number:05d}"] = Flight(f"trial {number}", EPOCHS, _metrics(3, 0.7))
    board.capacity = Capacity("CPUs", 64.0, 1.5)
    return board


def _draw(board: Board, width: int = 80, height: int = 24, encoding: str = "utf-8") -> list[str]:
    """The lines of the screen; a character that the terminal has not got is an error."""
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    console = Console(file=file, record=True, width=width, height=height, legacy_windows=False, color_system=None)
    console.print(draw_board(board, console))
    return console.export_text().splitlines()


def _line(lines: list[str], label: str) -> str:
    (line,) = (line for line in lines if line.startswith(f"{label} "))
    return line.removeprefix(label).strip()


def test_the_board_says_how_the_run_stands() -> None:
    """Every figure by hand: 200 of 601 seconds are a third of a bar of 24 columns, 7 of 60 trials nearly 3 of them."""
    lines = _draw(_create_board(), width=120)
    assert lines[0] == "default: fashion-mnist (downloaded), 54,000 training and 6,000 validation images"
    assert _line(lines, "time") == "━" * 8 + " " * 17 + "6:40 left, searching"
    trials = "━━╸" + " " * 22 + "7 of 60: 4 complete, 2 stopped early, 1 failed"
    assert _line(lines, "trials") == trials
    assert _line(lines, "CPUs").endswith("3 of 64 in use")
    assert _line(lines, "best") == "0.9100  trial 5  optim=muon lr=0.0213 width=16 weight_decay=0.0531"
    assert _line(lines, "baseline") == "0.7500  epoch 12 of 12"
    assert " ".join(_line(lines, "running").split()) == "trial 7 ━━╸ epoch 3 of 12 0.7000 1,234 images/s"
    assert lines[-1].strip() == "all 2 together 2,469 images/s"


def test_the_history_is_the_best_value_after_each_trial_in_the_order_of_their_ends() -> None:
    """0.75, 0.75, 0.8125, 0.8125, 0.91, 0.91: of 7 steps from 0.75 to 0.91, 0.8125 is the 3rd (2.73)."""
    assert _line(_draw(_create_board()), "history") == "▁▁▄▄██  0.7500 to 0.9100, best after each trial"


def test_the_history_of_a_loss_falls() -> None:
    """Losses are 1 less the accuracies; the failed trial's, the lowest of all, does not count."""
    lines = _draw(_create_board(metric="val_loss"))
    assert _line(lines, "history") == "██▅▅▁▁  0.0900 to 0.2500, best after each trial"
    assert _line(lines, "best").startswith("0.0900  trial 5")


def test_a_history_without_a_better_trial_says_so() -> None:
    """The fifth, which leads, ended first."""
    board = _create_board()
    board.ended.sort(key=lambda number: number != 5)
    assert _line(_draw(board), "history") == "▁▁▁▁▁▁  0.9100 since the first of 6"


def test_a_single_training_shows_its_epochs_and_no_baseline() -> None:
    now = time.monotonic()
    board = Board("one: sample", 1, "val_accuracy", True, now - 65, None, phase="training", has_baseline=False)
    history = [_metrics(1, 0.5), _metrics(2, 0.9), _metrics(3, 0.8)]
    board.records[0] = TrialRecord(0, TrialConfig(epochs=EPOCHS), {}, "running", history)
    board.in_flight["00000"] = Flight("trial 0", EPOCHS, history[-1])
    lines = _draw(board)
    assert _line(lines, "time") == "1:05 so far, training"
    assert _line(lines, "history") == "▁█▆  0.5000 to 0.9000, after each epoch"
    assert {line.split()[0] for line in lines} == {"one:", "time", "best", "history", "running"}


def test_a_refit_has_a_rate_and_no_value() -> None:
    """It is measured on nothing; it takes all CPUs."""
    board = _create_board(in_flight=0)
    board.in_flight["refit"] = Flight("refit", 6, _metrics(2, None))
    board.capacity = Capacity("CPUs", 2.0, 2.0)
    lines = _draw(board)
    assert " ".join(_line(lines, "running").split()) == "refit ━━━ epoch 2 of 6 - 1,234 images/s"
    assert _line(lines, "CPUs") == "━" * 16 + " 2 of 2 in use"


def test_a_run_that_has_just_begun_has_little_to_say() -> None:
    now = time.monotonic()
    board = Board("default: sample", 60, "val_accuracy", True, now, now + 600)
    lines = _draw(board)
    assert [line.split()[0] for line in lines] == ["default:", "time", "trials"]
    board.in_flight["00000"] = Flight("trial 0", 5)
    assert " ".join(_line(_draw(board), "running").split()) == "trial 0 epoch 0 of 5 -"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("in_flight", [1, 40])
@pytest.mark.parametrize("width", [80, 120])
def test_the_board_fits_its_terminal(width: int, in_flight: int, encoding: str) -> None:
    """No line is too long or wrapped, nothing is out of the terminal's alphabet, and 40 trainings fit in its height."""
    board = _create_board(in_flight)
    lines = _draw(board, width, 24, encoding)
    assert max(map(len, lines)) <= width
    assert len(lines) < 24
    assert "".join(lines).isascii() == (encoding == "ascii")
    labels = [line[:9].strip() for line in lines[1:]]
    expected = ["time", "trials", "CPUs", "best", "baseline", "history", "running"]
    assert labels[:7] == expected
    assert set(labels[7:]) <= {""}
    listed = sum("epoch 3 of 12" in line for line in lines)
    hidden = in_flight - listed
    assert listed == (1 if in_flight == 1 else 14)
    together = [line.strip() for line in lines if "together" in line]
    assert together == ([f"and {hidden} more; all 40 together 49,380 images/s"] if in_flight == 40 else [])
    # Nothing that a number stands in is cut off.
    assert sum(line.endswith("1,234 images/s") for line in lines) == listed
    assert _line(lines, "trials").endswith("7 of 60: 4 complete, 2 stopped early, 1 failed")


def test_a_high_terminal_lists_more_trainings() -> None:
    lines = _draw(_create_board(40), 120, 60)
    assert sum("epoch 3 of 12" in line for line in lines) == 40
    assert lines[-1].strip() == "all 40 together 49,380 images/s"


def test_the_sparkline_spans_lowest_to_highest() -> None:
    assert draw_sparkline([3.0, 1.0, 2.0], 10, "01234") == "402"
    assert draw_sparkline([0.5], 10, "01234") == "0"
    assert draw_sparkline([0.5, 0.5], 10, "01234") == "00"


def test_a_long_sparkline_shows_the_last_of_each_share() -> None:
    """100 rising values in 7 columns: the heights rise, and the last is the highest."""
    line = draw_sparkline([float(i) for i in range(100)], 7, "0123456789")
    heights = list(map(int, line))
    assert len(line) == 7
    # The shares end at 13, 27, 41, 56, 70, 84 and 99 of 99, which are 1.2, 2.5, 3.7, 5.1, 6.4, 7.6 and 9 ninths.
    assert heights == [1, 2, 4, 5, 6, 8, 9]
    assert all(low < high for low, high in pairwise(heights))


def test_a_terminal_has_the_board_while_it_lasts_and_keeps_what_is_noted() -> None:
    """In the end the board's lines are erased, and a failure, told above it, stays."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=100, height=24, legacy_windows=False)
    board = _create_board()
    with create_view(board, console) as view:
        view.on_end(board.records[1])
        view.on_end(board.records[6])
        shown = file.getvalue()
        assert "trial 7" in shown and "searching" in shown
        assert "out of memory" in shown
        assert "trial 1 complete" not in shown
        before = len(shown)
    erase = "\x1b[2K"
    assert file.getvalue()[before:].count(erase) >= 5
