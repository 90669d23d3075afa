"""Images as pictures for people to look at."""

from __future__ import annotations

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_LONGER_SIDE = 128
"""Pixels that an encoded picture has at most: larger ones would make a page of them too heavy to open."""


def to_picture(image: NDArray[np.uint8]) -> Image.Image:
    """An image (C, H, W) in RGB if it has three channels or more, of which the first three are shown; else in grey."""
    return Image.fromarray(image[:3].transpose(1, 2, 0) if len(image) >= 3 else image[0])


def encode_png(image: NDArray[np.uint8]) -> str:
    """A PNG of an image (C, H, W) in base64, scaled down to 128 pixels on its longer side if it has more."""
    picture = to_picture(image)
    picture.thumbnail((_LONGER_SIDE, _LONGER_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
