"""Small files of real images, for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv

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
