"""What is taken from a layer's features before they leave: positions by averaging, channels by principal components.

Does not live here: which layers, and how much of each (taps), where components are kept (bases).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from consilience.client.features.layers import Maps
from consilience.common.moments import Moments


@dataclass(frozen=True)
class Basis:
    """Principal components of a layer: `directions` (k, C) orthonormal rows, and the channels' `mean` (C,), float32.

    `kept`: their share of the channels' variance.
    """

    directions: NDArray[np.float32]
    mean: NDArray[np.float32]
    kept: float

    def apply(self, features: Maps) -> Maps:
        """Return the components of features (n, C, ...), (n, k, ...)."""
        centred = features - self.mean.reshape(-1, *[1] * (features.ndim - 2))
        return np.ascontiguousarray(np.moveaxis(np.tensordot(self.directions, centred, axes=(1, 1)), 0, 1))


def averaged(features: Maps, size: int | None) -> Maps:
    """Average maps (n, C, H, W) down to at most `size` rows and columns: adaptive average pooling. Others stay."""
    if features.ndim == 2 or size is None or max(features.shape[2:]) <= size:
        return features
    rows, columns = (_windows(length, min(length, size)) for length in features.shape[2:])
    return np.asarray(rows @ features @ columns.T, np.float32)


def averaged_shape(shape: tuple[int, ...], size: int | None) -> tuple[int, ...]:
    """Return the shape that `averaged` makes of a sample's features of `shape`."""
    return shape if size is None else (shape[0], *(min(length, size) for length in shape[1:]))


def principal(moments: Moments, kept: int) -> Basis:
    """Return the `kept` first principal components of features with these moments of C >= `kept` channels.

    A direction's largest number, the first of equal ones, is positive: the same moments always give the same basis.
    Raises `StudentError` when nothing was seen.
    """
    values, vectors = np.linalg.eigh(moments.covariance)
    values, directions = values.clip(0)[::-1], vectors.T[::-1][:kept]
    largest = directions[np.arange(kept), np.abs(directions).argmax(axis=1)]
    directions = directions * np.where(largest < 0, -1.0, 1.0)[:, None]
    share = 1.0 if not values.sum() else float(min(1.0, values[:kept].sum() / values.sum()))
    # in C order: a file would take the numbers as they lie in memory
    return Basis(np.ascontiguousarray(directions, np.float32), moments.mean.astype(np.float32), share)


def _windows(length: int, parts: int) -> NDArray[np.float32]:
    """Return (parts, length): each row averages over its window, as torch's adaptive pooling cuts them."""
    weights = np.zeros((parts, length), np.float32)
    for part in range(parts):
        low, high = part * length // parts, -(-(part + 1) * length // parts)
        weights[part, low:high] = 1 / (high - low)
    return weights
