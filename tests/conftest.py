"""One Ray for the whole session, and a cache of the session's own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from fmtune.run import RunFolder


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """No test reads or fills the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["FMTUNE_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The folder of a search, its report written."""
    from runs import create_run

    from fmtune.report import write_report

    folder = create_run(tmp_path_factory.mktemp("runs") / "default")
    write_report(folder)
    return folder


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A Ray of this machine for all tests that search: it takes seconds to start."""
    import ray

    from fmtune.config import ResourcesConfig
    from fmtune.session import ray_session

    with ray_session(ResourcesConfig(), None):
        yield
    assert not ray.is_initialized()
