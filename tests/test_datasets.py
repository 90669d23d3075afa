from __future__ import annotations

import gzip
import shutil
import socket
import urllib.error
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision.datasets
from numpy.typing import NDArray

from fmtune.datasets import NAMES, Split, read_named
from fmtune.errors import DataError

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
CLASSES = [
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
]  # fmt: skip
needs_fashion = pytest.mark.skipif(
    not DEBIAN.exists(), reason=f"the full Fashion-MNIST is not in {DEBIAN} (package dataset-fashion-mnist)"
)


def _fashion(split: Split) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The full images (N, 784) and labels; the headers of the two files have 16 and 8 bytes."""
    prefix = "train" if split == "train" else "t10k"
    images = gzip.decompress((DEBIAN / f"{prefix}-images-idx3-ubyte.gz").read_bytes())[16:]
    labels = gzip.decompress((DEBIAN / f"{prefix}-labels-idx1-ubyte.gz").read_bytes())[8:]
    return np.frombuffer(images, np.uint8).reshape(-1, 784), np.frombuffer(labels, np.uint8)


def _torchvision_cache(folder: Path) -> Path:
    """A cache with the test split's files as torchvision leaves them, made of Debian's; the others are empty."""
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for packed in DEBIAN.glob("*.gz"):
        if packed.name.startswith("t10k"):
            shutil.copy(packed, raw)
            (raw / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
        else:
            (raw / packed.stem).touch()
    return raw


@pytest.mark.parametrize(("split", "a_class"), [("train", 600), ("test", 100)])
def test_sample_has_as_many_of_each_of_ten_classes(split: Split, a_class: int, tmp_path: Path) -> None:
    table, found = read_named("sample", split, tmp_path)
    assert table.images.shape == (10 * a_class, 1, 28, 28)
    assert table.images.dtype == np.uint8
    assert np.bincount(table.labels).tolist() == [a_class] * 10
    assert found == "bundled with fmtune"


def test_sample_names_its_classes_as_published(tmp_path: Path) -> None:
    table, _ = read_named("sample", "test", tmp_path)
    assert table.names == dict(enumerate(CLASSES))


def test_sample_needs_no_cache(tmp_path: Path) -> None:
    read_named("sample", "train", tmp_path / "absent")
    assert list(tmp_path.iterdir()) == []


def test_sample_has_no_image_in_both_splits(tmp_path: Path) -> None:
    train, test = ({image.tobytes() for image in read_named("sample", split, tmp_path)[0].images}
                   for split in ("train", "test"))  # fmt: skip
    assert train & test == set()


@needs_fashion
@pytest.mark.parametrize("split", ["train", "test"])
def test_sample_images_are_fashion_mnists_with_the_same_labels(split: Split, tmp_path: Path) -> None:
    published: defaultdict[bytes, set[int]] = defaultdict(set)
    for image, label in zip(*_fashion(split), strict=True):
        published[image.tobytes()].add(int(label))
    table, _ = read_named("sample", split, tmp_path)
    for image, label in zip(table.images, table.labels, strict=True):
        assert int(label) in published[image.tobytes()]


@needs_fashion
def test_fashion_mnist_is_taken_from_debians_package(tmp_path: Path) -> None:
    """Second implementation: plain bytes of the two files."""
    table, found = read_named("fashion-mnist", "test", tmp_path)
    images, labels = _fashion("test")
    assert np.array_equal(table.images.reshape(-1, 784), images)
    assert np.array_equal(table.labels, labels)
    assert table.names == dict(enumerate(CLASSES))
    assert str(DEBIAN) in found


@needs_fashion
def test_fashion_mnist_in_the_cache_goes_before_debians(tmp_path: Path) -> None:
    _torchvision_cache(tmp_path)
    table, found = read_named("fashion-mnist", "test", tmp_path)
    images, labels = _fashion("test")
    assert str(tmp_path) in found
    assert np.array_equal(table.images.reshape(-1, 784), images)
    assert np.array_equal(table.labels, labels)


@needs_fashion
def test_spoiled_packed_file_in_the_cache_is_refused(tmp_path: Path) -> None:
    raw = _torchvision_cache(tmp_path)
    content = bytearray(gzip.decompress((raw / "t10k-labels-idx1-ubyte.gz").read_bytes()))
    content[8] ^= 1
    (raw / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(content)))
    (raw / "t10k-labels-idx1-ubyte").write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte.*not the published Fashion-MNIST"):
        read_named("fashion-mnist", "test", tmp_path)


@needs_fashion
def test_spoiled_unpacked_file_in_the_cache_is_refused(tmp_path: Path) -> None:
    """torchvision reads the unpacked files, so it is those whose content must be the published one."""
    path = _torchvision_cache(tmp_path) / "t10k-labels-idx1-ubyte"
    content = bytearray(path.read_bytes())
    content[8] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte.*not the published Fashion-MNIST"):
        read_named("fashion-mnist", "test", tmp_path)


@needs_fashion
def test_what_a_failed_download_leaves_does_not_hide_debians_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchvision makes the folder before it downloads; a package installed afterwards must still be found."""
    (tmp_path / "FashionMNIST" / "raw").mkdir(parents=True)
    _cut_off(monkeypatch, "FashionMNIST", urllib.error.URLError("timed out"))
    table, found = read_named("fashion-mnist", "test", tmp_path)
    assert len(table) == 10_000
    assert str(DEBIAN) in found


def test_emnist_letters_stand_upright(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision hands them out with lines and columns changed, as their files have them."""
    upright = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    found = SimpleNamespace(data=torch.tensor(upright).transpose(1, 2), targets=torch.arange(5))
    monkeypatch.setattr(torchvision.datasets, "EMNIST", lambda *_, **__: found)
    table, _ = read_named("emnist-letters", "train", tmp_path)
    assert np.array_equal(table.images[:, 0], upright)
    assert table.names[1] == "a"


def _cut_off(monkeypatch: pytest.MonkeyPatch, kind: str, error: Exception) -> None:
    """Let the download of torchvision's data set fail; without one it answers that nothing is there, as it does."""

    def create(root: str, *, train: bool, download: bool) -> None:
        if download:
            raise error
        raise RuntimeError("Dataset not found. You can use download=True to download it")

    monkeypatch.setattr(torchvision.datasets, kind, create)


@pytest.mark.parametrize(
    "error",
    [
        urllib.error.URLError("timed out"),
        RuntimeError("Error downloading train.gz:\nTried https://example.org, got:\n<urlopen error timed out>\n"),
        TimeoutError(),
    ],
    ids=["URLError", "RuntimeError", "TimeoutError without a message"],
)
def test_data_that_can_not_be_had_name_the_remedy(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _cut_off(monkeypatch, "KMNIST", error)
    cache, timeout = tmp_path / "cache", socket.getdefaulttimeout()
    with pytest.raises(DataError) as caught:
        read_named("kmnist", "train", cache)
    (line,) = caught.value.lines
    assert line.startswith(f"kmnist: not in {cache}, ")
    assert "download failed" in line
    assert "\n" not in line
    assert "set data.fallback: sample" in line
    assert socket.getdefaulttimeout() == timeout


def test_reason_of_a_failed_download_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _cut_off(monkeypatch, "KMNIST", urllib.error.URLError("no route to host"))
    with pytest.raises(DataError, match="no route to host"):
        read_named("kmnist", "train", tmp_path)


def test_the_sample_and_fashion_mnist_are_among_the_names() -> None:
    """A contract of the design: both are values of data.train."""
    assert {"sample", "fashion-mnist"} <= set(NAMES)
