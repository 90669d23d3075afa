"""Any number of images, in pieces that any process can read, each block by block."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fmtune.csvfile import Csv
from fmtune.errors import DataError
from fmtune.files import File, readable
from fmtune.pictures import MODES, find_pictures, is_picture, read_picture
from fmtune.readers import (
    Layout,
    Shape,
    Table,
    check_same_shape,
    fit_layout,
    format_of,
    idx_header_bytes,
    is_idx_labels,
    open_csv,
    pair_labels,
    parse_idx_header,
    read_idx_labels,
    table_of_arrow,
    table_of_columns,
    to_tensors,
)
from fmtune.sources import find_files

BLOCK_BYTES = 8 * 2**20
"""Bytes of pixels in a block: enough to outweigh its way between processes, and little beside a process of torch's."""
_BUFFER_BYTES = 2**16
"""What is read ahead of each column of a Parquet file, of which there can be one a pixel."""
_PICTURES = 1024
"""Files of a piece at most, so that several processes decode them."""
_UNZIPPED = 3
"""Bytes of pixels in a compressed byte of a table, about."""


Block = TypeVar("Block", pa.Table, Table)
"""Some rows: images to predict (`create_block`), or a labelled table."""


@dataclass(frozen=True)
class Piece(Generic[Block]):
    """A part of a source.

    Attributes:
        read: gives its rows in order, block by block; may raise a DataError.
        work: about how many bytes of pixels it has, or of files where they are more.
        blocks: about how many blocks that makes.
    """

    read: Callable[[], Iterator[Block]]
    work: int
    blocks: int = 1


def create_block(images: NDArray[np.uint8], names: Sequence[str] | None = None) -> pa.Table:
    """A table of uint8 images (N, C, H, W) in the column `image`, as tensors, and with names the column `file`."""
    files = {} if names is None else {"file": pa.array(names)}
    return pa.table(files | {"image": to_tensors(images)})


def rows_of_block(shape: tuple[int, int, int]) -> int:
    """How many images of a shape make a block."""
    return max(1, BLOCK_BYTES // math.prod(shape))


def find_pieces(source: str, label: str | int, shape: tuple[int, int, int]) -> list[Piece[pa.Table]]:
    """The pieces of a source to predict in the order of its rows; no more than first lines and headers is read.

    Args:
        source: a folder of pictures, or a path, glob or URL of pictures or tables.
        label: the label's column in tables that have one, which is passed over.
        shape: (channels, height, width) of the images to be given; pictures are brought to it.

    Raises:
        DataError: the source is missing, of no known format or of another shape.
    """
    if os.path.isdir(source):
        return _split_pictures(find_pictures(source), os.path.join(source, ""), shape)
    files = find_files(source)
    if any(is_picture(file.path) for file in files):
        return _split_pictures(files, "", shape)
    channels, height, width = shape
    layout = Layout(label, (height, width, channels), ignores_labels=True)
    # An IDX file of labels may lie beside that of its images, and be named by the same glob.
    images = [file for file in files if not is_idx_labels(file)]
    if not images:
        raise DataError(f"{source}: labels alone; name the images, such as train-images-idx3-ubyte.gz")
    pieces = []
    for file in images:
        with readable(file):
            fitted = fit_layout(file, layout)
        pieces += [replace(p, read=partial(_drop_labels, p.read)) for p in _split_table(file, fitted, shape, None)]
    return pieces


def find_labelled_pieces(files: Sequence[File], layout: Layout) -> list[Piece[Table]]:
    """The pieces of files of labelled images, as `read_files` takes them, in the order of their rows.

    Raises:
        DataError: a file is of no known format, malformed, or of another shape than the first.
    """
    pairs = pair_labels(files)
    pieces: list[Piece[Table]] = []
    shapes = [_shape_of(file, layout) for file, _ in pairs]
    for (file, labels), shape in zip(pairs, shapes, strict=True):
        check_same_shape(file, shape, pairs[0][0], shapes[0])
        channels, height, width = shape
        # Rows further down may be of another.
        pieces += _split_table(file, replace(layout, shape=(height, width, channels)), shape, labels)
    return pieces


def _drop_labels(read: Callable[[], Iterator[Table]]) -> Iterator[pa.Table]:
    return (create_block(table.images) for table in read())


def _split_table(file: File, layout: Layout, shape: tuple[int, int, int], labels: File | None) -> list[Piece[Table]]:
    """The pieces of a table; `labels` is the file of those of an IDX file, without which they are -1."""
    match format_of(file):
        case "csv":
            return _split_csv(file, layout)
        case "parquet":
            return _split_parquet(file, layout, shape)
        case "idx":
            work = file.size * (_UNZIPPED if file.path.endswith(".gz") else 1)
            read = partial(_read_idx, file, labels, shape, rows_of_block(shape))
            return [Piece(read, work, 1 + work // BLOCK_BYTES)]


def _split_csv(file: File, layout: Layout) -> list[Piece[Table]]:
    with readable(file):
        csv, shape = open_csv(file, layout)
        size = file.size
    # A pixel takes two to four characters, its comma included.
    step = 2 * BLOCK_BYTES
    if file.path.lower().endswith(".gz"):
        # Compressed text has no other beginning than its first byte.
        work = size * _UNZIPPED
        return [Piece(partial(_read_compressed_csv, csv, shape, step), work, 1 + work // BLOCK_BYTES)]
    return [
        Piece(partial(_read_csv, csv, shape, start, start + step), min(step, size - start) // 2)
        for start in range(0, size, step)
    ]


def _read_csv(csv: Csv, shape: Shape, start: int, stop: int) -> Iterator[Table]:
    """The rows whose lines begin from byte `start` up to, but without, byte `stop`."""
    with readable(csv.file), csv.file.system.open_input_file(csv.file.path) as file:
        stream = io.BufferedReader(file)
        if start > 0:
            # From one byte before, so that a line that begins at `start` is not taken for the rest of another.
            stream.seek(start - 1)
            stream.readline()
        begin = stream.tell()
        text = stream.read(max(0, stop - begin))
        if text and not text.endswith(b"\n"):
            text += stream.readline()
    yield from _parse_csv(csv, shape, text, is_first=start == 0)


def _read_compressed_csv(csv: Csv, shape: Shape, step: int) -> Iterator[Table]:
    raw: Any = csv.file.open()
    with readable(csv.file), io.BufferedReader(raw) as stream:
        is_first = True
        while text := stream.read(step):
            yield from _parse_csv(csv, shape, text + stream.readline(), is_first=is_first)
            is_first = False


def _parse_csv(csv: Csv, shape: Shape, text: bytes, *, is_first: bool) -> Iterator[Table]:
    """The rows of whole lines; `is_first` if the file begins with them."""
    if is_first and csv.header is not None:
        text = text.partition(b"\n")[2]
    # Empty lines are passed over, but a text of nothing else is an error to the parser.
    if text and not text.isspace():
        table = csv.parse(pa.BufferReader(text), has_header=False)
        yield table_of_columns(table, csv.kept_label, shape)


def _split_parquet(file: File, layout: Layout, shape: tuple[int, int, int]) -> list[Piece[Table]]:
    """Row groups, so many together that they make a block."""
    rows = rows_of_block(shape)
    with readable(file):
        metadata = pq.read_metadata(file.path, filesystem=file.system)
    if metadata.num_rows == 0:
        raise DataError(f"{file.place}: no rows; expected one image a row")
    pieces, groups, count = [], [], 0
    for group in range(metadata.num_row_groups):
        groups.append(group)
        count += metadata.row_group(group).num_rows
        if count >= rows or group == metadata.num_row_groups - 1:
            read = partial(_read_parquet, file, layout, tuple(groups), rows)
            pieces.append(Piece(read, count * math.prod(shape), math.ceil(count / rows)))
            groups, count = [], 0
    return pieces


def _read_parquet(file: File, layout: Layout, groups: Sequence[int], rows: int) -> Iterator[Table]:
    # With a buffer, a row group is not held whole before its first rows are given.
    with readable(file), pq.ParquetFile(file.path, filesystem=file.system, buffer_size=_BUFFER_BYTES) as parquet:
        for batch in parquet.iter_batches(rows, row_groups=list(groups)):
            yield table_of_arrow(pa.Table.from_batches([batch]), layout, file.place)


def _read_idx(file: File, labels: File | None, shape: tuple[int, int, int], rows: int) -> Iterator[Table]:
    with readable(file), file.open() as stream:
        count, *size = parse_idx_header(stream.read(idx_header_bytes(3)), 3, file.place)
        check_shape((1, *size), shape, file.place)
        classes = np.full(count, -1) if labels is None else read_idx_labels(labels, count)
        for first in range(0, count, rows):
            expected = min(rows, count - first) * math.prod(shape)
            content = stream.read(expected)
            if len(content) < expected:
                raise DataError(f"{file.place}: ends in image {first + len(content) // math.prod(shape)} of {count}")
            yield Table(np.frombuffer(content, np.uint8).reshape(-1, *shape), classes[first : first + rows])
        if stream.read(1):
            raise DataError(f"{file.place}: more bytes than the {count} images that its header promises")


def _shape_of(file: File, layout: Layout) -> tuple[int, int, int]:
    """Shape (channels, height, width) of a table's images, by its first row or its header."""
    with readable(file):
        match format_of(file):
            case "csv":
                _, (height, width, channels) = open_csv(file, layout)
                return channels, height, width
            case "parquet":
                with pq.ParquetFile(file.path, filesystem=file.system, buffer_size=_BUFFER_BYTES) as parquet:
                    first = next(parquet.iter_batches(1), None)
                rows = pa.Table.from_batches([] if first is None else [first], parquet.schema_arrow)
                channels, height, width = table_of_arrow(rows, layout, file.place).images.shape[1:]
                return channels, height, width
            case "idx":
                with file.open() as stream:
                    _, height, width = parse_idx_header(stream.read(idx_header_bytes(3)), 3, file.place)
                return 1, height, width


def check_shape(found: tuple[int, ...], shape: tuple[int, int, int], place: str) -> None:
    """Refuse images of another shape than the model's, both (channels, height, width).

    Raises:
        DataError: it is another.
    """
    if found != shape:
        raise DataError(f"{place}: images are {found}; the model takes {shape} (channels, height, width)")


def _check_name(name: str) -> None:
    """Refuse a name that neither Arrow nor a table takes: Python has bytes that are no UTF-8 in it as surrogates.

    Raises:
        DataError: it is one.
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        raise DataError(f"{name!a}: a name that is no UTF-8; rename the file") from None


def _split_pictures(files: Sequence[File], folder: str, shape: tuple[int, int, int]) -> list[Piece[pa.Table]]:
    """Pictures, called by their place without the `folder` that it begins with."""
    if shape[0] not in MODES:
        raise DataError(
            f"{files[0].place}: pictures are grey, RGB or RGBA, the model takes {shape[0]} channels; use a table"
        )
    for file in files:
        _check_name(file.place)
    step = min(_PICTURES, rows_of_block(shape))
    parts = [files[start : start + step] for start in range(0, len(files), step)]
    # The size of one stands for those of its neighbours.
    works = [len(part) * max(part[0].size, math.prod(shape)) for part in parts]
    return [Piece(partial(_read_pictures, part, folder, shape), work) for part, work in zip(parts, works, strict=True)]


def _read_pictures(files: Sequence[File], folder: str, shape: tuple[int, int, int]) -> Iterator[pa.Table]:
    images = np.stack([read_picture(file, shape) for file in files])
    yield create_block(images, [file.place.removeprefix(folder) for file in files])
