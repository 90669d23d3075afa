"""Small files of real images, for tests."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
from numpy.typing import NDArray

from fmtune.datasets import Split, read_named
from fmtune.readers import Table


def sample_rows(split: Split, per_class: int) -> Table:
    """The first rows of each class of the bundled sample, in its order."""
    table, _ = read_named("sample", split, Path())
    rows = np.sort(np.concatenate([np.flatnonzero(table.labels == label)[:per_class] for label in range(10)]))
    return Table(table.images[rows], table.labels[rows])


def write_csv(path: Path, table: Table) -> Path:
    """A CSV as Kaggle has Fashion-MNIST: label, pixel1, pixel2, ..."""
    pixels = table.images.reshape(len(table), -1)
    columns = {"label": table.labels} | {f"pixel{i + 1}": pixels[:, i] for i in range(pixels.shape[1])}
    pacsv.write_csv(pa.table(columns), path)
    return path


def write_idx(path: Path, values: NDArray[np.uint8]) -> None:
    """Unsigned bytes of any shape as a gzipped IDX file."""
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
    with gzip.GzipFile(path, "wb", mtime=0) as stream:
        stream.write(header + np.ascontiguousarray(values).tobytes())
