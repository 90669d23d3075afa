"""Files of labelled images, in the formats that they come in, to one `Table`."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fmtune.csvfile import Csv, read_header
from fmtune.errors import DataError
from fmtune.files import File, readable

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
    """How a table's columns are to be read.

    Attributes:
        label: the label's column, None if there is none.
        shape: of a row of pixels; None takes it for a square grey image.
        ignores_labels: whether the label's column is passed over, whatever it holds.
    """

    label: str | int | None = "label"
    shape: Shape | None = None
    ignores_labels: bool = False


def format_of(file: File) -> Literal["csv", "parquet", "idx"]:
    """A table's format, by the file's name.

    Raises:
        DataError: it is none of these.
    """
    name = PurePosixPath(file.path).name
    if name.lower().endswith((".csv", ".csv.gz")):
        return "csv"
    if name.lower().endswith((".parquet", ".pq")):
        return "parquet"
    if "idx1" in name or "idx3" in name:
        return "idx"
    raise DataError(f"{file.place}: format not known by its name; expected .csv, .csv.gz, .parquet or an IDX file")


def read_files(files: Sequence[File], layout: Layout) -> Table:
    """Read files of one format and join their rows in the order given.

    Raises:
        DataError: a file is of no known format, malformed, or of another shape than the first.
    """
    pairs = pair_labels(files)
    tables = [_read_file(file, layout, labels) for file, labels in pairs]
    if len(tables) == 1:
        return tables[0]
    shapes = [table.images.shape[1:] for table in tables]
    for (file, _), shape in zip(pairs, shapes, strict=True):
        check_same_shape(file, shape, pairs[0][0], shapes[0])
    return Table(np.concatenate([t.images for t in tables]), np.concatenate([t.labels for t in tables]))


def pair_labels(files: Sequence[File]) -> list[tuple[File, File | None]]:
    """The files with images, each with that of its labels if it is IDX: the one given, or the one beside it by name.

    Raises:
        DataError: IDX labels are given without their images, or images whose name does not tell that of their labels.
    """
    labels = [file for file in files if is_idx_labels(file)]
    images = [file for file in files if file not in labels]
    if len(images) == len(labels) == 1 and format_of(images[0]) == "idx":
        return [(images[0], labels[0])]
    pairs = [(file, labels_beside(file) if format_of(file) == "idx" else None) for file in images]
    paired = {beside.path for _, beside in pairs if beside is not None}
    for file in labels:
        if file.path not in paired:
            raise DataError(f"{file.place}: labels alone; name the images, such as train-images-idx3-ubyte.gz")
    return pairs


def is_idx_labels(file: File) -> bool:
    """Whether a file is one of IDX labels by its name; what ends in .csv or .parquet is none."""
    return "idx1" in PurePosixPath(file.path).name and format_of(file) == "idx"


def check_same_shape(file: File, shape: tuple[int, ...], first: File, expected: tuple[int, ...]) -> None:
    """Refuse a file whose images are of another shape (channels, height, width) than those of the first one.

    Raises:
        DataError: they are.
    """
    if shape != expected:
        raise DataError(
            f"{file.place}: images are {_shape_text(shape)}, those of {first.place} are {_shape_text(expected)}; all "
            "must be of one shape"
        )


def fit_layout(file: File, layout: Layout) -> Layout:
    """The layout of a file of a known shape, with or without the label's column: its number of columns says.

    Raises:
        DataError: the file can't be read.
    """
    assert layout.shape is not None
    return replace(layout, label=None) if _count_columns(file) in (1, math.prod(layout.shape)) else layout


def _count_columns(file: File) -> int:
    with readable(file):
        match format_of(file):
            case "csv":
                return read_header(file)[1]
            case "parquet":
                schema = pq.read_schema(file.path, filesystem=file.system)
                return len(schema) - len(_index_columns(schema))
            case "idx":
                return 0


def complete_idx(files: Sequence[File]) -> list[File]:
    """The files, and those of the labels of IDX images among them. Errors are those of `pair_labels`."""
    return [file for pair in pair_labels(files) for file in pair if file is not None]


def _read_file(file: File, layout: Layout, labels: File | None) -> Table:
    with readable(file):
        match format_of(file):
            case "csv":
                return _read_csv(file, layout)
            case "parquet":
                return _read_parquet(file, layout)
            case "idx":
                assert labels is not None
                return _read_idx_pair(file, labels)


def _read_csv(file: File, layout: Layout) -> Table:
    csv, shape = open_csv(file, layout)
    with file.open() as stream:
        return table_of_columns(csv.parse(stream, has_header=True), csv.kept_label, shape)


def open_csv(file: File, layout: Layout) -> tuple[Csv, Shape]:
    """A CSV file by its first line, and the shape of its rows of pixels.

    Raises:
        DataError: the line does not fit the layout.
    """
    header, width = read_header(file)
    label = find_label(layout.label, header, width, file.place if header is None else f"{file.place}:1")
    pixels = width if label is None else width - 1
    shape = layout.shape or _infer_shape(pixels, file.place)
    _check_pixels(pixels, shape, file.place)
    return Csv(file, header, width, label, layout.ignores_labels), shape


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


def _read_parquet(file: File, layout: Layout) -> Table:
    try:
        # A folder called name=value is no column.
        table = pq.read_table(file.path, filesystem=file.system, partitioning=None)
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
    if not isinstance(layout.label, int):
        table = table.drop_columns([name for name in _index_columns(table.schema) if name != layout.label])
    label = find_label(layout.label, table.column_names, table.num_columns, place)
    if label is not None and layout.ignores_labels:
        table, label = table.remove_column(label), None
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
    return table_of_columns(_cast_pixels(table, label, place), label, shape)


def _index_columns(schema: pa.Schema) -> list[str]:
    """Columns that are the index of a frame that pandas has written, such as the rows' numbers before a shuffle."""
    described = schema.pandas_metadata or {}
    # An index that only counts is described, and is no column.
    return [name for name in described.get("index_columns", []) if isinstance(name, str) and name in schema.names]


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
    kind = table.schema.field(position).type
    images = _widen(table.column(position)).combine_chunks()
    is_planar = False
    if isinstance(images.type, pa.FixedShapeTensorType):
        shape, is_planar = _fit_tensor(tuple(images.type.shape), shape, place)
        images = images.storage
        kind = images.type
    if pa.types.is_large_binary(images.type):
        sizes = pc.binary_length(images)
        _, offsets, content = images.buffers()
        ends = np.frombuffer(offsets, np.int64)[images.offset : images.offset + len(images) + 1]
        values = np.frombuffer(content, np.uint8)[ends[0] : ends[-1]]
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
    height, width, channels = shape
    nchw = values.reshape(-1, channels, height, width) if is_planar else _to_nchw(values.reshape(-1, pixels), shape)
    return Table(nchw, _label_column(table, label))


def _widen(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column of bytes or lists with offsets of 64 bits: with those of 32 a piece of it can't be longer than 2 GiB."""
    kind = column.type
    if pa.types.is_binary(kind) or pa.types.is_fixed_size_binary(kind):
        return column.cast(pa.large_binary())
    return column.cast(pa.large_list(kind.value_type)) if pa.types.is_list(kind) else column


def _fit_tensor(sizes: tuple[int, ...], shape: Shape | None, place: str) -> tuple[Shape, bool]:
    """Height, width and channels of tensors of these sizes, and whether their channels come first.

    Raises:
        DataError: they are no images, or not those of the layout's `shape`.
    """
    if len(sizes) not in (2, 3):
        raise DataError(f"{place}: tensors of shape {sizes}; expected (height, width) or (height, width, channels)")
    first, second, last = sizes if len(sizes) == 3 else (*sizes, 1)
    turned = (second, last, first)
    if shape is None:
        is_planar, is_last = len(sizes) == 3 and first in (1, 3), last in (1, 3, 4)
        if is_planar == is_last:
            raise DataError(f"{place}: tensors of shape {sizes}; set data.shape to [height, width, channels]")
        return (turned, True) if is_planar else ((first, second, last), False)
    if shape not in ((first, second, last), turned):
        raise DataError(f"{place}: tensors of shape {sizes}; expected height, width, channels {shape}")
    return shape, shape != (first, second, last)


def labels_beside(images: File) -> File:
    """The file of an IDX file's labels, by the name that the format's data sets give it.

    Raises:
        DataError: the images' name is of another form.
    """
    folder, _, name = images.path.rpartition("/")
    labels, found = re.subn(r"images([-.])idx3", r"labels\1idx1", name)
    if not found:
        raise DataError(f"{images.place}: an IDX file alone; name the images, such as train-images-idx3-ubyte.gz")
    return File(images.system, f"{folder}/{labels}", f"{images.place.removesuffix(name)}{labels}")


def _read_idx_pair(images: File, labels: File) -> Table:
    pixels = _read_idx(images, 3)
    if len(pixels) == 0:
        raise DataError(f"{images.place}: no images; expected one or more")
    return Table(pixels[:, None], read_idx_labels(labels, len(pixels)))


def read_idx_labels(file: File, images: int) -> NDArray[np.int64]:
    """The labels (N,) of so many images.

    Raises:
        DataError: the file is no such IDX file, or has another number of them.
    """
    labels = _read_idx(file, 1)
    if len(labels) != images:
        raise DataError(f"{file.place}: {len(labels)} labels; expected {images}, one for each image")
    return labels.astype(np.int64)


def _read_idx(file: File, dimensions: int) -> NDArray[np.uint8]:
    """Unsigned bytes of a file in the format of http://yann.lecun.com/exdb/mnist."""
    try:
        with file.open() as stream:
            content = stream.read()
    except FileNotFoundError:
        raise DataError(f"{file.place}: no such file; the labels belong beside the images") from None
    start = idx_header_bytes(dimensions)
    shape = parse_idx_header(content[:start], dimensions, file.place)
    if len(content) != start + math.prod(shape):
        raise DataError(f"{file.place}: {len(content)} bytes; its header promises {start + math.prod(shape)}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def idx_header_bytes(dimensions: int) -> int:
    return 4 + 4 * dimensions


def parse_idx_header(header: bytes, dimensions: int, place: str) -> tuple[int, ...]:
    """The sizes of an IDX file of unsigned bytes, images (N, H, W) or labels (N,), from its first bytes.

    Raises:
        DataError: they are no such header.
    """
    if 4 <= len(header) < idx_header_bytes(dimensions):
        raise DataError(f"{place}: {len(header)} bytes; its header alone has {idx_header_bytes(dimensions)}")
    if header[:4] != bytes([0, 0, 8, dimensions]):
        raise DataError(f"{place}: not an IDX file of {dimensions}-dimensional unsigned bytes")
    return tuple(int(size) for size in np.frombuffer(header[4:], ">u4"))


def _infer_shape(pixels: int, place: str) -> Shape:
    side = math.isqrt(pixels)
    if side * side != pixels:
        raise DataError(f"{place}: {pixels} pixels a row are no square; set data.shape to [height, width, channels]")
    return side, side, 1


def _check_pixels(pixels: int, shape: Shape, place: str) -> None:
    if math.prod(shape) != pixels:
        raise DataError(f"{place}: data.shape: {list(shape)} are {math.prod(shape)} values, a row has {pixels} pixels")


def table_of_columns(table: pa.Table, label: int | None, shape: Shape) -> Table:
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


def _shape_text(shape: tuple[int, ...]) -> str:
    channels, height, width = shape
    return f"{height} x {width} x {channels}"


def to_tensors(images: NDArray[np.uint8]) -> pa.ExtensionArray:
    """An Arrow column of fixed-shape tensors (C, H, W) of images (N, C, H, W), which are not copied."""
    shape = images.shape[1:]
    flat = pa.array(np.ascontiguousarray(images).reshape(-1))
    lists = pa.FixedSizeListArray.from_arrays(flat, math.prod(shape))
    return pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.uint8(), shape), lists)
