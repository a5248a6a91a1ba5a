"""Count, mean and scatter of features' channels, gathered block by block.

Lives here: streaming first and second moments, in fp64. Does not live here: what is made of them (client/features,
server/student) and where features come from.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from consilience.common.errors import StudentError

Features = NDArray[np.floating]
"""(n, C) or (n, C, H, W) floating: n samples' features of C channels."""

_ROWS = 16_384
"""Rows widened to fp64 at once: bounds the memory beside a block."""


class Moments:
    """Moments of the rows of features: every position of every sample is a row of C channels.

    `count` rows, their `mean` (C,) and `scatter` (C, C) = sum of (row - mean)(row - mean)^T, fp64. Neither the blocks'
    sizes nor their order matter, up to rounding; merges go by Chan, Golub & LeVeque (1983), which loses no digits where
    the mean is large beside the spread.
    """

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.mean = np.zeros(channels)
        self.scatter = np.zeros((channels, channels))

    @property
    def covariance(self) -> NDArray[np.float64]:
        """(C, C) scatter / count. Raises `StudentError` when no row was seen."""
        if not self.count:
            raise StudentError(
                f"No features of {len(self.mean)} channels were seen, so nothing is known of them",
                hint="Give the features of at least one sample",
            )
        return self.scatter / self.count

    def update(self, features: Features) -> None:
        """Take in a block of features; it may be empty.

        Raises `StudentError` for another shape or number of channels, for values that are not finite, and for values
        whose squares are beyond fp64.
        """
        for rows in as_rows(features, len(self.mean)):
            mean = rows.mean(axis=0)
            centred = rows - mean
            self._take(len(rows), mean, centred.T @ centred)

    def merge(self, other: Moments) -> None:
        """Take in what `other`, of as many channels, has seen. Raises `StudentError` as `update`."""
        if len(other.mean) != len(self.mean):
            raise StudentError(
                f"Moments of {len(other.mean)} channels cannot join those of {len(self.mean)}",
                hint="Gather each layer's moments by themselves",
            )
        self._take(other.count, other.mean, other.scatter)

    def through(self, weight: NDArray[np.float64], bias: NDArray[np.float64]) -> Moments:
        """Return the moments of the rows x -> weight x + bias, with weight (D, C) and bias (D,)."""
        mapped = Moments(len(bias))
        mapped.count = self.count
        mapped.mean = weight @ self.mean + bias
        mapped.scatter = weight @ self.scatter @ weight.T
        return mapped

    def _take(self, count: int, mean: NDArray[np.float64], scatter: NDArray[np.float64]) -> None:
        if not count:
            return
        total = self.count + count
        with np.errstate(over="ignore", invalid="ignore"):
            apart = mean - self.mean
            joined = self.scatter + scatter + np.outer(apart, apart) * (self.count / total * count)
        if not np.isfinite(joined).all():
            raise StudentError(
                f"Features are as large as {np.abs(mean).max():.3g}: their squares are beyond what numbers hold",
                hint="Find out what the teacher computes there; features of a trained network are far smaller",
            )
        self.count, self.mean, self.scatter = total, self.mean + apart * (count / total), joined


def as_rows(features: Features, channels: int) -> Iterator[NDArray[np.float64]]:
    """Yield features (n, C) or (n, C, H, W) of any floating type as fp64 rows (m, C), in parts of bounded size.

    Rows are in the order sample, height, width. Yields nothing for empty features. Raises `StudentError` for another
    shape, another number of channels, and values that are not finite.
    """
    check_shape(features, channels)
    positions = int(np.prod(features.shape[2:]))
    step = max(1, _ROWS // max(positions, 1))
    for start in range(0, len(features) if positions else 0, step):
        part = np.asarray(features[start : start + step], np.float64)
        rows = np.moveaxis(part, 1, -1).reshape(-1, channels)
        if not np.isfinite(rows).all():
            row, channel = np.argwhere(~np.isfinite(rows))[0]
            raise StudentError(
                f"Features hold {rows[row, channel]} in channel {channel} of sample {start + row // positions}; "
                "allowed: finite numbers",
                hint="Ask the site whose features these are to check its teacher",
            )
        yield rows


def check_shape(features: Features, channels: int) -> None:
    """Raise `StudentError` unless `features` are floating, (n, channels) or (n, channels, H, W)."""
    if features.ndim not in (2, 4) or features.shape[1] != channels or not np.issubdtype(features.dtype, np.floating):
        raise StudentError(
            f"Features have shape {features.shape} and type {features.dtype}; allowed: (n, {channels}) or "
            f"(n, {channels}, H, W) floating",
            hint="Take the features from the tap that was declared",
        )
