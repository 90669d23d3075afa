"""The way of the data: source, Arrow, one Parquet file, one Ray Dataset that all trials share."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import platformdirs
import pyarrow as pa
from numpy.typing import NDArray

import fmtune.datasets as datasets
from fmtune.config import DataConfig
from fmtune.datasets import Split
from fmtune.errors import DataError
from fmtune.files import File, is_url
from fmtune.model import Pixels
from fmtune.pieces import find_labelled_pieces
from fmtune.readers import Layout, Table, complete_idx, read_files, to_tensors
from fmtune.sources import find_files, open_place
from fmtune.stored import Images, StoredImages, StoredTable, read_table, write_table

_CACHE_FORMAT = 4
"""Part of each cached table's key: raise it when what is stored for a source changes."""
_UNPACKED = 10
"""Bytes of pixels that a byte of a compressed file may hold; in other files it is one at most."""
_PART_BYTES = 16 * 2**20
"""Bytes of pixels that are looked at together."""
MEMORY = "memory:"
"""What the source of a table that was given in memory begins with; the rest is its key in the cache."""


@dataclass(frozen=True)
class Loaded:
    """A split, and where it came from.

    Attributes:
        table: images and labels as in the source; images that are more than `data.memory` allows stay in the cache.
        source: what was asked for, or the stand-in that was taken.
        origin: a line for people: where the images were found.
        key: identifies the content by the source's identity and options.
    """

    table: Table | StoredTable
    source: str
    origin: str
    key: str


@dataclass(frozen=True)
class Classes:
    """The classes that a model tells apart: the source's label of each index, and its name."""

    labels: tuple[int, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def of_entries(cls, entries: Sequence[Mapping[str, Any]]) -> Classes:
        """What `as_entries` gave."""
        return cls(tuple(entry["label"] for entry in entries), tuple(entry["name"] for entry in entries))

    def as_entries(self) -> list[dict[str, Any]]:
        """JSON values, one for each class in its order."""
        return [{"label": label, "name": name} for label, name in zip(self.labels, self.names, strict=True)]

    @classmethod
    def of_table(cls, table: Table | StoredTable) -> Classes:
        labels = [int(label) for label in np.unique(table.labels)]
        return cls(tuple(labels), tuple(table.names.get(label) or str(label) for label in labels))

    def indices(self, labels: NDArray[np.int64], place: str) -> NDArray[np.int64]:
        """The class index (N,) of each label (N,).

        Raises:
            DataError: a label is of no class.
        """
        known = np.array(self.labels)
        indices = np.searchsorted(known, labels).clip(max=len(known) - 1)
        strange = np.flatnonzero(known[indices] != labels)
        if len(strange):
            raise DataError(
                f"{place}: row {strange[0]}: label {labels[strange[0]]}; the training rows have "
                f"{', '.join(map(str, self.labels[:12]))}{', ...' if len(known) > 12 else ''}"
            )
        return indices


@dataclass(frozen=True)
class TrainingData:
    """What a search trains on: all training rows, and which of them are held out for validation.

    Attributes:
        images: uint8 (N, C, H, W), in memory or in the cache.
        labels: int64 (N,), class indices.
        train_rows, validation_rows: int64 (M,), which rows each part has.
        classes: labels and names of the class indices.
        pixels: channels, and the statistics of the training part alone.
        loaded: where the rows come from.
    """

    images: Images
    labels: NDArray[np.int64]
    train_rows: NDArray[np.int64]
    validation_rows: NDArray[np.int64]
    classes: Classes
    pixels: Pixels
    loaded: Loaded

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @property
    def fingerprint(self) -> str:
        """What tells other data apart, wherever the files lie: by shape, labels, and the pixels' statistics."""
        # To so many digits as no two machines' arithmetic differs in.
        statistics = [round(value, 6) for value in (*self.pixels.mean, *self.pixels.std)]
        content = hashlib.sha256(repr((self.images.shape, self.classes, statistics)).encode())
        content.update(self.labels.data)
        return content.hexdigest()[:16]


def cache_folder() -> Path:
    """Where downloads are kept, and parsed tables too: `FMTUNE_CACHE`, or the user's cache folder.

    Of a URL in `FMTUNE_CACHE` only parsed tables make use, which several machines read.
    """
    place = os.environ.get("FMTUNE_CACHE")
    return Path(place if place and not is_url(place) else platformdirs.user_cache_dir("fmtune"))


def weights_folder() -> Path:
    """Where downloaded weights are kept."""
    return cache_folder() / "weights"


def load_training_data(config: DataConfig) -> TrainingData:
    """Read the training source and hold a validation part out of it.

    With `validation: test`, the validation rows are the test split's, which are then read here.

    Raises:
        DataError: the source is missing, malformed, or unfit for training.
    """
    loaded = load_split(config, "train")
    classes = Classes.of_table(loaded.table)
    if len(classes) < 2:
        raise DataError(f"{loaded.source}: one class only ({classes.labels[0]}); expected two or more")
    images, labels = loaded.table.images, classes.indices(loaded.table.labels, loaded.source)
    if config.validation == "test":
        held_out = load_test_split(config, loaded)
        if isinstance(images, StoredImages) or isinstance(held_out.table, StoredTable):
            raise DataError("data.validation: test: more images than data.memory allows; give a fraction such as 0.1")
        train_rows = np.arange(len(images))
        validation_rows = len(images) + np.arange(len(held_out.table))
        images = np.concatenate([images, held_out.table.images])
        labels = np.concatenate([labels, classes.indices(held_out.table.labels, held_out.source)])
    else:
        train_rows, validation_rows = split_rows(labels, config.validation, config.seed, loaded.source)
    pixels = measure_pixels(images, config.resize, train_rows)
    return TrainingData(images, labels, train_rows, validation_rows, classes, pixels, loaded)


def load_test_split(config: DataConfig, train: Loaded) -> Loaded:
    """Read the test split: `data.test`, or the test split of the name that the training rows came from.

    Raises:
        DataError: there is none, or it can't be read.
    """
    source = config.test or train.source
    if config.test is None and train.source not in datasets.NAMES:
        raise DataError(f"{train.source}: a file has no test split of its own; set data.test")
    # Images of another source must not stand in for those that the model is to be measured on.
    loaded = load_split(config.model_copy(update={"train": source, "fallback": None}), "test")
    _check_same_shape(loaded, train)
    return loaded


def has_test_split(config: DataConfig, train: Loaded) -> bool:
    """Whether a test split is named; it is not looked at."""
    return config.test is not None or train.source in datasets.NAMES


def load_split(config: DataConfig, split: Split) -> Loaded:
    """Read the source `config.train` from the cache of parsed tables, or parse and cache it.

    Raises:
        DataError: the source is missing or malformed, and `config.fallback` does not stand in.
    """
    source, memory = config.train, config.memory or _spare_memory()
    if source.startswith(MEMORY):
        return _load_kept(source, memory)
    if source not in datasets.NAMES:
        return _load_files(source, Layout(config.label, config.shape), memory)
    try:
        return _load_named(source, split)
    except DataError:
        if config.fallback is None:
            raise
        fallback = _load_named(config.fallback, split)
        return Loaded(fallback.table, fallback.source, f"stand-in for {source}; {fallback.origin}", fallback.key)


def keep_table(table: Table) -> str:
    """Keep a table that was given in memory in the cache of parsed tables, by its content.

    Returns:
        The source, `memory:KEY`, by which `load_split` finds it: the same for the same content.
    """
    content = hashlib.sha256(repr((_CACHE_FORMAT, table.images.shape, table.names)).encode())
    content.update(table.images.reshape(-1).data)
    content.update(table.labels.data)
    key = content.hexdigest()[:32]
    cached = _cached(key)
    if not cached.exists:
        write_table(cached, [table])
    return f"{MEMORY}{key}"


def split_rows(
    labels: NDArray[np.int64], fraction: float, seed: int, place: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sorted rows of a training and a validation part; the latter has `fraction` of each class, and one at least.

    The split depends on the labels, the fraction and the seed alone.

    Raises:
        DataError: a class has one row only.
    """
    random = np.random.default_rng(seed)
    held_out = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        if len(rows) < 2:
            raise DataError(f"{place}: row {rows[0]}: the only one of its class; expected two or more to hold one out")
        count = min(max(round(len(rows) * fraction), 1), len(rows) - 1)
        held_out.append(random.permutation(rows)[:count])
    validation = np.sort(np.concatenate(held_out))
    return np.setdiff1d(np.arange(len(labels)), validation), validation


def measure_pixels(images: Images, resize: int | None = None, rows: NDArray[np.int64] | None = None) -> Pixels:
    """Mean and standard deviation of each channel of uint8 (N, C, H, W), of pixels scaled to 0..1.

    They are of the images as they come; `resize` is what the network will see them at. `rows` are those that count,
    ascending; all by default.
    """
    # From counts of the 256 values, exact and without a float copy of the images.
    counts = np.zeros((images.shape[1], 256), np.int64)
    for block in blocks_of(images, rows):
        counts += np.stack([np.bincount(block[:, c].ravel(), minlength=256) for c in range(block.shape[1])])
    values = np.arange(256) / 255
    share = counts / counts.sum(axis=1, keepdims=True)
    mean = share @ values
    std = np.sqrt((share * (values - mean[:, None]) ** 2).sum(axis=1))
    # A channel of one value has nothing to scale.
    std[std == 0] = 1.0
    return Pixels(images.shape[1], tuple(map(float, mean)), tuple(map(float, std)), resize)


def blocks_of(images: Images, rows: NDArray[np.int64] | None = None) -> Iterator[NDArray[np.uint8]]:
    """The images of ascending rows, or of all, in parts of some megabytes."""
    if isinstance(images, StoredImages):
        yield from images.blocks(rows)
        return
    step = max(1, _PART_BYTES // math.prod(images.shape[1:]))
    for first in range(0, len(images if rows is None else rows), step):
        part = slice(first, first + step)
        yield images[part if rows is None else rows[part]]


def to_arrow(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> pa.Table:
    """A table of fixed-shape tensors (C, H, W) in the column `image`, and `label`; the images are not copied."""
    return pa.table({"image": to_tensors(images), "label": pa.array(labels)})


def _check_same_shape(other: Loaded, train: Loaded) -> None:
    if other.table.images.shape[1:] != train.table.images.shape[1:]:
        raise DataError(
            f"{other.source}: images are {other.table.images.shape[1:]}, the training rows' "
            f"{train.table.images.shape[1:]} (channels, height, width)"
        )


def _load_named(name: str, split: Split) -> Loaded:
    table, origin = datasets.read_named(name, split, cache_folder() / "datasets")
    return Loaded(table, name, origin, f"{name}-{split}")


def _load_kept(source: str, memory: int) -> Loaded:
    key = source.removeprefix(MEMORY)
    cached = _cached(key)
    if not cached.exists:
        raise DataError(
            f"{source}: given in memory once, and not in the cache ({cached.place}); give the same data again"
        )
    return Loaded(read_table(cached, memory), source, f"given in memory, kept in {cached.place}", key)


def _load_files(source: str, layout: Layout, memory: int) -> Loaded:
    files = complete_idx(find_files(source))
    key = _identify(files, layout)
    cached = _cached(key)
    if cached.exists:
        return Loaded(read_table(cached, memory), source, f"parsed before, from {cached.place}", key)
    origin = f"read from {f'{len(files)} files' if len(files) > 1 else files[0].place}"
    if sum(map(_most_pixels, files)) > memory:
        # In pieces, which takes longer.
        write_table(cached, _read_pieces(files, layout, source))
        return Loaded(read_table(cached, memory), source, origin, key)
    table = read_files(files, layout)
    write_table(cached, [table])
    # Well compressed, it may have been more than its files' sizes made expect.
    is_held = table.images.nbytes <= memory
    return Loaded(table if is_held else read_table(cached, memory), source, origin, key)


def _most_pixels(file: File) -> int:
    """Bytes of pixels that a file may be expected to hold."""
    return file.size * (_UNPACKED if file.path.endswith((".gz", ".parquet", ".pq")) else 1)


def _read_pieces(files: list[File], layout: Layout, source: str) -> Iterator[Table]:
    """The tables that the files' pieces make.

    Raises:
        DataError: a file can't be read, or there is no row.
    """
    rows = 0
    for piece in find_labelled_pieces(files, layout):
        for table in piece.read():
            rows += len(table)
            yield table
    if rows == 0:
        raise DataError(f"{source}: no rows; expected one image a row")


def _identify(files: list[File], layout: Layout) -> str:
    """A key of the files' paths, sizes and times of change, and of how they are read."""
    identity: list[object] = [_CACHE_FORMAT, layout.label, layout.shape]
    for file in files:
        info = file.system.get_file_info(file.path)
        identity.append((file.place if is_url(file.place) else file.path, info.size, info.mtime_ns))
    return hashlib.sha256(repr(identity).encode()).hexdigest()[:32]


def _cached(key: str) -> File:
    """Where the cache has, or is to have, a parsed table."""
    place = os.environ.get("FMTUNE_CACHE", "")
    if not is_url(place):
        return open_place(f"{cache_folder()}/tables/{key}.parquet")
    url = urlsplit(place)
    return open_place(url._replace(path=f"{url.path.rstrip('/')}/tables/{key}.parquet").geturl())


def _spare_memory() -> int:
    """Bytes of images that each process may hold: half of the machine's memory, shared out.

    Each CPU may have a trial's process; the driver and Ray's object store hold the images too.
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if limit.exists() and (text := limit.read_text().strip()).isdecimal():
            total = min(total, int(text))
    return total // (2 * ((os.cpu_count() or 1) + 2))
