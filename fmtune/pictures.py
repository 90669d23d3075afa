"""PNG and JPEG files as a model takes images."""

from __future__ import annotations

import glob
import io
import os

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from pyarrow import fs

from fmtune.errors import DataError
from fmtune.files import File, readable

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's name of pictures with so many channels."""
_ENDINGS = (".png", ".jpg", ".jpeg")


def is_picture(path: str) -> bool:
    """Whether a file is a picture by its name."""
    return path.lower().endswith(_ENDINGS)


def find_pictures(folder: str) -> list[File]:
    """The PNG and JPEG files in a folder and below it, hidden ones left out, in the order of their names.

    Raises:
        DataError: there are none.
    """
    names = sorted(filter(is_picture, glob.iglob("**", root_dir=folder, recursive=True)))
    if not names:
        raise DataError(f"{folder}: no PNG or JPEG files in the folder; for tables give a glob, such as {folder}/*.csv")
    root = os.path.abspath(folder)
    return [File(fs.LocalFileSystem(), os.path.join(root, name), os.path.join(folder, name)) for name in names]


def read_picture(file: File, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """A picture as uint8 (C, H, W) of the shape given, by `fit_picture`.

    Raises:
        DataError: the file is no PNG or JPEG image, or a spoiled one.
    """
    with readable(file), file.open() as stream:
        content = io.BytesIO(stream.read())
    try:
        with Image.open(content, formats=("PNG", "JPEG")) as picture:
            return fit_picture(picture, shape)
    except UnidentifiedImageError:
        raise DataError(f"{file.place}: not an image; expected PNG or JPEG") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{file.place}: can't be decoded ({error})") from None


def fit_picture(picture: Image.Image, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """A picture as uint8 (C, H, W) of the shape given, C a key of `MODES`.

    It is turned upright, where its camera noted how it was held, and brought to the channels; then it is stretched to
    height and width, bilinear and antialiased, unless it has them.
    """
    channels, height, width = shape
    upright = ImageOps.exif_transpose(picture)
    if upright.mode == "I;16":
        # Pillow would make white of all that is above 255.
        upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    converted = upright.convert(MODES[channels])
    if converted.size != (width, height):
        converted = converted.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(converted).reshape(height, width, channels).transpose(2, 0, 1)
