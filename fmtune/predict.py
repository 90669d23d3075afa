"""A finished run's model at work: loaded, measured on labelled images, and applied to others."""

from __future__ import annotations

import math
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fmtune.batches import Batches
from fmtune.checkpoint import load_model
from fmtune.classifier import TrainedModel
from fmtune.config import DataConfig
from fmtune.data import load_images, load_split
from fmtune.errors import DataError, InputError
from fmtune.memory import Source, table_of_memory
from fmtune.readers import Layout, Table
from fmtune.run import RunFolder, find_run
from fmtune.space import Space
from fmtune.training import Evaluation
from fmtune.training import evaluate as evaluate_batches


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
    model = load_model(folder.best)
    place = str(data) if isinstance(data, str | Path) else "data"
    table = _load_labelled(data, model, _label_column(folder))
    _check_shape(model, table.images, place)
    return Measured(model, evaluate_model(model, table.images, model.classes.indices(table.labels, place), tta=tta))


def predict(run: str | PathLike[str], source: str, output: str | Path, *, runs: str | Path = "runs") -> int:
    """Write the class of each row of a source, and the probability of every class, to a CSV or Parquet file.

    Columns: `row` from 0 on, `label`, `name`, and `probability_<class>` for each class's name.

    Returns:
        The number of rows.

    Raises:
        InputError: the run, the source or the output's ending is not as it must be.
    """
    output = Path(output)
    if output.suffix not in (".csv", ".parquet"):
        raise InputError(f"{output}: format not known by its name; expected .csv or .parquet")
    folder = find_run(run, Path(runs))
    model = load_model(folder.best)
    images = load_images(source, _label_column(folder), _table_shape(model))
    _check_shape(model, images, source)
    predictions = model.predict(images)
    columns: dict[str, Any] = {
        "row": np.arange(len(images)),
        "label": predictions.labels,
        "name": predictions.names,
    }
    for name, probabilities in zip(model.classes.names, predictions.probabilities.T, strict=True):
        columns[f"probability_{name}"] = probabilities
    table = pa.table(columns)
    if output.suffix == ".csv":
        pacsv.write_csv(table, output)
    else:
        pq.write_table(table, output)
    return len(images)


class MirrorMean(nn.Module):
    """A network's mean logits of an image and its mirror image."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = (self.network(images) + self.network(images.flip(-1))) / 2
        return logits


def evaluate_model(
    model: TrainedModel, images: NDArray[np.uint8], labels: NDArray[np.int64], *, tta: bool = False
) -> Evaluation:
    """Loss and confusion in fp32 over uint8 images (N, C, H, W) and class indices (N,); `tta` as in `evaluate`."""
    device = next(model.network.parameters()).device
    tensors = torch.tensor(images, device=device), torch.tensor(labels, device=device)
    network = MirrorMean(model.network) if tta else model.network
    return evaluate_batches(network, model.preprocess, Batches(*tensors, torch.arange(len(images), device=device)))


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


def _load_labelled(data: Source, model: TrainedModel, label: str | int) -> Table:
    shape = _table_shape(model)
    if isinstance(data, str | Path):
        return load_split(DataConfig(train=str(data), label=label, shape=shape), "test").table
    names = dict(zip(model.classes.labels, model.classes.names, strict=True))
    return table_of_memory(data, Layout(label, shape), "data", names)


def _label_column(folder: RunFolder) -> str | int:
    """The label's column in the tables that the run was trained on."""
    return Space.load(folder.space).data.label


def _table_shape(model: TrainedModel) -> tuple[int, int, int]:
    """Shape of a row of pixels in tables that the model takes: (height, width, channels)."""
    channels, height, width = model.shape
    return height, width, channels


def _check_shape(model: TrainedModel, images: NDArray[np.uint8], source: str) -> None:
    if images.shape[1:] != model.shape:
        raise DataError(
            f"{source}: images are {images.shape[1:]}; the model takes {model.shape} (channels, height, width)"
        )
