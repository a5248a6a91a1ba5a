"""uint8 images to what a classifier expects, in NumPy.

Lives here: resizing, channels, normalising: the same numbers at every site and at the server. Does not live
here: augmentation (common/nets) and decoding of files (common/data).
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from consilience.common.settings import Preprocessing

Images = NDArray[np.uint8]
"""(n, H, W, C) uint8, C 1 or 3."""


class ImageRows(Protocol):
    """What training takes images from: an array of them, or what reads them when it is indexed."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, H, W, C)."""

    @property
    def ndim(self) -> int:
        """4."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """uint8."""

    def __len__(self) -> int: ...

    def __getitem__(self, at: slice | NDArray[np.int64], /) -> Images:
        """Return the images at these places."""


def resize(images: Images, size: tuple[int, int]) -> Images:
    """Resize (n, H, W, C) uint8 to (n, *size, C), bilinear with antialiasing (Pillow's)."""
    n, height, width, channels = images.shape
    if (height, width) == size:
        return images
    out = np.empty((n, *size, channels), np.uint8)
    for i, image in enumerate(images):
        picture = Image.fromarray(image[..., 0] if channels == 1 else image)
        out[i] = np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BILINEAR)).reshape(out[i].shape)
    return out


def with_channels(images: Images, channels: int) -> Images:
    """Make (n, H, W, 1|3) uint8 have `channels` channels: repeat grey, or weigh colour by ITU-R 601 luma."""
    if images.shape[-1] == channels:
        return images
    if channels == 3:
        return np.repeat(images, 3, axis=-1)
    grey = images @ np.array([0.299, 0.587, 0.114], np.float32)
    return np.rint(grey).astype(np.uint8)[..., None]


def fit_shape(images: Images, preprocessing: Preprocessing) -> Images:
    """Return `images` with the size and channels that `preprocessing` declares, still uint8."""
    if preprocessing.channels is not None:
        images = with_channels(images, preprocessing.channels)
    return images if preprocessing.size is None else resize(images, preprocessing.size)


def preprocess(images: Images, preprocessing: Preprocessing) -> NDArray[np.float32]:
    """Return (n, C, H, W) float32: shaped by `fit_shape`, then (x / 255 - mean) / std per channel."""
    shaped = fit_shape(images, preprocessing)
    mean = np.asarray(preprocessing.mean, np.float32)
    std = np.asarray(preprocessing.std, np.float32)
    return np.ascontiguousarray(((shaped / np.float32(255) - mean) / std).transpose(0, 3, 1, 2), np.float32)
