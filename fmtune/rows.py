"""Rows of predictions: made of blocks of images by a model, and written to a file as they come."""

from __future__ import annotations

import glob
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from fmtune.classifier import TrainedModel
from fmtune.errors import InputError
from fmtune.files import check_writable
from fmtune.model import fold_batch_norms

_BATCH = 256
"""Images of a step: the maps of so many small ones stay near the processor."""
_WRITERS = {".csv": pacsv.CSVWriter, ".parquet": pq.ParquetWriter}


class Predictor:
    """Turns blocks of images into rows of predictions, on the GPU if this process sees one.

    Args:
        model: what predicts, in fp32.
    """

    def __init__(self, model: TrainedModel) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # Typed without the keyword alone.
        self._network = fold_batch_norms(model.network).to(self._device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._preprocess = model.preprocess.to(self._device)
        self._classes = model.classes

    def __call__(self, block: pa.Table) -> pa.Table:
        """`file` where the block has it, then `label`, `name` and `probability_<class>` of each image.

        Args:
            block: `image`, uint8 tensors (C, H, W), and perhaps `file`.
        """
        probabilities = self._predict(block.column("image").combine_chunks().to_numpy_ndarray())
        best = probabilities.argmax(axis=1)
        columns = {"file": block.column("file")} if "file" in block.column_names else {}
        columns["label"] = pa.array(self._classes.labels, pa.int64()).take(pa.array(best))
        columns["name"] = pa.array(self._classes.names).take(pa.array(best))
        for name, column in zip(self._classes.names, probabilities.T, strict=True):
            columns[f"probability_{name}"] = pa.array(np.ascontiguousarray(column))
        return pa.table(columns)

    @torch.inference_mode()
    def _predict(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Probabilities float32 (N, classes) of uint8 images (N, C, H, W)."""
        parts: list[Tensor] = []
        for first in range(0, len(images), _BATCH):
            # A copy: what Arrow holds is read-only, which torch's tensors can't express.
            batch = torch.tensor(images[first : first + _BATCH], device=self._device)
            parts.append(self._network(self._preprocess(batch)).softmax(dim=1).cpu())
        probabilities: NDArray[np.float32] = torch.cat(parts).numpy()
        return probabilities


def check_output(output: Path, source: str) -> None:
    """Refuse a file that rows can't be written to.

    Raises:
        InputError: its ending is of no known format, its folder is not there, or it is the source.
    """
    if output.suffix not in _WRITERS:
        raise InputError(f"{output}: format not known by its name; expected .csv or .parquet")
    check_writable(output)
    if output.exists() and any(output.samefile(path) for path in _files_named(source)):
        raise InputError(f"{output}: is the input; choose another name")


def _files_named(source: str) -> list[str]:
    """Files of this machine that a path, glob or `file:` URL names."""
    path = unquote(urlsplit(source).path) if source.startswith("file:") else source
    return [name for name in (path, *glob.glob(path, recursive=True)) if os.path.isfile(name)]


class RowWriter:
    """A CSV or Parquet file, by its ending, that grows with every table written to it.

    Attributes:
        rows: how many have been written.
    """

    def __init__(self, path: Path) -> None:
        self.rows = 0
        self._path = path
        self._file: Any = None

    def write(self, table: pa.Table) -> None:
        """Append rows, with the column `row` before them; all tables have the columns of the first."""
        numbered = table.add_column(0, "row", pa.array(np.arange(self.rows, self.rows + len(table))))
        if self._file is None:
            # Probabilities hardly repeat: a dictionary of them costs time and room.
            options = {"use_dictionary": ["label", "name"]} if self._path.suffix == ".parquet" else {}
            self._file = _WRITERS[self._path.suffix](self._path, numbered.schema, **options)
        self._file.write_table(numbered)
        self.rows += len(table)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


@contextmanager
def write_rows(output: Path) -> Iterator[RowWriter]:
    """A writer of rows to `output`, which is there once the context has ended without an error, and whole."""
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".fmtune-") as aside:
        path = Path(aside) / output.name
        writer = RowWriter(path)
        try:
            yield writer
        finally:
            writer.close()
        path.replace(output)
