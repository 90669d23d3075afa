"""Tables of labelled images in Parquet files of the cache, read whole or block by block."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import fs

from fmtune.errors import DataError
from fmtune.files import File, readable
from fmtune.readers import Table

_BLOCK_BYTES = 4 * 2**20
"""Bytes of pixels in a row group: few enough for many to make a shuffle, enough for one read from object storage."""


@dataclass(frozen=True)
class StoredImages:
    """uint8 images (N, C, H, W) that stay in the file; stands where an array would be, for reading some rows at a time.

    Attributes:
        file: where they are.
        shape: (N, C, H, W).
        block_rows: rows of each row group but the last, which may have less.
        memory: bytes of them that a process may hold.
    """

    file: File
    shape: tuple[int, int, int, int]
    block_rows: int
    memory: int

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> NDArray[np.uint8]:
        """The image of a row, or those of rows int64 (M,) in any order; their blocks are read one by one."""
        wanted = np.atleast_1d(np.asarray(rows))
        order = np.argsort(wanted, kind="stable")
        images = np.empty((len(wanted), *self.shape[1:]), np.uint8)
        done = 0
        for block in self.blocks(wanted[order]):
            images[order[done : done + len(block)]] = block
            done += len(block)
        return images if np.ndim(rows) else images[0]

    def blocks(self, rows: NDArray[np.int64] | None = None) -> Iterator[NDArray[np.uint8]]:
        """The images of ascending rows (M,), or of all, in parts that are each of one row group."""
        reader = BlockReader(self)
        if rows is None:
            yield from map(reader.read, range(-(-len(self) // self.block_rows)))
            return
        numbers, starts = np.unique(rows // self.block_rows, return_index=True)
        for number, own in zip(numbers.tolist(), np.split(rows, starts)[1:], strict=True):
            yield reader.read(number)[own - number * self.block_rows]


@dataclass(frozen=True)
class StoredTable:
    """Labelled images that stay in the file; `labels` and `names` are those of a `Table`."""

    images: StoredImages
    labels: NDArray[np.int64]
    names: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)


class BlockReader:
    """The open file of stored images.

    Raises:
        DataError: there is none that this machine can read.
    """

    def __init__(self, images: StoredImages) -> None:
        self._images = images
        with _explained(images.file):
            self._parquet = pq.ParquetFile(images.file.path, filesystem=images.file.system)

    def read(self, number: int) -> NDArray[np.uint8]:
        """The images (n, C, H, W) of a row group."""
        with _explained(self._images.file):
            content = self._parquet.read_row_group(number, columns=["image"])
        return _images_of(content, self._images.shape[1:])


Images: TypeAlias = NDArray[np.uint8] | StoredImages
"""uint8 (N, C, H, W), in memory or stored."""


def write_table(file: File, parts: Iterable[Table]) -> None:
    """Write a table to a file, which is there once it is whole.

    A column of bytes an image: Parquet reads and writes fixed-size bytes at the disk's speed, and lists of uint8, which
    fixed-shape tensors are to it, value by value.

    Args:
        file: where to.
        parts: of the table, one at least; shape and names are those of the first.

    Raises:
        DataError: the place can't be written to; or what `parts` raise.
    """
    try:
        _write_table(file, parts)
    except OSError as error:
        raise DataError(f"{file.place}: can't be written ({error}); set FMTUNE_CACHE to a place that can") from None


def _write_table(file: File, parts: Iterable[Table]) -> None:
    parts = iter(parts)
    first = next(parts)
    shape = first.images.shape[1:]
    block_rows = max(1, _BLOCK_BYTES // math.prod(shape))
    metadata = {"shape": json.dumps(shape), "names": json.dumps(list(first.names.items()))}
    schema = pa.schema({"image": pa.binary(math.prod(shape)), "label": pa.int64()}, metadata)
    with (
        _aside(file) as path,
        pq.ParquetWriter(
            path, schema, filesystem=file.system, compression="none", use_dictionary=False, write_statistics=False
        ) as writer,
    ):
        for table in _cut(chain([first], parts), block_rows, schema):
            writer.write_table(table, row_group_size=block_rows)


def _cut(parts: Iterable[Table], block_rows: int, schema: pa.Schema) -> Iterator[pa.Table]:
    """The parts as tables of whole blocks, but for the last."""
    rest = schema.empty_table()
    for part in parts:
        pixels = pa.py_buffer(np.ascontiguousarray(part.images))
        images = pa.FixedSizeBinaryArray.from_buffers(schema.field("image").type, len(part), [None, pixels])
        table = pa.concat_tables([rest, pa.table([images, pa.array(part.labels)], schema=schema)])
        whole = len(table) - len(table) % block_rows
        if whole:
            yield table.slice(0, whole)
        # A copy, so that the part that it is of can go.
        rest = table.slice(whole).take(np.arange(len(table) - whole))
    if len(rest):
        yield rest


@contextmanager
def _aside(file: File) -> Iterator[str]:
    """A path to write to, so that no reader ever sees half a file."""
    if not isinstance(file.system, fs.LocalFileSystem):
        # An object is there once its upload has ended, which closing it after an error does too.
        try:
            yield file.path
        except BaseException:
            with suppress(OSError):
                file.system.delete_file(file.path)
            raise
        return
    path = Path(file.path)
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield str(aside)
        aside.replace(path)
    finally:
        with suppress(OSError):
            aside.unlink()


def read_table(file: File, memory: int) -> Table | StoredTable:
    """The table in a file; its images stay there where they take more bytes than `memory`.

    Raises:
        DataError: there is none that this machine can read.
    """
    with _explained(file), pq.ParquetFile(file.path, filesystem=file.system) as parquet:
        metadata: Mapping[bytes, bytes] = parquet.schema_arrow.metadata
        channels, height, width = json.loads(metadata[b"shape"])
        shape = (parquet.metadata.num_rows, channels, height, width)
        is_held = math.prod(shape) <= memory
        content = parquet.read(columns=["image", "label"] if is_held else ["label"])
        block_rows = parquet.metadata.row_group(0).num_rows
    labels, names = content.column("label").to_numpy(), dict(json.loads(metadata[b"names"]))
    if is_held:
        return Table(_images_of(content, shape[1:]), labels, names)
    return StoredTable(StoredImages(file, shape, block_rows, memory), labels, names)


def _images_of(content: pa.Table, shape: Sequence[int]) -> NDArray[np.uint8]:
    column = content.column("image").combine_chunks()
    return np.frombuffer(column.buffers()[1], np.uint8).reshape(-1, *shape)


@contextmanager
def _explained(file: File) -> Iterator[None]:
    """What reading a file of the cache raises, as one of fmtune's errors; another machine may have written it."""
    with readable(file):
        try:
            yield
        except FileNotFoundError:
            raise DataError(
                f"{file.place}: not on this machine; where there are several, set FMTUNE_CACHE to a folder or a URL "
                "such as s3://bucket/cache that all of them reach"
            ) from None
