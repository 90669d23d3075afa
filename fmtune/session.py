"""The engine room: Ray started and stopped, and its chatter kept off the screen."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import FrameType

# Read by Ray when it is started, or a Tuner. Tune's own handler of Ctrl-C writes a snapshot that fmtune has no use for
# and takes long; a plain KeyboardInterrupt ends the run in seconds.
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS", "0")

import optuna
import ray
from rich.console import Console

from fmtune.config import ResourcesConfig
from fmtune.errors import RunFailed


@contextmanager
def quiet(log: Path) -> Iterator[Console]:
    """Send all that this process and its libraries print to a file; yields a console on the real screen.

    Ray's C++ parts write to the file descriptors themselves, so it is these that are turned aside; `sys.stdout` too,
    which in a notebook is no file descriptor.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    screen, errors = os.dup(1), os.dup(2)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.captureWarnings(True)
    with log.open("a", encoding="utf-8") as file, os.fdopen(screen, "w", encoding="utf-8") as stream:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            with redirect_stdout(file), redirect_stderr(file):
                yield Console(file=stream)
        finally:
            stream.flush()
            file.flush()
            os.dup2(screen, 1)
            os.dup2(errors, 2)
            os.close(errors)
            logging.captureWarnings(False)


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
def ray_session(resources: ResourcesConfig, address: str | None) -> Iterator[None]:
    """A Ray that is running: the caller's, the cluster at `address`, or one of this machine alone.

    Raises:
        RunFailed: the cluster can't be reached.
    """
    if ray.is_initialized():
        yield
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
