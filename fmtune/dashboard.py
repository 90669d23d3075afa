"""optuna-dashboard over the study of a run, finished or under way."""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import suppress
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import optuna

from fmtune.errors import InputError, RunFolderError
from fmtune.extras import import_extra
from fmtune.run import RunFolder
from fmtune.space import Space
from fmtune.study import open_database, reaching

_HOST = "127.0.0.1"


class _Server(ThreadingMixIn, WSGIServer):
    """Answers several requests at a time, as the page asks for them."""

    daemon_threads = True


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a line for each request would bury the address."""


def create_dashboard(folder: RunFolder, port: int) -> WSGIServer:
    """A server on this machine's own address, ready to serve the page; port 0 takes a free one.

    Raises:
        InputError: the run has no study yet, its database can't be reached, optuna-dashboard is not installed, or the
            port can't be had.
    """
    dashboard = import_extra("dashboard", "optuna_dashboard", "optuna-dashboard", "dashboard")
    # Read-only, so that no click on the page changes or deletes the study of a run.
    if folder.study.exists():
        storage = optuna.storages.RDBStorage(f"sqlite:///file:{folder.study.resolve()}?mode=ro&uri=true")
    elif (url := Space.load(folder.space).search.storage) is not None:
        with reaching(url):
            storage = open_database(url, is_read_only=True)
    else:
        raise RunFolderError(f"{folder.path}: no study.db yet; a run makes it with its first trial")
    try:
        return make_server(_HOST, port, dashboard.wsgi(storage), server_class=_Server, handler_class=_Handler)
    except OSError as error:
        reason = "in use" if error.errno == errno.EADDRINUSE else error.strerror
        raise InputError(f"--port {port}: {reason}; give another, or 0 for a free one") from None


def serve_dashboard(folder: RunFolder, port: int, say: Callable[[str], None]) -> None:
    """Serve the page until Ctrl-C; `say` gets its address. Errors are those of `create_dashboard`."""
    with create_dashboard(folder, port) as server, suppress(KeyboardInterrupt):
        say(f"http://{_HOST}:{server.server_port}/ shows {folder.path}; Ctrl-C ends it")
        server.serve_forever()
