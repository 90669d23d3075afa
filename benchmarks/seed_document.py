"""The tutorial's own way of training, the yardstick that fmtune is measured against.

    python benchmarks/seed_document.py [--epochs 3] [--until ACCURACY] [--seed 0] [--threads 2]

ResNet-18 with a second linear layer upon its 1000-way one, on grey images turned into three channels; a Dataset whose
every sample passes through PIL; a DataLoader without workers; Adam at 1e-3, batches of 256, fp32. Prints a JSON line an
epoch, with the accuracy on the test split and the seconds of training so far. Nothing here is fmtune's but the reading
of the files, and nothing is made fast on purpose.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.models import resnet18

from fmtune.datasets import read_named

BATCH = 256


class ResNet18(nn.Module):
    """The published network, and a layer from its 1000 outputs to the classes."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.resnet = resnet18()
        self.fc = nn.Linear(self.resnet.fc.out_features, classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.resnet(images))
        return logits


class FashionDataset(Dataset[tuple[Tensor, Tensor]]):
    """Rows of pixels, each turned into a PIL image and back."""

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
        self.images, self.labels = images, labels
        self.transform = transforms.Compose(
            [
                transforms.ToPILImage(),
                transforms.Grayscale(num_output_channels=3),
                transforms.Resize(28),
                transforms.ToTensor(),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.images[index].reshape(28, 28, 1)
        return self.transform(image), torch.tensor(int(self.labels[index]))


def load(split: str) -> FashionDataset:
    table, _ = read_named("fashion-mnist", split, Path("data"))  # type: ignore[arg-type]
    return FashionDataset(table.images, table.labels)


def train_epoch(model: nn.Module, loader: DataLoader[tuple[Tensor, Tensor]], optimizer: torch.optim.Optimizer) -> None:
    criterion = nn.CrossEntropyLoss()
    model.train()
    total = 0.0
    for data, label in loader:
        optimizer.zero_grad()
        loss = criterion(model(data), label)
        loss.backward()
        optimizer.step()
        total += loss.item() * data.size(0)


@torch.no_grad()
def measure(model: nn.Module, loader: DataLoader[tuple[Tensor, Tensor]]) -> float:
    model.eval()
    hits = [(model(data).argmax(1) == label).sum().item() for data, label in loader]
    return sum(hits) / len(loader.dataset)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--until", type=float, default=1.0, help="test accuracy to stop at")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    train_loader = DataLoader(load("train"), batch_size=BATCH, shuffle=True, num_workers=0, drop_last=True)
    test_loader = DataLoader(load("test"), batch_size=BATCH, shuffle=False, num_workers=0)
    model = ResNet18(classes=10)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    seconds = 0.0
    for epoch in range(1, options.epochs + 1):
        started = time.perf_counter()
        train_epoch(model, train_loader, optimizer)
        seconds += time.perf_counter() - started
        accuracy = measure(model, test_loader)
        print(json.dumps({"epoch": epoch, "seconds": seconds, "accuracy": accuracy}), flush=True)
        if accuracy >= options.until:
            break


if __name__ == "__main__":
    main()
