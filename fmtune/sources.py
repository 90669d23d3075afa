"""The files that a source names."""

from __future__ import annotations

import fnmatch
import glob
import os
from pathlib import PurePosixPath
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs

from fmtune.datasets import NAMES
from fmtune.errors import DataError
from fmtune.files import File, is_url


def find_files(source: str) -> list[File]:
    """The files that a path, glob or URL names, in the order of their names.

    Raises:
        DataError: there are none.
    """
    if is_url(source):
        return _find_remote_files(source)
    # A file may have in its name what would make a glob of it.
    is_glob = glob.has_magic(source) and not os.path.isfile(source)
    paths = sorted(glob.glob(source, recursive=True)) if is_glob else [source]
    files = [path for path in paths if os.path.isfile(path)]
    if not files:
        if os.path.isdir(source):
            raise DataError(f"{source}: is a folder; expected a file, or a glob such as {source.rstrip('/')}/*.csv")
        near = f"; known names are {', '.join(NAMES)}" if "/" not in source and "." not in source else ""
        raise DataError(f"{source}: no such file{near}")
    return [File(fs.LocalFileSystem(), os.path.abspath(path), path) for path in files]


def open_place(place: str) -> File:
    """The file at a path or URL, which need not be there yet.

    Raises:
        DataError: the URL is of no file system, or it can't be reached.
    """
    if not is_url(place):
        return File(fs.LocalFileSystem(), os.path.abspath(place), place)
    try:
        system, path = fs.FileSystem.from_uri(place)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{place}: can't be reached ({error})") from None
    return File(system, path, place)


def _find_remote_files(source: str) -> list[File]:
    url = urlsplit(source)
    folder, _, pattern = url.path.rpartition("/")
    is_glob = glob.has_magic(url.path)
    try:
        # What follows a question mark is not of the path: how the place is reached.
        system, path = fs.FileSystem.from_uri(url._replace(path=folder).geturl() if is_glob else source)
        if not is_glob:
            found = [path]
        else:
            infos = system.get_file_info(fs.FileSelector(path))
            found = sorted(i.path for i in infos if fnmatch.fnmatch(PurePosixPath(i.path).name, pattern))
        files = [i.path for i in system.get_file_info(found) if i.type == fs.FileType.File]
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{source}: can't be reached ({error})") from None
    if not files:
        raise DataError(f"{source}: no such file")
    return [File(system, path, f"{url.scheme}://{path}") for path in files]
