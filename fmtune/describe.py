"""What a source of images holds, what is wrong with it, and how it looks."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from fmtune.config import DataConfig
from fmtune.data import Classes, Loaded, blocks_of, load_split, measure_pixels
from fmtune.errors import InputError
from fmtune.files import check_writable
from fmtune.model import Pixels
from fmtune.readers import Table
from fmtune.stored import StoredTable
from fmtune.thumbnails import to_picture

_RARE_SHARE = 0.1
"""A class with less than this part of an even share is called rare."""
_GRID_COLUMNS = 10
_CELL_MARGIN, _CAPTION_HEIGHT, _MIN_CELL = 4, 12, 56
"""Pixels of the sheet of samples; small images are enlarged to the least cell."""


@dataclass(frozen=True)
class Description:
    """A source in figures.

    Attributes:
        loaded: the rows.
        classes: labels and names, and `counts` their rows.
        lowest, highest: the range of pixel values.
        pixels: mean and standard deviation of each channel, of pixels scaled to 0..1.
        problems: sentences on what may spoil a training.
    """

    loaded: Loaded
    classes: Classes
    counts: tuple[int, ...]
    lowest: int
    highest: int
    pixels: Pixels
    problems: tuple[str, ...]


def describe_source(config: DataConfig) -> Description:
    """Read the training source of `config` and look it over.

    Raises:
        DataError: the source is missing or malformed.
    """
    loaded = load_split(config, "train")
    table = loaded.table
    classes = Classes.of_table(table)
    counts = np.bincount(classes.indices(table.labels, loaded.source), minlength=len(classes))
    ranges = [(block.min(), block.max()) for block in blocks_of(table.images)]
    return Description(
        loaded,
        classes,
        tuple(map(int, counts)),
        int(min(low for low, _ in ranges)),
        int(max(high for _, high in ranges)),
        measure_pixels(table.images),
        tuple(_find_problems(table, classes, counts)),
    )


def check_sheet(path: Path) -> None:
    """Refuse a path that no sheet of samples can be written to.

    Raises:
        InputError: it is no PNG file by its name, or as of `check_writable`.
    """
    if path.suffix.lower() != ".png":
        raise InputError(f"{path}: expected a name that ends in .png")
    check_writable(path)


def draw_grid(table: Table | StoredTable, classes: Classes, path: Path) -> None:
    """Draw a sheet with a row of samples for each class, its name above."""
    rows = [np.flatnonzero(table.labels == label)[:_GRID_COLUMNS] for label in classes.labels]
    height, width = table.images.shape[2:]
    scale = max(1, -(-_MIN_CELL // max(height, width)))
    cell_height, cell_width = height * scale + _CELL_MARGIN, width * scale + _CELL_MARGIN
    row_height = cell_height + _CAPTION_HEIGHT + _CELL_MARGIN
    sheet = Image.new("RGB", (_GRID_COLUMNS * cell_width + _CELL_MARGIN, len(rows) * row_height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, samples in enumerate(rows):
        draw.text((_CELL_MARGIN, i * row_height), f"{classes.labels[i]}  {classes.names[i]}", fill="black")
        for j, sample in enumerate(samples):
            size = width * scale, height * scale
            picture = to_picture(table.images[sample]).resize(size, Image.Resampling.NEAREST)
            sheet.paste(picture, (_CELL_MARGIN + j * cell_width, i * row_height + _CAPTION_HEIGHT))
    sheet.save(path)


def _find_problems(table: Table | StoredTable, classes: Classes, counts: NDArray[np.int64]) -> list[str]:
    problems = []
    if len(classes) < 2:
        problems.append("there is one class only; a training needs two or more")
    rare = [classes.names[i] for i in np.flatnonzero(counts < _RARE_SHARE * len(table) / len(classes))]
    if rare:
        problems.append(f"rare classes, with less than a tenth of an even share: {', '.join(rare)}")
    constant, keys = 0, []
    for block in blocks_of(table.images):
        flat = block.reshape(len(block), -1)
        constant += int((flat.min(axis=1) == flat.max(axis=1)).sum())
        # Of images that are not held whole, only these are.
        keys += [hashlib.blake2b(row.data, digest_size=16).digest() for row in flat]
    if constant:
        problems.append(f"{constant:,} images are of one value all over")
    _, first, group = np.unique(np.array(keys, "V16"), return_index=True, return_inverse=True)
    if repeated := len(table) - len(first):
        problems.append(
            f"{repeated:,} rows repeat the image of another, which may put the same image on both sides of a split"
        )
    if conflicting := int((table.labels != table.labels[first][group]).sum()):
        problems.append(f"{conflicting:,} of those have another label")
    return problems
