"""Where Tune keeps its folder and a finished run lands: a folder that nodes share, or a prefix of object storage."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from pyarrow import fs

from fmtune.checkpoint import CHECKPOINT_FILES, load_metrics
from fmtune.errors import InputError, first_line
from fmtune.files import is_url
from fmtune.training import EpochMetrics


class Storage:
    """A folder by its path or URL, such as `s3://bucket/prefix`; credentials are the environment's.

    A place below it is a string in the same form: a path, or a URL with the query of this one.

    Attributes:
        place: its own.
    """

    def __init__(self, place: str) -> None:
        self._system, self._path = _locate(place)
        self.place = place if is_url(place) else self._path

    def place_of(self, path: str) -> str:
        """The place of a path in this storage's file system, such as `bucket/prefix/folder`."""
        if not is_url(self.place):
            return path
        host, _, rest = path.partition("/")
        return urlsplit(self.place)._replace(netloc=host, path=f"/{rest}").geturl()

    def below(self, name: str) -> Storage:
        """The folder of that name in this one."""
        return Storage(self.place_of(f"{self._path}/{name}"))

    def name_of(self, place: str) -> str:
        """The way from this folder to a place below it, by which `below` finds it wherever the folder has moved to."""
        return str(PurePosixPath(_locate(place)[1]).relative_to(self._path))

    def is_empty(self) -> bool:
        """Whether there is nothing in it, or no such folder."""
        return not self._system.get_file_info(fs.FileSelector(self._path, allow_not_found=True))

    def count(self, prefix: str) -> int:
        """Folders in it whose names begin so."""
        return len(self._folders(prefix))

    def list_trials(self, prefix: str) -> dict[str, list[str]]:
        """Where Tune has kept each trial: folders by the name of the trial, which may have several.

        Args:
            prefix: what the names of the experiments begin with that are looked through.
        """
        found: dict[str, list[str]] = {}
        for experiment in self._folders(prefix):
            for info in self._system.get_file_info(fs.FileSelector(experiment)):
                # What follows a hyphen tells parts of a trial.
                found.setdefault(info.base_name.partition("-")[0], []).append(info.path)
        return found

    def find_checkpoint(self, folders: Sequence[str], last: int | None = None) -> tuple[str, EpochMetrics] | None:
        """The newest whole checkpoint in a trial's folders, of no epoch after `last`, and its epoch's metrics."""
        found: list[fs.FileInfo] = []
        for folder in folders:
            below = fs.FileSelector(folder, allow_not_found=True, recursive=True)
            found += [info for info in self._system.get_file_info(below) if _is_of_checkpoint(info.path)]
        # A store's times are whole seconds, in which there may be several; Tune numbers checkpoints in their order.
        for info in sorted(found, key=lambda info: (info.mtime_ns, info.path), reverse=True):
            folder = str(PurePosixPath(info.path).parent)
            metrics = self._read_metrics(folder)
            if metrics is not None and (last is None or metrics.epoch <= last):
                return self.place_of(folder), metrics
        return None

    def _read_metrics(self, checkpoint: str) -> EpochMetrics | None:
        """The metrics of a checkpoint by its path, None of one that is not whole."""
        if isinstance(self._system, fs.LocalFileSystem):
            return load_metrics(Path(checkpoint))
        # An object in a store is whole or absent, so that the weights, which may take long, need not be fetched.
        there = {info.base_name for info in self._system.get_file_info(fs.FileSelector(checkpoint))}
        if not there.issuperset(CHECKPOINT_FILES):
            return None
        with self._system.open_input_file(f"{checkpoint}/metrics.json") as file:
            return EpochMetrics(**json.loads(file.read()))

    def keep(self, folder: Path) -> None:
        """Copy a folder's files into this one."""
        fs.copy_files(
            str(folder.resolve()),
            self._path,
            source_filesystem=fs.LocalFileSystem(),
            destination_filesystem=self._system,
        )

    def _folders(self, prefix: str) -> list[str]:
        inside = self._system.get_file_info(fs.FileSelector(self._path, allow_not_found=True))
        return [info.path for info in inside if info.base_name.startswith(prefix) and info.type != fs.FileType.File]


def check_storage(place: str) -> None:
    """Find out whether a place can be written to.

    Raises:
        InputError: it can't, or there is no such place.
    """
    try:
        system, path = _locate(place)
        system.create_dir(path)
        with system.open_output_stream(f"{path}/.fmtune") as stream:
            stream.write(b"")
        system.delete_file(f"{path}/.fmtune")
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise InputError(f"storage: {place}: can't be written to ({reason}); mend the place, or the access") from None


@contextmanager
def fetch(place: str) -> Iterator[Path]:
    """A folder's files on this machine: where they are, or as a copy that is removed again."""
    if not is_url(place):
        yield Path(place)
        return
    system, path = _locate(place)
    with tempfile.TemporaryDirectory() as folder:
        fs.copy_files(path, folder, source_filesystem=system, destination_filesystem=fs.LocalFileSystem())
        yield Path(folder)


def _locate(place: str) -> tuple[fs.FileSystem, str]:
    """The file system that a path or URL is in, and its path there."""
    return fs.FileSystem.from_uri(place) if is_url(place) else (fs.LocalFileSystem(), str(Path(place).resolve()))


def _is_of_checkpoint(path: str) -> bool:
    """Whether it is the file of a checkpoint by which that is found."""
    _, parent, name = ("", *PurePosixPath(path).parts)[-3:]
    return name == "metrics.json" and parent.startswith("checkpoint_")
