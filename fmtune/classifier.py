"""A trained network and all that is needed to use it, as one torch module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from fmtune.config import TrialConfig
from fmtune.data import Classes
from fmtune.errors import InputError
from fmtune.model import Pixels, Preprocess, ResNet
from fmtune.pictures import MODES, fit_picture
from fmtune.training import EVALUATION_BATCH


@dataclass(frozen=True)
class Predictions:
    """What a model takes N images for.

    Attributes:
        labels: int64 (N,), the most probable class of each, as the training rows labelled it.
        names: str (N,), that class's name.
        probabilities: float32 (N, classes), in the order of the model's `classes`.
    """

    labels: NDArray[np.int64]
    names: NDArray[np.str_]
    probabilities: NDArray[np.float32]


class TrainedModel(nn.Module):
    """A network with its preprocessing: uint8 images (N, C, H, W) on its device to float32 logits (N, classes).

    Args:
        network: gives logits (N, classes) for normalised float images (N, C, H, W).
        preprocess: makes those of uint8 (N, C, H, W).
        classes: labels and names of the logits.
        config: what it was trained with.
        shape: (channels, height, width) of the images that it was trained on.
        pixels: the statistics that normalise them.
    """

    network: ResNet
    preprocess: Preprocess

    def __init__(
        self,
        network: ResNet,
        preprocess: Preprocess,
        classes: Classes,
        config: TrialConfig,
        shape: tuple[int, int, int],
        pixels: Pixels,
    ) -> None:
        super().__init__()
        self.network, self.preprocess = network, preprocess
        self.classes, self.config, self.shape, self.pixels = classes, config, shape, pixels

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(self.preprocess(images))
        return logits

    def predict(self, images: NDArray[np.uint8] | Image.Image | Sequence[Image.Image]) -> Predictions:
        """The class of each image.

        Args:
            images: uint8 (N, H, W), (N, H, W, C) or (N, C, H, W) of the height, width and channels that the model was
                trained on, or one image without the N; or a picture of Pillow's or a list of them, which are read as
                `fmtune predict` reads their files (`fit_picture`).

        Raises:
            InputError: the images are something else.
        """
        probabilities = self.predict_probabilities(to_batch(images, self.shape))
        best = probabilities.argmax(axis=1)
        return Predictions(np.array(self.classes.labels)[best], np.array(self.classes.names)[best], probabilities)

    @torch.no_grad()
    def predict_probabilities(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Probability (N, classes) of each class for uint8 images (N, C, H, W), in fp32."""
        device = next(self.parameters()).device
        batches = torch.tensor(images).split(EVALUATION_BATCH)
        parts: list[Tensor] = [self(batch.to(device)).softmax(dim=1).cpu() for batch in batches]
        return torch.cat(parts).numpy()


def to_batch(images: object, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """uint8 images (N, C, H, W) of what `TrainedModel.predict` takes, for a model of the shape (C, H, W).

    Raises:
        InputError: it is something else.
    """
    pictures = [images] if isinstance(images, Image.Image) else images
    if isinstance(pictures, list | tuple) and pictures and all(isinstance(one, Image.Image) for one in pictures):
        if shape[0] not in MODES:
            raise InputError(f"images: pictures have 1, 3 or 4 channels, the model takes {shape[0]}; give it arrays")
        return np.stack([fit_picture(picture, shape) for picture in pictures])
    if not isinstance(images, np.ndarray):
        raise InputError(
            f"images: a {type(images).__name__}; expected a numpy array of uint8, a picture of Pillow's or a list of "
            "them; tensors go to the model itself"
        )
    if images.dtype != np.uint8:
        raise InputError(f"images: of {images.dtype}; expected uint8, 0 to 255")
    return np.ascontiguousarray(_arrange(images, shape))


def _arrange(images: NDArray[np.uint8], shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """An image or a batch of them as (N, C, H, W)."""
    channels, height, width = shape
    for batch in (images, images[None]):
        if batch.shape[1:] == shape:
            return batch
        if batch.shape[1:] == (height, width, channels):
            return batch.transpose(0, 3, 1, 2)
        if channels == 1 and batch.shape[1:] == (height, width):
            return batch[:, None]
    raise InputError(
        f"images: of shape {images.shape}; expected (N, {height}, {width}, {channels}), (N, {channels}, {height}, "
        f"{width}){f', (N, {height}, {width})' if channels == 1 else ''}, or one such image"
    )
