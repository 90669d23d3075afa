"""What a person sees while a run is under way: a live board on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fmtune.board import Board, Flight
from fmtune.config import Scalar
from fmtune.run import TrialRecord

_REFRESH_SECONDS = 0.5
_LABEL_WIDTH = 9
"""Columns of the words at the left edge."""
_BAR_SHARE = 5
"""A bar takes one column in this many."""
_CURVE_SHARE = 3
"""The curve takes one column in this many."""
_FLIGHT_BAR = 10
"""Columns of the bar of one training."""
_LEAST_FLIGHTS = 4
"""Trainings that are listed on the lowest of terminals; a cluster may have hundreds under way."""
_OTHER_LINES = 10
"""Lines of the board beside those of the trainings."""
_BLOCKS = "▁▂▃▄▅▆▇█"
_ASCII_BLOCKS = "_.:-=+*#"


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
        print_plain(self._console, f"[{format_seconds(self._board.elapsed)}] {line}")

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
            get_renderable=lambda: draw_board(board, console),
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
        print_plain(self._console, line)

    def on_end(self, record: TrialRecord) -> None:
        if record.state == "failed":
            self.note(describe_end(record, self._board))

    def refresh(self) -> None:
        pass  # the live display redraws by itself


def draw_board(board: Board, console: Console) -> RenderableType:
    """The board as a terminal shows it.

    No line is wider than the console, as many trainings are listed as its height has room for, and where it has no
    unicode every character is of ASCII.
    """
    title = _fit(Text(board.title, style="bold"), console)
    lines = [_fit(_label(name, text), console) for name, text in _describe(board, console)]
    return Group(title, _draw_bars(board, console), *lines, *_draw_flights(board, console))


def _draw_bars(board: Board, console: Console) -> Table:
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(width=_LABEL_WIDTH - 1)
    grid.add_column(width=console.width // _BAR_SHARE)
    grid.add_column()
    for name, done, total, text in _measure(board):
        grid.add_row(_word(name), _bar(done, total), _fit(Text(text), console))
    return grid


def _measure(board: Board) -> Iterator[tuple[str, float, float, str]]:
    """What a bar can show: its name, how much is done of how much, and the same in words."""
    if board.left is not None and board.deadline is not None:
        yield "time", board.elapsed, board.deadline - board.started, f"{format_seconds(board.left)} left, {board.phase}"
    if board.has_baseline:
        counts = f"{board.count('complete')} complete, {board.count('pruned')} stopped early"
        if failed := board.count("failed"):
            counts += f", {failed} failed"
        ended = len(board.ended)
        yield "trials", ended, board.trials, f"{ended} of {board.trials}: {counts}"
    capacity, trainings = board.capacity, len(board.in_flight)
    if capacity is not None and trainings:
        used = trainings * capacity.each
        yield capacity.unit, used, capacity.total, f"{used:g} of {capacity.total:g} in use"


def _describe(board: Board, console: Console) -> Iterator[tuple[str, Text]]:
    """What can be said in a line: its name, and the words."""
    if board.left is None:
        yield "time", Text(f"{format_seconds(board.elapsed)} so far, {board.phase}")
    if (best := board.best) is not None:
        found = f"  trial {best.number}  {describe_params(best)}"
        yield "best", Text.assemble((_value(board, best), "bold green"), found)
    if (baseline := board.baseline) is not None:
        epochs = f"epoch {len(baseline.history)} of {baseline.config.epochs}"
        yield "baseline", Text(f"{_value(board, baseline)}  {epochs}")
    if len(curve := board.curve) > 1:
        line = draw_sparkline(curve, console.width // _CURVE_SHARE, _ASCII_BLOCKS if _is_plain(console) else _BLOCKS)
        low, high = min(curve), max(curve)
        of_what = "best after each trial" if board.has_baseline else "after each epoch"
        said = f"{low:.4f} to {high:.4f}, {of_what}" if low < high else f"{high:.4f} since the first of {len(curve)}"
        yield "history", Text.assemble((line, "cyan"), f"  {said}")


def draw_sparkline(values: Sequence[float], width: int, blocks: str) -> str:
    """Values as a line of blocks: the first of `blocks` stands for the lowest of them, the last for the highest.

    Of more values than `width` columns each column shows the last of its share.
    """
    columns = min(width, len(values))
    shown = [values[(i + 1) * len(values) // columns - 1] for i in range(columns)]
    low, high = min(values), max(values)
    # Of equal values each is the lowest.
    scale = (len(blocks) - 1) / (high - low or 1.0)
    return "".join(blocks[round((value - low) * scale)] for value in shown)


def _draw_flights(board: Board, console: Console) -> Iterator[RenderableType]:
    """A row for each training under way that there is room for, and what they do together."""
    flights = list(board.in_flight.values())
    shown = flights[: max(_LEAST_FLIGHTS, console.height - _OTHER_LINES)]
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(width=_LABEL_WIDTH - 2)
    grid.add_column()
    grid.add_column(width=_FLIGHT_BAR)
    for justify in ("left", "right", "right"):
        grid.add_column(justify=justify, no_wrap=True)
    for i, flight in enumerate(shown):
        grid.add_row(_word("" if i else "running"), *_describe_flight(flight, board, console))
    yield grid
    if len(flights) > 1:
        rate = sum(flight.last.images_per_second for flight in flights if flight.last)
        hidden = f"and {len(flights) - len(shown)} more; " if len(flights) > len(shown) else ""
        yield _fit(_label("", Text(f"{hidden}all {len(flights)} together {rate:,.0f} images/s")), console)


def _describe_flight(flight: Flight, board: Board, console: Console) -> list[RenderableType]:
    last = flight.last
    epochs = last.epoch if last else 0
    value = last.as_dict()[board.metric] if last else None
    return [
        _fit(Text(flight.name), console),
        _bar(epochs, flight.epochs),
        f"epoch {epochs} of {flight.epochs}",
        "-" if value is None else f"{value:.4f}",
        f"{last.images_per_second:,.0f} images/s" if last else "",
    ]


def _bar(done: float, total: float) -> ProgressBar:
    return ProgressBar(total=total, completed=done, complete_style="cyan", finished_style="green")


def _is_plain(console: Console) -> bool:
    """Whether the terminal shows ASCII alone, as rich's own bars decide it."""
    return console.options.legacy_windows or console.options.ascii_only


def _fit(text: Text, console: Console) -> Text:
    """The text on one line, cut off where the line ends."""
    text.no_wrap = True
    text.overflow = "crop" if _is_plain(console) else "ellipsis"
    return text


def describe_end(record: TrialRecord, board: Board) -> str:
    """How a trial ended, in one line."""
    what = f"trial {record.number}"
    if record is board.baseline:
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


def _word(name: str) -> Text:
    return Text(name, style="dim")


def _label(name: str, text: Text) -> Text:
    return Text.assemble((f"{name:<{_LABEL_WIDTH}}", "dim"), text)


def print_plain(console: Console, line: str) -> None:
    """Print a line as it is: no markup, no colours, and not broken where the screen ends."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)
