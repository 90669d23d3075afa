"""A tracker at work in a thread of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import ParamSpec

from fmtune.errors import first_line
from fmtune.trackers.tracker import Tracker

P = ParamSpec("P")


class Lane:
    """Calls a tracker, one call after the other, until one fails; `note` gets a sentence on that."""

    def __init__(self, tracker: Tracker, note: Callable[[str], None]) -> None:
        self.tracker = tracker
        self._note = note
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._failure: str | None = None
        self._has_told = False
        # A daemon: the end of the process does not wait for a server that gives no answer.
        self._thread = Thread(target=self._work, name=f"fmtune-{tracker.name}", daemon=True)
        self._thread.start()

    def tell(self, call: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        """Call this when all calls before it are done."""
        self._look()
        self._calls.put(partial(call, *args, **kwargs))

    def close(self, patience: float) -> None:
        """Wait so many seconds for the calls that are not done, and give up the others."""
        self._calls.put(None)
        self._thread.join(patience)
        if self._thread.is_alive():
            self._failure = f"no answer in {patience:.0f} s"
        self._look()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call()
            except Exception as error:  # whatever the tracker's library raises
                self._failure = first_line(error)
                return

    def _look(self) -> None:
        if self._failure is not None and not self._has_told:
            self._has_told = True
            self._note(f"{self.tracker.name}: {self._failure}; nothing more is logged there")
