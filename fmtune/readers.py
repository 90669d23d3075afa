"""Files of labelled images, in the formats that they come in, to one `Table`."""

from __future__ import annotations

import csv
import difflib
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import fs

from fmtune.errors import DataError

Shape = tuple[int, int, int]
"""Height, width, channels of an image."""


@dataclass(frozen=True)
class Table:
    """Labelled images in memory.

    `images` is uint8 (N, C, H, W), `labels` int64 (N,) as the source has them, -1 where it has none; `names` gives a
    name to a label.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    names: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Layout:
    """How a table's columns are to be read: the label's column, None if there is none, and the shape of its pixels."""

    label: str | int | None = "label"
    shape: Shape | None = None


@dataclass(frozen=True)
class File:
    """A file on one of pyarrow's file systems; `place` is how the user knows it."""

    system: fs.FileSystem
    path: str
    place: str

    def open(self) -> IO[bytes]:
        """The decompressed content; compression is taken from the name's ending."""
        stream: IO[bytes] = self.system.open_input_stream(self.path)
        return stream


def read_files(files: Sequence[File], layout: Layout) -> Table:
    """Read files of one format and join their rows in the order given.

    Raises:
        DataError: a file is of no known format, malformed, or of another shape than the first.
    """
    if len(files) == 2 and [("idx1" in file.path) for file in files] in ([False, True], [True, False]):
        images, labels = sorted(files, key=lambda file: "idx1" in file.path)
        return _read_idx_pair(images, labels)
    tables = [_read_file(file, layout) for file in files]
    if len(tables) == 1:
        return tables[0]
    for file, table in zip(files, tables, strict=True):
        if table.images.shape[1:] != tables[0].images.shape[1:]:
            raise DataError(
                f"{file.place}: images are {_shape_text(table.images)}, "
                f"those of {files[0].place} are {_shape_text(tables[0].images)}; all must be of one shape"
            )
    return Table(np.concatenate([t.images for t in tables]), np.concatenate([t.labels for t in tables]))


def read_images(files: Sequence[File], layout: Layout) -> NDArray[np.uint8]:
    """Images (N, C, H, W) of files of a known shape, with or without the label's column: their number of columns says.

    Raises:
        DataError: as `read_files`.
    """
    assert layout.shape is not None
    unlabelled = Layout(None, layout.shape)
    bare = (1, math.prod(layout.shape))
    if any(_is_idx(file) for file in files):
        return read_files(files, layout).images
    return np.concatenate(
        [_read_file(file, unlabelled if _count_columns(file) in bare else layout).images for file in files]
    )


def _count_columns(file: File) -> int:
    name = PurePosixPath(file.path).name.lower()
    with _readable(file):
        if name.endswith((".csv", ".csv.gz")):
            return _read_csv_header(file)[1]
        if name.endswith((".parquet", ".pq")):
            return len(pq.read_schema(file.path, filesystem=file.system))
    return 0


@contextmanager
def _readable(file: File) -> Iterator[None]:
    """What the file system and decompression raise, as one of fmtune's errors."""
    try:
        yield
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{file.place}: can't be read ({error})") from None


def complete_idx(files: Sequence[File]) -> list[File]:
    """The files, and beside a single IDX file of images that of its labels."""
    is_images = len(files) == 1 and "images-idx3" in files[0].path
    return [*files, _labels_beside(files[0])] if is_images else list(files)


def _read_file(file: File, layout: Layout) -> Table:
    name = PurePosixPath(file.path).name.lower()
    with _readable(file):
        if name.endswith((".csv", ".csv.gz")):
            return _read_csv(file, layout)
        if name.endswith((".parquet", ".pq")):
            return _read_parquet(file, layout)
        if _is_idx(file):
            return _read_idx_pair(file, _labels_beside(file))
    raise DataError(f"{file.place}: format not known by its name; expected .csv, .csv.gz, .parquet or an IDX file")


def _read_csv(file: File, layout: Layout) -> Table:
    header, width = _read_csv_header(file)
    label = find_label(layout.label, header, width, file.place if header is None else f"{file.place}:1")
    pixels = width if label is None else width - 1
    shape = layout.shape or _infer_shape(pixels, file.place)
    _check_pixels(pixels, shape, file.place)
    names = [f"c{i}" for i in range(width)]
    types = {name: pa.int64() if position == label else pa.uint8() for position, name in enumerate(names)}
    try:
        with file.open() as stream:
            table = pacsv.read_csv(
                stream,
                read_options=pacsv.ReadOptions(column_names=names, skip_rows=0 if header is None else 1),
                convert_options=pacsv.ConvertOptions(column_types=types),
            )
    except pa.ArrowInvalid as error:
        raise _find_csv_error(file, header, width, label, str(error)) from None
    if any(column.null_count for column in table.columns) and table.num_rows:
        raise _find_csv_error(file, header, width, label, "a value is missing")
    if table.num_rows == 0:
        raise DataError(f"{file.place}: no rows below the header; expected one image a row")
    return _table_of_columns(table, label, shape)


def _read_csv_header(file: File) -> tuple[list[str] | None, int]:
    """The names of the columns, or None where the first line is already data; and the number of columns."""
    with file.open() as stream:
        first = next(_csv_rows(stream), None)
    if first is None:
        raise DataError(f"{file.place}: the file is empty; expected a line of column names or of numbers")
    if len(first) < 2:
        raise DataError(f"{file.place}:1: one column only; expected a label and pixels, separated by commas")
    # Names of columns differ from one another; a row of numbers with a word among them is a spoiled row.
    is_header = not all(map(_is_integer, first)) and len(set(first)) == len(first)
    return (first if is_header else None), len(first)


def _csv_rows(stream: IO[bytes]) -> Iterator[list[str]]:
    lines = (
        line.decode("utf-8-sig" if number == 0 else "utf-8", "replace") for number, line in enumerate(_lines(stream))
    )
    return csv.reader(lines)


def _lines(stream: Any) -> Iterator[bytes]:
    """Lines of a pyarrow stream, which cannot be iterated over by itself."""
    rest = b""
    while block := stream.read(1 << 20):
        *lines, rest = (rest + block).split(b"\n")
        yield from (line + b"\n" for line in lines)
    if rest:
        yield rest


def find_label(label: str | int | None, header: list[str] | None, width: int, place: str) -> int | None:
    """Position of the label's column, None if there is none."""
    if label is None:
        return None
    if isinstance(label, int):
        if not -width <= label < width:
            raise DataError(f"{place}: data.label: column {label} of {width}; expected 0 to {width - 1}")
        return label % width
    if header is None:
        if label != "label":
            raise DataError(f"{place}: data.label: no column names, so no `{label}`; give the column's position")
        return 0
    if label not in header:
        near = difflib.get_close_matches(label, header, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"the first columns are {', '.join(header[:3])}"
        raise DataError(f"{place}: data.label: no column `{label}`; {hint}")
    return header.index(label)


def _find_csv_error(file: File, header: list[str] | None, width: int, label: int | None, reason: str) -> DataError:
    """The first cell that spoils the file; the fast parser names neither its line nor its column for sure."""
    line = 0
    with file.open() as stream:
        for line, row in enumerate(_csv_rows(stream), start=1):
            problem = None if line == 1 and header is not None else _find_row_error(row, header, width, label)
            if problem is not None:
                return DataError(f"{file.place}:{line}: {problem}")
    if line == 1 and header is not None:
        return DataError(f"{file.place}: no rows below the header; expected one image a row")
    return DataError(f"{file.place}: {reason}")


def _find_row_error(row: list[str], header: list[str] | None, width: int, label: int | None) -> str | None:
    if not row:
        return None
    if len(row) != width:
        return f"{len(row)} values; expected {width}, as in the first line"
    for position, value in enumerate(row):
        column = f"column {position}" if header is None else f"column {header[position]}"
        if not _is_integer(value):
            return f"{column}: {value!r}; expected an integer"
        if position == label and abs(int(value)) >= 2**63:
            return f"{column}: {value}; expected an integer of 64 bits"
        if position != label and not 0 <= int(value) <= 255:
            return f"{column}: {value}; expected a pixel from 0 to 255"
    return None


def _is_integer(value: str) -> bool:
    """Whether Arrow reads it as one: no plus sign, no underscores."""
    return re.fullmatch(r"\s*-?\d+\s*", value, re.ASCII) is not None


def _read_parquet(file: File, layout: Layout) -> Table:
    try:
        table = pq.read_table(file.path, filesystem=file.system)
    except pa.ArrowInvalid as error:
        raise DataError(f"{file.place}: not a readable Parquet file ({error})") from None
    return table_of_arrow(table, layout, file.place)


def table_of_arrow(table: pa.Table, layout: Layout, place: str) -> Table:
    """The labelled images of a table with a column a pixel, or with one column of whole images.

    Raises:
        DataError: it has no rows, misses values, or has others than pixels from 0 to 255 and integer labels.
    """
    if table.num_rows == 0:
        raise DataError(f"{place}: no rows; expected one image a row")
    label = find_label(layout.label, table.column_names, table.num_columns, place)
    for name, column in zip(table.column_names, table.columns, strict=True):
        if column.null_count:
            raise DataError(f"{place}: column {name}: {column.null_count} values are missing")
    if label is not None and not pa.types.is_integer(table.schema.field(label).type):
        kind = table.schema.field(label).type
        raise DataError(f"{place}: column {table.column_names[label]}: {kind}; expected integers")
    pixels = table.num_columns if label is None else table.num_columns - 1
    if pixels == 1:
        return _table_of_image_column(table, label, layout.shape, place)
    shape = layout.shape or _infer_shape(pixels, place)
    _check_pixels(pixels, shape, place)
    return _table_of_columns(_cast_pixels(table, label, place), label, shape)


def _cast_pixels(table: pa.Table, label: int | None, place: str) -> pa.Table:
    for position, name in enumerate(table.column_names):
        if position != label:
            try:
                table = table.set_column(position, name, table.column(position).cast(pa.uint8()))
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise DataError(f"{place}: column {name}: {error}; expected pixels from 0 to 255") from None
    return table


def _table_of_image_column(table: pa.Table, label: int | None, shape: Shape | None, place: str) -> Table:
    """A table with one column of whole images: tensors, lists or bytes of pixels."""
    position = 1 - label if label is not None else 0
    images = table.column(position).combine_chunks()
    if isinstance(images.type, pa.FixedShapeTensorType):
        shape = shape or _shape_of_tensor(tuple(images.type.shape), place)
        images = images.storage
    kind = images.type
    if pa.types.is_fixed_size_binary(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        sizes = pc.binary_length(images)
        values = np.frombuffer(b"".join(images.to_pylist()), np.uint8)
    else:
        try:
            sizes = pc.list_value_length(images)
            values = images.flatten().cast(pa.uint8()).to_numpy()
        except (AttributeError, pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise DataError(
                f"{place}: column {table.column_names[position]}: {kind}; expected lists of pixels from 0 to 255"
            ) from None
    if pc.count_distinct(sizes).as_py() != 1:
        raise DataError(f"{place}: images are not all of one size")
    pixels = len(values) // table.num_rows
    shape = shape or _infer_shape(pixels, place)
    _check_pixels(pixels, shape, place)
    return Table(_to_nchw(values.reshape(-1, pixels), shape), _label_column(table, label))


def _shape_of_tensor(shape: tuple[int, ...], place: str) -> Shape:
    if len(shape) == 2:
        return (*shape, 1)
    if len(shape) == 3:
        return shape
    raise DataError(f"{place}: tensors of shape {shape}; expected (height, width) or (height, width, channels)")


def _is_idx(file: File) -> bool:
    name = PurePosixPath(file.path).name
    return "idx1" in name or "idx3" in name


def _labels_beside(images: File) -> File:
    if "images-idx3" not in images.path:
        raise DataError(f"{images.place}: an IDX file alone; name the images, such as train-images-idx3-ubyte.gz")
    path, place = (text.replace("images-idx3", "labels-idx1") for text in (images.path, images.place))
    return File(images.system, path, place)


def _read_idx_pair(images: File, labels: File) -> Table:
    pixels, classes = _read_idx(images, 3), _read_idx(labels, 1)
    if len(pixels) != len(classes):
        raise DataError(f"{labels.place}: {len(classes)} labels; expected {len(pixels)}, one for each image")
    return Table(pixels[:, None], classes.astype(np.int64))


def _read_idx(file: File, dimensions: int) -> NDArray[np.uint8]:
    """Unsigned bytes of a file in the format of http://yann.lecun.com/exdb/mnist."""
    try:
        with file.open() as stream:
            content = stream.read()
    except FileNotFoundError:
        raise DataError(f"{file.place}: no such file; the labels belong beside the images") from None
    start = 4 + 4 * dimensions
    if 4 <= len(content) < start:
        raise DataError(f"{file.place}: {len(content)} bytes; its header alone has {start}")
    if content[:4] != bytes([0, 0, 8, dimensions]):
        raise DataError(f"{file.place}: not an IDX file of {dimensions}-dimensional unsigned bytes")
    shape = tuple(int(size) for size in np.frombuffer(content[4:start], ">u4"))
    if len(content) != start + math.prod(shape):
        raise DataError(f"{file.place}: {len(content)} bytes; its header promises {start + math.prod(shape)}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _infer_shape(pixels: int, place: str) -> Shape:
    side = math.isqrt(pixels)
    if side * side != pixels:
        raise DataError(f"{place}: {pixels} pixels a row are no square; set data.shape to [height, width, channels]")
    return side, side, 1


def _check_pixels(pixels: int, shape: Shape, place: str) -> None:
    if math.prod(shape) != pixels:
        raise DataError(f"{place}: data.shape: {list(shape)} are {math.prod(shape)} values, a row has {pixels} pixels")


def _table_of_columns(table: pa.Table, label: int | None, shape: Shape) -> Table:
    """A table with a column a pixel, all uint8 and without nulls."""
    pixels = [position for position in range(table.num_columns) if position != label]
    images = np.empty((table.num_rows, len(pixels)), np.uint8)
    for target, position in enumerate(pixels):
        images[:, target] = table.column(position).to_numpy()
    return Table(_to_nchw(images, shape), _label_column(table, label))


def _label_column(table: pa.Table, label: int | None) -> NDArray[np.int64]:
    if label is None:
        return np.full(table.num_rows, -1)
    return np.asarray(table.column(label).to_numpy(), dtype=np.int64)


def _to_nchw(rows: NDArray[np.uint8], shape: Shape) -> NDArray[np.uint8]:
    """Rows of pixels (N, H * W * C), channels last as tables have them, to (N, C, H, W)."""
    return np.ascontiguousarray(rows.reshape(-1, *shape).transpose(0, 3, 1, 2))


def _shape_text(images: NDArray[np.uint8]) -> str:
    channels, height, width = images.shape[1:]
    return f"{height} x {width} x {channels}"
