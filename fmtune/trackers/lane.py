"""A tracker at work in a thread of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import ParamSpec

from fmtune.trackers.tracker import Tracker

_CLOSING_SECONDS = 30.0
"""How long the end of a run waits for what has not arrived."""
P = ParamSpec("P")


class Lane:
    """Calls a tracker, one call after the other, until one fails; `note` gets a sentence on that."""

    def __init__(self, tracker: Tracker, note: Callable[[str], None]) -> None:
        self.tracker = tracker
        self._note = note
        self._thread = ThreadPoolExecutor(1, f"fmtune-{tracker.name}")
        self._pending: deque[Future[None]] = deque()
        self._has_failed = False

    def tell(self, call: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        """Call this when all calls before it are done."""
        self._look()
        if not self._has_failed:
            self._pending.append(self._thread.submit(call, *args, **kwargs))

    def close(self) -> None:
        """Wait for the calls that are not done, and give up those that take too long."""
        wait(self._pending, timeout=_CLOSING_SECONDS)
        self._look()
        if self._pending:
            self._give_up(f"no answer in {_CLOSING_SECONDS:.0f} s")
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _look(self) -> None:
        while self._pending and self._pending[0].done():
            error = self._pending.popleft().exception()
            if error is not None:
                self._give_up((str(error).strip() or type(error).__name__).splitlines()[0])

    def _give_up(self, reason: str) -> None:
        self._has_failed = True
        self._pending.clear()
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._note(f"{self.tracker.name}: {reason}; nothing more is logged there")
