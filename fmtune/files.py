"""Files that are read, wherever they lie, and places that are written to."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pyarrow as pa
from pyarrow import fs

from fmtune.errors import DataError, InputError

_DOWNLOAD_TIMEOUT = 30.0
"""Seconds without an answer after which a download is given up."""


@dataclass(frozen=True, slots=True)
class File:
    """A file on one of pyarrow's file systems; `place` is how the user knows it."""

    system: fs.FileSystem
    path: str
    place: str

    def open(self) -> IO[bytes]:
        """The decompressed content; compression is taken from the name's ending."""
        stream: IO[bytes] = self.system.open_input_stream(self.path)
        return stream

    @property
    def exists(self) -> bool:
        with readable(self):
            return bool(self.system.get_file_info(self.path).type == fs.FileType.File)

    @property
    def size(self) -> int:
        """Bytes, compressed if it is."""
        size: int = self.system.get_file_info(self.path).size
        return size


def is_url(place: str) -> bool:
    """Whether a place is a URL and no path."""
    return "://" in place


def check_writable(output: Path) -> None:
    """Refuse a path that no file can be written to.

    Raises:
        InputError: its folder is not there, it is a folder, or this user may not write there.
    """
    if not output.parent.is_dir():
        raise InputError(f"{output}: no folder {output.parent}; make it, or name one that exists")
    if output.is_dir():
        raise InputError(f"{output}: is a folder; expected a file's name")
    if not os.access(output.parent, os.W_OK):
        raise InputError(f"{output}: this user may not write to {output.parent}; choose another folder")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file aside and move it into place, so that no reader sees half of it."""
    aside = path.with_name(path.name + ".part")
    aside.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    aside.replace(path)


@contextmanager
def download_timeout() -> Iterator[None]:
    """Has downloads by libraries that wait for ever given up once there is no answer for a while."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


@contextmanager
def readable(file: File) -> Iterator[None]:
    """What the file system and decompression raise, as one of fmtune's errors."""
    try:
        yield
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{file.place}: can't be read ({error})") from None
