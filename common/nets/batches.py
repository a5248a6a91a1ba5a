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
from consilience.common.preprocessing import Images, fit_shape
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
    """All images of a training on its device, (n, H, W, C) uint8: channels_last as they are."""

    def __init__(self, images: Images, preprocessing: Preprocessing, device: torch.device) -> None:
        """Copy (n, H, W, C) uint8, n >= 1, shaped as `preprocessing` says. Raises `StudentError` for anything else."""
        if images.ndim != 4 or images.dtype != np.uint8:
            raise StudentError(
                f"Images have shape {images.shape} and type {images.dtype}; allowed: (n, H, W, C) uint8",
                hint="Convert the images",
            )
        first = fit_shape(np.asarray(images[:1]), preprocessing)
        self.pixels = torch.empty((len(images), *first.shape[1:]), dtype=torch.uint8, device=device)
        for start in range(0, len(images), _CHUNK):
            chunk = fit_shape(np.array(images[start : start + _CHUNK]), preprocessing)
            self.pixels[start : start + _CHUNK] = torch.from_numpy(chunk)
        self._normalise = Normalise(preprocessing, device)

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of an image."""
        return self.pixels.shape[1], self.pixels.shape[2]

    def batch(self, ids: Tensor, windows: Windows | None) -> Tensor:
        """Return the images `ids` (b,) on the device as (b, C, H, W) float32, cut out by `windows` if given."""
        return self._normalise(self.pixels[ids] if windows is None else self.cut(ids, windows))

    def cut(self, ids: Tensor, windows: Windows) -> Tensor:
        """Return (b, H, W, C) uint8: each image through its window, as if padded by reflection.

        One gather over the whole cache does selection, shift and mirroring; nothing is padded in memory.
        """
        n, height, width, channels = self.pixels.shape
        device = self.pixels.device
        rows = _reflected(height, windows.down.to(device))
        columns = _reflected(width, windows.right.to(device))
        columns = torch.where(windows.mirror.to(device)[:, None], columns.flip(1), columns)
        places = ((ids[:, None] * height + rows) * width)[:, :, None] + columns[:, None, :]
        flat = self.pixels.view(n * height * width, channels).index_select(0, places.view(-1))
        return flat.view(len(ids), height, width, channels)


def _reflected(size: int, offsets: Tensor) -> Tensor:
    """Return (b, size) positions offset, offset + 1, ..., those outside [0, size) reflected at the edge pixels."""
    places = (torch.arange(size, device=offsets.device) + offsets[:, None]).abs()
    return torch.where(places < size, places, 2 * (size - 1) - places)
