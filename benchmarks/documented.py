"""What Ray sends about of a search in the way of its documentation, for `search.py`: it can't from a script."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import ray.train
import ray.train.torch
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision import transforms
from training import DATA

from fmtune.config import TrialConfig
from fmtune.data import TrainingData, load_training_data
from fmtune.model import create_model
from fmtune.optim import Optimization
from fmtune.space import Space


def define(space: Space, trial: optuna.Trial) -> dict[str, Any]:
    """What Tune gives a trial."""
    return {"trial": space.trial_config(space.suggest(trial)).model_dump()}


def train(values: dict[str, Any]) -> None:
    """The loop of a Train worker."""
    torch.set_num_threads(1)
    config = TrialConfig.model_validate(values)
    data = load_training_data(DATA)
    scale = transforms.Normalize(data.pixels.mean, data.pixels.std)
    plain = transforms.Compose([transforms.ToTensor(), scale])
    augmented = transforms.Compose(
        [
            transforms.RandomHorizontalFlip(),
            transforms.RandomCrop(28, padding=config.augment.translate),
            transforms.ToTensor(),
            scale,
            transforms.RandomErasing(p=config.augment.erase),
        ]
    )
    train, validation = _Images(data, data.train_rows, augmented), _Images(data, data.validation_rows, plain)
    loader = ray.train.torch.prepare_data_loader(
        torch.utils.data.DataLoader(train, batch_size=config.batch_size, shuffle=True)
    )
    held_out = torch.utils.data.DataLoader(validation, batch_size=1000)
    model = ray.train.torch.prepare_model(create_model(config.model, 1, len(data.classes)))
    optimization = Optimization(model, config.optim, config.epochs * len(loader))
    for _ in range(config.epochs):
        model.train()
        for x, labels in loader:
            loss = F.cross_entropy(model(x), labels, label_smoothing=config.optim.label_smoothing)
            optimization.minimise(loss)
        model.eval()
        with torch.no_grad():
            right = sum(int((model(x).argmax(dim=1) == labels).sum()) for x, labels in held_out)
        with tempfile.TemporaryDirectory() as folder:
            torch.save(model.state_dict(), Path(folder) / "model.pt")
            ray.train.report(
                {"val_accuracy": right / len(validation)}, checkpoint=ray.train.Checkpoint.from_directory(folder)
            )


class _Images(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Rows as images that transforms take one by one."""

    def __init__(self, data: TrainingData, rows: NDArray[np.int64], transform: Callable[[Image.Image], Tensor]) -> None:
        self._images, self._labels, self._transform = data.images[rows][:, 0], data.labels[rows], transform

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._transform(Image.fromarray(self._images[index])), int(self._labels[index])
