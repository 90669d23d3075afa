"""Labelled images that a program has in memory, as sources like any other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from fmtune.config import DataConfig, refuse_credentials
from fmtune.data import keep_table
from fmtune.errors import DataError
from fmtune.readers import Layout, Shape, Table, find_label, table_of_arrow

Source: TypeAlias = str | Path | pd.DataFrame | tuple[NDArray[np.uint8], ArrayLike]
"""A data set's name, a path, glob or URL; a DataFrame; or a pair (images, labels)."""
_CHANNELS = (1, 3)
"""Sizes by which the axis of the channels is known."""


def place_sources(config: DataConfig, data: Source | None, test: Source | None) -> DataConfig:
    """The configuration with `data` for its training source and `test` for its test split, where they are given.

    What is in memory is kept in the cache of parsed tables. Strings among the labels of `test` are those of `data`.

    Raises:
        DataError: what is in memory is not as `table_of_memory` takes it.
    """
    layout = Layout(config.label, config.shape)
    sources: dict[str, str] = {}
    names: Mapping[int, str] = {}
    if data is not None and not isinstance(data, str | Path):
        table = table_of_memory(data, layout, "data")
        sources["train"], names = keep_table(table), table.names
    elif data is not None:
        sources["train"] = without_credentials(str(data), "data")
    if isinstance(test, str | Path):
        sources["test"] = without_credentials(str(test), "test")
    elif test is not None:
        table = table_of_memory(test, layout, "test", names)
        if names and not table.names:
            raise DataError(f"test: integer labels; the training rows have {', '.join(names.values())}")
        sources["test"] = keep_table(table)
    return config.model_copy(update=sources)


def without_credentials(source: str, place: str) -> str:
    """The source, given by the user at `place`.

    Raises:
        DataError: it is a URL with a name and password, which would be kept in run folders.
    """
    try:
        return refuse_credentials(source)
    except ValueError as error:
        raise DataError(f"{place}: {error}") from None


def table_of_memory(data: object, layout: Layout, place: str, names: Mapping[int, str] | None = None) -> Table:
    """Labelled images in memory as a table.

    Args:
        data: a DataFrame as the CSV format has it, a column of labels and a column a pixel, or one column of whole
            images; or a pair of images, uint8 (N, H, W), (N, H, W, C) or (N, C, H, W), and labels (N,). Labels are
            integers or strings. Of four axes the last or the second is the channels if it is of size 1 or 3; where
            both or neither are, the layout's shape must say.
        layout: the label's column, and the shape of an image; without it a row of pixels is a square grey one.
        place: how the user knows the data.
        names: the names that strings among the labels must be of; None numbers them from 0 in sorted order.

    Raises:
        DataError: the data are not of this form; the line says what is wrong.
    """
    if isinstance(data, pd.DataFrame):
        images, labels = _split_frame(data, layout, place)
    elif isinstance(data, tuple) and len(data) == 2:
        images, labels = _to_nchw(np.asarray(data[0]), layout.shape, place), np.asarray(data[1])
    else:
        raise DataError(
            f"{place}: a {type(data).__name__}; expected a name or path, a pandas DataFrame, or a pair (images, labels)"
        )
    if labels.shape != (len(images),):
        raise DataError(f"{place}: labels of shape {labels.shape}; expected {(len(images),)}, one for each image")
    return Table(images, *_number_labels(labels, place, names))


def _split_frame(frame: pd.DataFrame, layout: Layout, place: str) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """Images (N, C, H, W) and labels (N,)."""
    if not frame.columns.is_unique:
        double = frame.columns[frame.columns.duplicated()][0]
        raise DataError(f"{place}: two columns are called {double}; expected names that differ")
    names = [str(name) for name in frame.columns]
    label = find_label(layout.label, names, len(names), place)
    assert label is not None
    try:
        pixels = pa.Table.from_pandas(frame.drop(columns=frame.columns[label]), preserve_index=False)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(f"{place}: {': '.join(map(str, error.args))}; expected pixels from 0 to 255") from None
    column = frame.iloc[:, label]
    if pd.api.types.is_integer_dtype(column) and not column.hasnans:
        column = column.astype(np.int64)  # pandas' nullable integers would come as objects
    return table_of_arrow(pixels, Layout(None, layout.shape), place).images, column.to_numpy()


def _to_nchw(images: NDArray[Any], shape: Shape | None, place: str) -> NDArray[np.uint8]:
    """uint8 (N, H, W), (N, H, W, C) or (N, C, H, W) to (N, C, H, W); `shape` is (H, W, C)."""
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.size == 0:
        raise DataError(
            f"{place}: images of {images.dtype} and shape {images.shape}; expected uint8, 0 to 255, of shape "
            "(N, height, width), (N, height, width, channels) or (N, channels, height, width)"
        )
    sizes = images.shape[1:]
    if images.ndim == 3:
        is_last, is_first = False, shape in (None, (*sizes, 1))
    elif shape is None:
        is_last, is_first = sizes[2] in _CHANNELS, sizes[0] in _CHANNELS
    else:
        is_last, is_first = sizes == shape, sizes == (shape[2], *shape[:2])
    if is_last == is_first:
        expected = (
            "channels, 1 or 3, on the second axis or on the last; set data.shape to [height, width, channels]"
            if shape is None
            else f"(N, height, width, channels) or (N, channels, height, width) of height, width, channels {shape}"
        )
        raise DataError(f"{place}: images of shape {images.shape}; expected {expected}")
    images = images[:, None] if images.ndim == 3 else images
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2) if is_last else images)


def _number_labels(
    labels: NDArray[Any], place: str, names: Mapping[int, str] | None
) -> tuple[NDArray[np.int64], dict[int, str]]:
    """Labels as int64 (N,), and the name of each number where they are strings."""
    if np.issubdtype(labels.dtype, np.integer):
        return labels.astype(np.int64), {}
    if (row := next((row for row, label in enumerate(labels) if not isinstance(label, str)), None)) is not None:
        raise DataError(f"{place}: row {row}: label {labels[row]}; expected integers, or strings throughout")
    if (row := next((row for row, label in enumerate(labels) if not label), None)) is not None:
        raise DataError(f"{place}: row {row}: an empty label; leave the row out, or name its class")
    if names is None:
        names = dict(enumerate(sorted(set(map(str, labels)))))
    numbers = {name: number for number, name in names.items()}
    if (row := next((row for row, label in enumerate(labels) if label not in numbers), None)) is not None:
        known = ", ".join(names.values()) if names else "no strings"
        raise DataError(f"{place}: row {row}: label {labels[row]!s}; the training rows have {known}")
    return np.array([numbers[label] for label in labels], np.int64), dict(names)
