"""Pixels on the device: held once as uint8, cut out, mirrored and normalised a batch at a time.

Lives here: everything between uint8 images and what a network is fed. Does not live here: resizing and channels
(common/preprocessing) and which samples make a batch (loop).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from consilience.common.errors import StudentError
from consilience.common.preprocessing import ImageRows, fit_shape
from consilience.common.settings import Preprocessing

_CHUNK = 4096
"""Images shaped at once: bounds the memory that resizing takes beside the result."""


def default_device() -> torch.device:
    """Return the CUDA device if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Normalise:
    """(b, H, W, C) uint8 -> (b, C, H, W) float32 in channels_last: (x / 255 - mean) / std per channel."""

    def __init__(self, preprocessing: Preprocessing, device: torch.device) -> None:
        self._mean = torch.tensor(preprocessing.mean, dtype=torch.float32, device=device)
        self._std = torch.tensor(preprocessing.std, dtype=torch.float32, device=device)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Normalise pixels on the device; the same arithmetic as common/preprocessing's."""
        return pixels.float().div_(255).sub_(self._mean).div_(self._std).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Windows:
    """Where each image of a batch is cut out of its padded self: (b,) int64 `down` and `right`, (b,) bool `mirror`.

    The offsets are pixels, negative for up and left.
    """

    down: Tensor
    right: Tensor
    mirror: Tensor

    @staticmethod
    def draw(count: int, shape: tuple[int, int], generator: torch.Generator, *, flip: bool) -> Windows:
        """Draw windows for images of `shape` (H, W): up to an eighth of the size away, mirrored with chance 1/2."""
        height, width = (max(1, size // 8) for size in shape)
        return Windows(
            torch.randint(-height, height + 1, (count,), generator=generator),
            torch.randint(-width, width + 1, (count,), generator=generator),
            torch.rand(count, generator=generator) < (0.5 if flip else 0.0),
        )

    def __getitem__(self, batch: slice) -> Windows:
        return Windows(self.down[batch], self.right[batch], self.mirror[batch])


class Pixels:
    """All images of a training, (n, H, W, C) uint8: on its device, channels_last as they are.

    On a CPU images that come from the disk and need no reshaping stay there, and a batch is read when it is wanted.
    """

    def __init__(self, images: ImageRows, preprocessing: Preprocessing, device: torch.device) -> None:
        """Take (n, H, W, C) uint8, n >= 1, shaped as `preprocessing` says. Raises `StudentError` for anything else."""
        if images.ndim != 4 or images.dtype != np.uint8:
            raise StudentError(
                f"Images have shape {images.shape} and type {images.dtype}; allowed: (n, H, W, C) uint8",
                hint="Convert the images",
            )
        first = fit_shape(np.asarray(images[:1]), preprocessing)
        self.device, self._count, self._shape = device, len(images), first.shape[1:]
        stays = device.type == "cpu" and not isinstance(images, np.ndarray) and self._shape == images.shape[1:]
        self._images = images if stays else None
        self._pixels = torch.empty((0 if stays else self._count, *self._shape), dtype=torch.uint8, device=device)
        for start in range(0, len(self._pixels), _CHUNK):
            chunk = fit_shape(np.array(images[start : start + _CHUNK]), preprocessing)
            self._pixels[start : start + _CHUNK] = torch.from_numpy(chunk)
        self._normalise = Normalise(preprocessing, device)

    def __len__(self) -> int:
        return self._count

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        height, width, channels = self._shape
        return height, width, channels

    def batch(self, ids: Tensor, windows: Windows | None) -> Tensor:
        """Return the images `ids` (b,) on the device as (b, C, H, W) float32, cut out by `windows` if given."""
        return self._normalise(self._held(ids) if windows is None else self.cut(ids, windows))

    def _held(self, ids: Tensor) -> Tensor:
        return self._pixels[ids] if self._images is None else torch.from_numpy(self._images[ids.numpy()])

    def cut(self, ids: Tensor, windows: Windows) -> Tensor:
        """Return (b, H, W, C) uint8: each image through its window, as if padded by reflection.

        One gather over all that is held does selection, shift and mirroring; nothing is padded in memory.
        """
        pixels = self._pixels
        if self._images is not None:
            pixels, ids = self._held(ids), torch.arange(len(ids))
        height, width, channels = self._shape
        rows = _reflected(height, windows.down.to(self.device))
        columns = _reflected(width, windows.right.to(self.device))
        columns = torch.where(windows.mirror.to(self.device)[:, None], columns.flip(1), columns)
        places = ((ids[:, None] * height + rows) * width)[:, :, None] + columns[:, None, :]
        flat = pixels.view(-1, channels).index_select(0, places.view(-1))
        return flat.view(len(ids), height, width, channels)


def _reflected(size: int, offsets: Tensor) -> Tensor:
    """Return (b, size) positions offset, offset + 1, ..., those outside [0, size) reflected at the edge pixels."""
    places = (torch.arange(size, device=offsets.device) + offsets[:, None]).abs()
    return torch.where(places < size, places, 2 * (size - 1) - places)
