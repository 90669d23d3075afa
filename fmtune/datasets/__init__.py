"""Data sets that go by a name: the bundled sample, and torchvision's built-in ones.

Nothing is read before `read_named` is called.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pyarrow import fs

from fmtune.errors import DataError
from fmtune.files import File, download_timeout
from fmtune.readers import Layout, Table, read_files

Split = Literal["train", "test"]
_BUILTIN: dict[str, tuple[str, dict[str, Any]]] = {
    "fashion-mnist": ("FashionMNIST", {}),
    "mnist": ("MNIST", {}),
    "kmnist": ("KMNIST", {}),
    "emnist-letters": ("EMNIST", {"split": "letters"}),
    "emnist-digits": ("EMNIST", {"split": "digits"}),
    "emnist-balanced": ("EMNIST", {"split": "balanced"}),
    "cifar10": ("CIFAR10", {}),
    "cifar100": ("CIFAR100", {}),
}
"""Name of the class in torchvision.datasets, and its options beside root, train and download."""
_CLASSES: dict[str, tuple[str, ...]] = {
    "fashion-mnist": (
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    ),
    "kmnist": ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
    # Letters are counted from 1.
    "emnist-letters": ("", *"abcdefghijklmnopqrstuvwxyz"),
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
}  # fmt: skip
NAMES = ("sample", *_BUILTIN)
"""What `data.train` takes as a name."""
LICENCES = {
    "sample": "MIT, https://github.com/zalandoresearch/fashion-mnist",
    "fashion-mnist": "MIT, https://github.com/zalandoresearch/fashion-mnist",
    "kmnist": "CC BY-SA 4.0, https://github.com/rois-codh/kmnist",
}
"""Licence of the images, and where their publisher states it; the other names have none that is beyond doubt."""
_BUNDLED = Path(__file__).parent / "sample"
_DEBIAN = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts its files."""
_FASHION_SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
"""Of the uncompressed files: distributions compress them anew, so the compressed ones differ."""


def read_named(name: str, split: Split, cache: Path) -> tuple[Table, str]:
    """A named data set's split, and a line that says where it was found.

    Args:
        name: one of `NAMES`.
        split: which part.
        cache: folder for downloads.

    Raises:
        DataError: the data are in none of the places and can't be downloaded, or are not what they should be.
    """
    if name == "sample":
        return _with_classes(_read_idx_folder(_BUNDLED, split), "fashion-mnist"), "bundled with fmtune"
    raw = cache / "FashionMNIST" / "raw"
    if name == "fashion-mnist" and not (raw / f"{_prefix(split)}-labels-idx1-ubyte").exists() and _DEBIAN.exists():
        _check_fashion(_DEBIAN, split, ending=".gz")
        return _with_classes(_read_idx_folder(_DEBIAN, split), name), f"Debian's package, {_DEBIAN}"
    table = _table_of_builtin(_open_builtin(name, split, cache))
    if name == "fashion-mnist":
        _check_fashion(raw, split, ending="")
    if name.startswith("emnist"):
        # Its files have lines and columns the other way round, and torchvision hands them out so.
        table = Table(np.ascontiguousarray(table.images.transpose(0, 1, 3, 2)), table.labels)
    return _with_classes(table, name), f"torchvision's download, {cache}"


def _open_builtin(name: str, split: Split, cache: Path) -> Any:
    """torchvision's data set, downloaded where it is not at hand."""
    # Its import takes a second, which those who read files need not wait for.
    import torchvision.datasets

    kind, options = _BUILTIN[name]
    create = getattr(torchvision.datasets, kind)
    try:
        return create(str(cache), train=split == "train", download=False, **options)
    except RuntimeError:
        pass  # torchvision's answer for "not here"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with download_timeout():
            return create(str(cache), train=split == "train", download=True, **options)
    except (RuntimeError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise DataError(
            f"{name}: not in {cache}, and its download failed ({reason}); set data.fallback: sample to train on the "
            "bundled sample instead, or give a file"
        ) from None


def _table_of_builtin(dataset: Any) -> Table:
    """torchvision's MNIST family holds tensors (N, H, W), its CIFAR arrays (N, H, W, C)."""
    images = np.asarray(dataset.data, dtype=np.uint8)
    images = images[:, None] if images.ndim == 3 else np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    return Table(images, np.asarray(dataset.targets, dtype=np.int64))


def _read_idx_folder(folder: Path, split: Split) -> Table:
    path = str(folder / f"{_prefix(split)}-images-idx3-ubyte.gz")
    return read_files([File(fs.LocalFileSystem(), path, path)], Layout())


def _prefix(split: Split) -> str:
    return "train" if split == "train" else "t10k"


def _with_classes(table: Table, name: str) -> Table:
    return Table(table.images, table.labels, dict(enumerate(_CLASSES.get(name, ()))))


def _check_fashion(folder: Path, split: Split, ending: str) -> None:
    system = fs.LocalFileSystem()
    for name, published in _FASHION_SHA256.items():
        if name.startswith(_prefix(split)):
            with system.open_input_stream(str(folder / f"{name}{ending}")) as stream:
                digest = hashlib.sha256(stream.read()).hexdigest()
            if digest != published:
                raise DataError(
                    f"{folder / name}{ending}: not the published Fashion-MNIST file (its SHA-256 is {digest})"
                )
