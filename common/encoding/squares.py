"""Log-probabilities as bytes: `u8`, the distance to the row's largest in square steps.

A row over k classes is k bytes. Byte v means log p = max - 24 (v / 255)^2, and a row is made to sum to 1 when it is
decoded; so the largest class of a row has byte 0, and what is further than 24 below it (less than 4e-11 of it) is kept
there. Steps are fine where a class matters: with d = max - log p, and k classes,

    |error of log p| <= 0.0193 sqrt(d) + 0.0202 sqrt(log k) + 0.0003      where d <= 24
    |error of p|     <= 0.005 + 0.0085 sqrt(log k)

The first term is half a step, 24 ((v + 1/2)^2 - v^2) / 255^2. The others are what the sum to 1 adds: the mean of half
a step under p, and the mean of d under p is at most the entropy, log k. docs/encodings.md compares other steps.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from consilience.common.encoding.floats import RowProblem, first

REACH = 24.0
"""How far below the largest log-probability of a row the steps reach."""
_LEVELS = -REACH * (np.arange(256) / 255) ** 2
_MASSES = np.exp(_LEVELS)
_LEVELS_F32 = _LEVELS.astype(np.float32)


class Squares:
    """One byte a class."""

    def row_bytes(self, classes: int) -> int:
        """Return the bytes of one row."""
        return classes

    def pack(self, rows: NDArray[np.float32]) -> bytes:
        """Encode (n, k) log-probabilities."""
        below = np.minimum(rows.max(axis=1, keepdims=True) - rows, np.float32(REACH))
        return bytes(np.rint(np.sqrt(below / np.float32(REACH)) * np.float32(255)).astype(np.uint8).tobytes())

    def problem(self, raw: NDArray[np.uint8], classes: int) -> RowProblem | None:
        """Say which of (n, k) encoded rows has no largest class, the first; None when all have one."""
        row = first(raw.min(axis=1) > 0)
        return None if row is None else (row, "has no byte 0, which its largest class has")

    def unpack(self, raw: NDArray[np.uint8], classes: int) -> NDArray[np.float32]:
        """Return the (n, k) log-probabilities of (n, k) encoded rows that have no problem; they sum to 1."""
        totals: NDArray[np.float32] = np.log(_MASSES[raw].sum(axis=1, keepdims=True)).astype(np.float32)
        levels: NDArray[np.float32] = _LEVELS_F32[raw]
        return levels - totals
