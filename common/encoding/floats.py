"""Log-probabilities as floating-point numbers: `f32` and `f16`, and what every row of them must be.

An encoded row over k classes is k little-endian numbers, IEEE binary32 or binary16. f32 is exact; f16 has a relative
error of a log-probability of at most 2^-11, and keeps values below -65504 at -65504.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

SUM_TOLERANCE = 0.01
"""How far a row's probabilities may sum from 1. f16 rounding moves the sum by at most log(k) * 2^-11, 0.006 for
100,000 classes, because the sum of p |log p| is an entropy."""

LOWEST_F16 = float(np.finfo(np.float16).min)

RowProblem = tuple[int, str]
"""A row's number and what is wrong with it."""


@dataclass(frozen=True)
class Floats:
    """One number a class."""

    dtype: np.dtype[Any]

    def row_bytes(self, classes: int) -> int:
        """Return the bytes of one row."""
        return classes * self.dtype.itemsize

    def pack(self, rows: NDArray[np.float32]) -> bytes:
        """Encode (n, k) log-probabilities."""
        return np.maximum(rows, np.finfo(self.dtype).min).astype(self.dtype).tobytes()

    def problem(self, raw: NDArray[np.uint8], classes: int) -> RowProblem | None:
        """Say which of (n, row_bytes) encoded rows are no log-probabilities; None when all are."""
        return log_prob_problem(raw.view(self.dtype).astype(np.float32))

    def unpack(self, raw: NDArray[np.uint8], classes: int) -> NDArray[np.float32]:
        """Return the (n, k) log-probabilities of (n, row_bytes) encoded rows that have no problem."""
        return raw.view(self.dtype).astype(np.float32)


def log_prob_problem(values: NDArray[np.float32]) -> RowProblem | None:
    """Say which row of (n, k) values is not the log of a distribution, the first; None when all are."""
    row = first(~np.all(np.isfinite(values), axis=1))
    if row is not None:
        return row, "holds NaN or an infinite value"
    with np.errstate(over="ignore"):
        sums = np.exp(values).sum(axis=1, dtype=np.float64)
    row = first(np.asarray(np.abs(sums - 1) > SUM_TOLERANCE))
    return None if row is None else (row, f"has probabilities that sum to {sums[row]:.4g}, not 1")


def first(wrong: NDArray[np.bool_]) -> int | None:
    """Return the number of the first row that is wrong, None when none is."""
    return int(np.argmax(wrong)) if wrong.any() else None
