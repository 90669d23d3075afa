"""The engine room: Ray started and stopped, and its chatter kept off the screen."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import TextIO

# Read by Ray when it is started, or a Tuner. Tune's own handler of Ctrl-C writes a snapshot that fmtune has no use for
# and takes long; a plain KeyboardInterrupt ends the run in seconds. Of its loggers fmtune names those that it wants.
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
# A turn of writing the state of all trials, and of copying what the driver has written of them; every ten seconds else.
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "30")
os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS", "0")
# By default a process that has nothing to do is ended after a second where there are more of them than CPUs: in a long
# prediction those that read were started anew all the time, two seconds of a CPU for each.
os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "60000")

import optuna
import ray
from rich.console import Console

from fmtune.config import ResourcesConfig
from fmtune.errors import RunFailed


class Screen:
    """The real screen, while all that libraries print is turned aside.

    Attributes:
        console: writes on the screen, in the screen's own encoding.
    """

    def __init__(self, console: Console, aside: int) -> None:
        self.console = console
        self._aside = aside

    def log_to(self, log: Path) -> None:
        """Append to a file what has been turned aside so far, and all that will be."""
        with log.open("ab", buffering=0) as file:
            file.write(os.pread(self._aside, os.fstat(self._aside).st_size, 0))
            _turn_aside(file.fileno())


@contextmanager
def quiet() -> Iterator[Screen]:
    """Keep all that this process and its libraries print off the screen; without a log it is thrown away.

    Ray's C++ parts write to the file descriptors themselves, so it is these that are turned aside; `sys.stdout` too,
    which in a notebook is no file descriptor.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    screen, errors, shown = os.dup(1), os.dup(2), sys.stdout
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.captureWarnings(True)
    with (
        tempfile.TemporaryFile() as aside,
        os.fdopen(screen, "w", encoding=sys.stdout.encoding, errors="replace") as stream,
        open(1, "w", encoding="utf-8", buffering=1, closefd=False) as printed,
    ):
        _turn_aside(aside.fileno())
        try:
            with redirect_stdout(printed), redirect_stderr(printed), _handlers_on(printed):
                yield Screen(_create_console(stream, shown), aside.fileno())
        finally:
            stream.flush()
            printed.flush()
            os.dup2(screen, 1)
            os.dup2(errors, 2)
            os.close(errors)
            logging.captureWarnings(False)


def _turn_aside(file: int) -> None:
    """Let what is written to standard output and standard error go to an open file."""
    os.dup2(file, 1)
    os.dup2(file, 2)


def _create_console(screen: TextIO, shown: TextIO) -> Console:
    """A console on the screen, or on what stands in for `sys.stdout` in a notebook.

    That is shown where the file descriptor is not. It calls itself a terminal but redraws nothing in place.
    """
    if shown is sys.__stdout__:
        return Console(file=screen)
    return Console(file=shown, force_terminal=False, force_jupyter=False)


@contextmanager
def _handlers_on(file: TextIO) -> Iterator[None]:
    """Let Ray's handlers of log records write to a file: each holds the stream that it was made on."""
    found = {handler for name in ("ray", "ray.data") for handler in logging.getLogger(name).handlers}
    turned = [handler for handler in found if isinstance(handler, logging.StreamHandler)]
    streams = [handler.setStream(file) for handler in turned]
    try:
        yield
    finally:
        for handler, stream in zip(turned, streams, strict=True):
            handler.setStream(stream)


@contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Ctrl-C raises KeyboardInterrupt at once, and again wherever the function that this yields is called.

    One that strikes inside of a callback of Ray's compiled parts is printed there and lost.
    """
    requested = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal requested
        requested = True
        raise KeyboardInterrupt

    def check() -> None:
        if requested:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        # Only the main thread may set handlers, and it alone is interrupted.
        yield check
        return
    previous = signal.signal(signal.SIGINT, interrupt)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def ray_session(resources: ResourcesConfig, address: str | None, note: Callable[[str], None] = print) -> Iterator[None]:
    """A Ray that is running: the caller's, the cluster at `address`, or one of this machine alone.

    The caller's is used as it is and left running, which `note` is told.

    Raises:
        RunFailed: the cluster can't be reached.
    """
    if ray.is_initialized():
        note(_describe_running(address))
        logger = logging.getLogger("ray")
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
        return
    try:
        if address is None:
            # Ray Train asks the state API, a part of the dashboard, to clean up after workers that were stopped.
            ray.init(
                address="local",
                include_dashboard=resources.workers > 1,
                dashboard_host="127.0.0.1",
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        else:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, TimeoutError, ValueError, RuntimeError) as error:
        place = f"no Ray cluster at {address}" if address else "Ray can't be started here"
        raise RunFailed(f"{place}: {error}") from None
    try:
        yield
    finally:
        ray.shutdown()


def _describe_running(address: str | None) -> str:
    free, total = (resources.get("CPU", 0) for resources in (ray.available_resources(), ray.cluster_resources()))
    passed_over = f" in place of {address}" if address is not None else ""
    what = f"this process has a Ray already, which is used{passed_over} and left running"
    return f"{what}: {free:g} of {total:g} CPUs free"
