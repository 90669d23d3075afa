"""A finished run's model at work: loaded, measured on labelled images, and applied to others."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fmtune.batches import Batches, place_images, place_rows
from fmtune.checkpoint import load_model
from fmtune.classifier import TrainedModel
from fmtune.config import DataConfig
from fmtune.data import load_split
from fmtune.datasets import NAMES
from fmtune.errors import DataError
from fmtune.files import is_url
from fmtune.memory import Source, table_of_memory, without_credentials
from fmtune.pieces import Piece, check_shape, create_block, find_pieces, rows_of_block
from fmtune.readers import Layout, Table
from fmtune.rows import Predictor, check_output, write_rows
from fmtune.run import RunFolder, find_run
from fmtune.space import Space
from fmtune.stored import Images, StoredImages, StoredTable
from fmtune.training import Evaluation
from fmtune.training import evaluate as evaluate_batches

_SMALL_WORK = 16 * 2**20
"""Bytes of images up to which starting Ray takes longer than predicting them here."""


@dataclass(frozen=True)
class Measured:
    """What a model is worth on a labelled source."""

    model: TrainedModel
    evaluation: Evaluation

    def as_dict(self) -> dict[str, Any]:
        """`accuracy`, its 95% `interval`, `loss`, `per_class` and `confusion` (rows true, columns predicted)."""
        confusion = self.evaluation.confusion.numpy()
        return {
            "accuracy": self.evaluation.accuracy,
            "interval": list(wilson_interval(self.evaluation.correct, self.evaluation.images)),
            "loss": self.evaluation.loss,
            "per_class": [_describe_class(self.model, confusion, i) for i in range(len(self.model.classes))],
            "confusion": confusion.tolist(),
        }


def load(run: str | PathLike[str], *, runs: str | Path = "runs") -> TrainedModel:
    """The best model of a run.

    Raises:
        RunFolderError: there is no such run, or it has not finished.
    """
    return load_model(find_run(run, Path(runs)).best)


def evaluate(run: str | PathLike[str], data: Source, *, tta: bool = False, runs: str | Path = "runs") -> Measured:
    """Measure a run's best model on a labelled source; a data set's name stands for its test split.

    Args:
        run: a run folder, or a name under `runs`.
        data: the source, or what is in memory as `search` takes it; strings among its labels are names of classes.
        tta: predict from each image and its mirror image together (test-time augmentation).
        runs: folder of run folders.

    Raises:
        InputError: the run or the source is not as it must be.
    """
    folder = find_run(run, Path(runs))
    model = load_model(folder.best).to("cuda" if torch.cuda.is_available() else "cpu")
    place = str(data) if isinstance(data, str | Path) else "data"
    table = _load_labelled(data, model, _label_column(folder))
    check_shape(table.images.shape[1:], model.shape, place)
    return Measured(model, evaluate_model(model, table.images, model.classes.indices(table.labels, place), tta=tta))


def predict(
    run: str | PathLike[str],
    source: str | Path,
    output: str | Path,
    *,
    runs: str | Path = "runs",
    address: str | None = None,
) -> int:
    """Write the class of each image of a source, and the probability of every class, to a CSV or Parquet file.

    Columns: `row` from 0 on, for pictures `file`, `label`, `name`, and `probability_<class>` for each class's name.
    Rows are in the order of the source, and no more than some blocks of them are held at a time. Up to 16 MiB of
    images, and a data set that goes by its name, are predicted in this process; more by Ray Data on all CPUs, or all
    GPUs where there are any.

    Args:
        run: a run folder, or a name under `runs`.
        source: a data set's name, which stands for its test split; a CSV, Parquet or IDX path, glob or URL; or a
            folder, with those below it, or a glob of PNG and JPEG files. Pictures are turned upright, made grey, RGB or
            RGBA as the model takes them, and stretched to its height and width; `file` is their path in the folder, or
            as the glob gives it.
        output: ends in .csv or .parquet; there is none of it until it is whole.
        runs: folder of run folders.
        address: of a Ray cluster, which then predicts whatever the amount; a Ray of this machine's own by default.

    Returns:
        The number of rows.

    Raises:
        InputError: the run, the source or the output is not as it must be.
        RunFailed: Ray can't be started, or lost the processes that predict.
    """
    source, output = without_credentials(str(source), "INPUT"), Path(output)
    check_output(output, source)
    folder = find_run(run, Path(runs))
    model = load_model(folder.best)
    pieces = _find_pieces(source, _label_column(folder), model)
    with write_rows(output) as writer:
        if address is None and sum(piece.work for piece in pieces) <= _SMALL_WORK:
            predictor = Predictor(model)
            for piece in pieces:
                for block in piece.read():
                    writer.write(predictor(block))
        else:
            # Ray takes seconds to import and to start.
            from fmtune.bulk import predict_pieces

            # A cluster's other nodes see the same URLs, and have files of their own.
            are_here = address is not None and (not is_url(source) or source.startswith("file:"))
            predict_pieces(pieces, model, address, writer.write, are_here=are_here)
        if writer.rows == 0:
            raise DataError(f"{source}: no rows; expected one image a row")
    return writer.rows


class MirrorMean(nn.Module):
    """A network's mean logits of an image and its mirror image."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = (self.network(images) + self.network(images.flip(-1))) / 2
        return logits


def evaluate_model(
    model: TrainedModel,
    images: Images,
    labels: NDArray[np.int64],
    rows: NDArray[np.int64] | None = None,
    *,
    tta: bool = False,
) -> Evaluation:
    """Loss and confusion in fp32 over uint8 images (N, C, H, W) and class indices (N,), or those of `rows`, ascending.

    It is done on the model's device; `tta` as in `evaluate`.
    """
    device = next(model.network.parameters()).device
    if rows is not None and not isinstance(images, StoredImages):
        images, labels, rows = images[rows], labels[rows], None
    placed = place_images(images, device)
    chosen = place_rows(np.arange(len(images)) if rows is None else rows, placed)
    network = MirrorMean(model.network) if tta else model.network
    batches = Batches(placed, torch.tensor(labels, device=device), chosen)
    return evaluate_batches(network, model.preprocess, batches)


def wilson_interval(correct: int, images: int) -> tuple[float, float]:
    """95% interval of an accuracy (Wilson, 1927, https://doi.org/10.1080/01621459.1927.10502953)."""
    z = 1.959963984540054
    share = correct / images
    middle = share + z * z / (2 * images)
    half = z * math.sqrt(share * (1 - share) / images + z * z / (4 * images * images))
    scale = 1 + z * z / images
    return (middle - half) / scale, (middle + half) / scale


def _describe_class(model: TrainedModel, confusion: NDArray[np.int64], i: int) -> dict[str, Any]:
    hits, true, predicted = int(confusion[i, i]), int(confusion[i].sum()), int(confusion[:, i].sum())
    return {
        "label": model.classes.labels[i],
        "name": model.classes.names[i],
        "images": true,
        # A class that never occurs, or is never predicted, has no such ratio.
        "recall": hits / true if true else None,
        "precision": hits / predicted if predicted else None,
        "f1": 2 * hits / (true + predicted) if true + predicted else None,
    }


def _load_labelled(data: Source, model: TrainedModel, label: str | int) -> Table | StoredTable:
    shape = _table_shape(model)
    if isinstance(data, str | Path):
        source = without_credentials(str(data), "data")
        return load_split(DataConfig(train=source, label=label, shape=shape), "test").table
    names = dict(zip(model.classes.labels, model.classes.names, strict=True))
    return table_of_memory(data, Layout(label, shape), "data", names)


def _label_column(folder: RunFolder) -> str | int:
    """The label's column in the tables that the run was trained on."""
    return Space.load(folder.space).data.label


def _table_shape(model: TrainedModel) -> tuple[int, int, int]:
    """Shape of a row of pixels in tables that the model takes: (height, width, channels)."""
    channels, height, width = model.shape
    return height, width, channels


def _find_pieces(source: str, label: str | int, model: TrainedModel) -> list[Piece[pa.Table]]:
    if source in NAMES:
        return [Piece(partial(_read_named, source, model.shape), work=0)]
    return find_pieces(source, label, model.shape)


def _read_named(name: str, shape: tuple[int, int, int]) -> Iterator[pa.Table]:
    images = load_split(DataConfig(train=name), "test").table.images
    check_shape(images.shape[1:], shape, name)
    for start in range(0, len(images), rows_of_block(shape)):
        yield create_block(images[start : start + rows_of_block(shape)])
