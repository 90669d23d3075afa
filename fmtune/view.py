"""What a person sees while a run is under way: a live board on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fmtune.config import Scalar
from fmtune.run import TrialRecord

_REFRESH_SECONDS = 0.5
_SHOWN_RUNNING = 8
"""Running trials that the board lists; a cluster may have hundreds."""


@dataclass
class Board:
    """The state of a run that views draw.

    Attributes:
        title: what runs, on what data, into which folder.
        trials: how many the search may start.
        metric: what decides, and whether `larger` is better.
        started: `time.monotonic()` of the command's start, less the time of earlier attempts.
        deadline: `time.monotonic()` by which it must end, None without a limit.
        has_baseline: whether trial 0 is one.
    """

    title: str
    trials: int
    metric: str
    larger: bool
    started: float
    deadline: float | None
    phase: str = "starting"
    records: dict[int, TrialRecord] = field(default_factory=dict)
    has_baseline: bool = True

    def value(self, record: TrialRecord) -> float | None:
        """The deciding metric after the trial's last epoch."""
        last = record.last
        return None if last is None else last.as_dict()[self.metric]

    @property
    def best(self) -> TrialRecord | None:
        """The leader so far."""
        measured = [
            (value, -r.number, r)
            for r in list(self.records.values())
            if r.state != "failed" and (value := self.value(r)) is not None
        ]
        if not measured:
            return None
        if not self.larger:
            measured = [(-value, order, record) for value, order, record in measured]
        return max(measured)[2]

    def count(self, state: str) -> int:
        return sum(record.state == state for record in list(self.records.values()))

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started

    @property
    def left(self) -> float | None:
        """Seconds to the deadline."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())


class View(Protocol):
    """Shows a board; a context manager that is open while the run is under way."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None: ...

    def note(self, line: str) -> None:
        """A sentence to keep on the screen."""

    def on_end(self, record: TrialRecord) -> None:
        """A trial has ended."""

    def refresh(self) -> None:
        """The board may have changed."""


def create_view(board: Board, console: Console) -> View:
    return _LiveView(board, console) if console.is_terminal else _LineView(board, console)


class _LineView:
    """One plain line for each trial that ends, for logs and pipes."""

    def __init__(self, board: Board, console: Console) -> None:
        self._board, self._console = board, console

    def __enter__(self) -> Self:
        self.note(self._board.title)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        pass

    def note(self, line: str) -> None:
        _print(self._console, f"[{format_seconds(self._board.elapsed)}] {line}")

    def on_end(self, record: TrialRecord) -> None:
        best = self._board.best
        value = best and self._board.value(best)
        leader = f"; best {value:.4f}, trial {best.number}" if best and value is not None else ""
        self.note(f"{describe_end(record, self._board)}{leader}")

    def refresh(self) -> None:
        pass


class _LiveView:
    """A board that is redrawn in place."""

    def __init__(self, board: Board, console: Console) -> None:
        self._board, self._console = board, console
        self._live = Live(
            console=console,
            get_renderable=self._draw,
            refresh_per_second=1 / _REFRESH_SECONDS,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._live.stop()

    def note(self, line: str) -> None:
        _print(self._console, line)

    def on_end(self, record: TrialRecord) -> None:
        if record.state == "failed":
            self.note(describe_end(record, self._board))

    def refresh(self) -> None:
        pass  # the live display redraws by itself

    def _draw(self) -> RenderableType:
        board = self._board
        lines: list[RenderableType] = [Text(board.title, style="bold"), self._draw_time(), self._draw_counts()]
        if (best := board.best) is not None:
            lines.append(_label("best", f"{_value(board, best)}  trial {best.number}  {describe_params(best)}"))
        if board.has_baseline and (baseline := board.records.get(0)) is not None:
            lines.append(
                _label(
                    "baseline", f"{_value(board, baseline)}  epoch {len(baseline.history)} of {baseline.config.epochs}"
                )
            )
        return Group(*lines, self._draw_running())

    def _draw_time(self) -> RenderableType:
        board, row = self._board, Table.grid(padding=(0, 1))
        if board.left is None or board.deadline is None:
            row.add_row(_label("time", f"{format_seconds(board.elapsed)}  {board.phase}"))
        else:
            total = board.deadline - board.started
            bar = ProgressBar(total=total, completed=board.elapsed, width=30)
            row.add_row(_label("time", ""), bar, Text(f"{format_seconds(board.left)} left  {board.phase}"))
        return row

    def _draw_counts(self) -> RenderableType:
        board, row = self._board, Table.grid(padding=(0, 1))
        ended = len(board.records) - board.count("running")
        bar = ProgressBar(total=board.trials, completed=ended, width=30)
        counts = f"{ended} of {board.trials}: {board.count('complete')} complete, {board.count('pruned')} stopped early"
        if board.count("failed"):
            counts += f", {board.count('failed')} failed"
        row.add_row(_label("trials", ""), bar, Text(counts))
        return row

    def _draw_running(self) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        running = [record for record in list(self._board.records.values()) if record.state == "running"]
        for record in running[:_SHOWN_RUNNING]:
            rate = f"{record.last.images_per_second:,.0f} images/s" if record.last else ""
            progress = f"epoch {len(record.history)} of {record.config.epochs}"
            table.add_row(_label("running", f"trial {record.number}"), progress, _value(self._board, record), rate)
        if len(running) > _SHOWN_RUNNING:
            table.add_row(f"and {len(running) - _SHOWN_RUNNING} more")
        return table


def describe_end(record: TrialRecord, board: Board) -> str:
    """How a trial ended, in one line."""
    what = f"trial {record.number}"
    if record.number == 0 and board.has_baseline:
        what += " (baseline)"
    if record.state == "failed":
        return f"{what} failed: {record.cause}"
    done = f"{len(record.history)} of {record.config.epochs} epochs"
    how = "complete" if record.state == "complete" else f"stopped after {done}"
    return f"{what} {how}: {board.metric} {_value(board, record)}  {describe_params(record)}".rstrip()


def describe_params(record: TrialRecord) -> str:
    """A trial's searched values in few words."""
    return describe_values(record.params)


def describe_values(params: Mapping[str, Scalar]) -> str:
    """Searched values by dotted key in few words: the last part of each key, numbers to three digits."""
    shown = {"optim" if key == "optim.name" else key.rpartition(".")[2]: value for key, value in params.items()}
    return " ".join(
        f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}" for name, value in shown.items()
    )


def format_seconds(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _value(board: Board, record: TrialRecord) -> str:
    value = board.value(record)
    return "-" if value is None else f"{value:.4f}"


def _label(name: str, text: str) -> Text:
    return Text.assemble((f"{name:<9}", "dim"), text)


def _print(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
