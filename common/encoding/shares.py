"""The largest classes alone in few bits: `top-K-u8`, each class and its share of what is left as one whole number.

A row over k classes has m = min(K, k) cells, of the largest classes in falling order, equal ones by id (position in the
site's own order of classes). Cell j = 1..m tells its class and the share s_j of what the classes before it leave,

    s_j = p_j / (1 - p_1 - ... - p_(j-1))        so that p_j = s_j (1 - s_1) ... (1 - s_(j-1))

as the number id * L + l. It has 1, 2 or 4 bytes, the fewest w in which every class has 16 numbers, and
L = min(256, 256^w // k). The largest of the r + 1 classes that are left has at least an even share of them, so that
what it leaves is told in L square steps between nothing and r / (r + 1):

    1 - s_j = r / (r + 1) ((l + 1/2) / L)^2        r = k - j

Steps are finest where little is left. Every row of cells that name different classes is a distribution: what they leave
is shared out evenly over the classes not sent. A step can lift a class above the one before; it is then decoded as
that one is, less 2^-16 of it, and the first class has what is cut off, so that the likeliest class stays that. With
e = 1 / L + 1 / (4 L^2), and but for these 2^-16,

    |error of s_j| <= e before,    |error of p_j| <= j e from the second class on,    |error of p_1| <= m^2 e

(what the first m leave is off by m e at most, and p_1 by what all others are off together; alone, by e).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from consilience.common.encoding.floats import RowProblem, first
from consilience.common.encoding.largest import Sent, largest, named_twice, names_none

LEAST_LEVELS = 16
"""How many numbers every class has, at least."""
MOST_LEVELS = 256
_APART = 2.0**-16
"""How far the logarithms of two classes are apart that the steps would have in the other order."""


def _cell(classes: int) -> tuple[np.dtype[np.unsignedinteger], int]:
    """Return the type of a cell over `classes` classes, and how many levels it tells."""
    widths = (("u1", 2**8), ("<u2", 2**16), ("<u4", 2**32))
    name, most = next((name, most) for name, most in widths if most >= LEAST_LEVELS * classes)
    return np.dtype(name), min(MOST_LEVELS, most // classes)


def _even(sent: int, classes: int) -> NDArray[np.float64]:
    """Return r / (r + 1), (sent,): what the largest class leaves where all that are left are even."""
    left = classes - np.arange(1, sent + 1, dtype=np.float64)
    return left / (left + 1)


@dataclass(frozen=True)
class LargestShares:
    """The `most` largest classes, each with its share of what is left."""

    most: int

    def row_bytes(self, classes: int) -> int:
        """Return the bytes of one row."""
        return min(self.most, classes) * _cell(classes)[0].itemsize

    def pack(self, rows: NDArray[np.float32]) -> bytes:
        """Encode (n, k) log-probabilities."""
        classes = rows.shape[1]
        sent, (dtype, levels) = min(self.most, classes), _cell(classes)
        ids = largest(rows, sent)
        order = np.argsort(-np.take_along_axis(rows, ids, axis=1), axis=1, kind="stable")
        ids = np.take_along_axis(ids, order, axis=1)
        probs = np.exp(rows, dtype=np.float64)
        told = np.take_along_axis(probs, ids, axis=1)
        np.put_along_axis(probs, ids, 0.0, axis=1)
        # Added up from the smallest on, so that what little is left keeps its digits.
        left = np.cumsum(np.concatenate([told, probs.sum(axis=1, keepdims=True)], axis=1)[:, ::-1], axis=1)[:, ::-1]
        even = _even(sent, classes)
        with np.errstate(divide="ignore", invalid="ignore"):
            # Nothing at all is shared out evenly.
            root = np.sqrt(np.nan_to_num(left[:, 1:] / left[:, :-1] / even, nan=1.0, posinf=1.0))
        level = np.clip(np.floor(root * levels), 0, levels - 1).astype(np.int64)
        if sent == classes:
            level[:, -1] = 0
        return bytes((ids * levels + level).astype(dtype).tobytes())

    def problem(self, raw: NDArray[np.uint8], classes: int) -> RowProblem | None:
        """Say which of (n, row_bytes) encoded rows is not as it must be; None when all are."""
        ids, level = self._parts(raw, classes)
        if found := names_none(ids, classes):
            return found
        if (row := named_twice(ids)) is not None:
            return row, "names a class twice"
        if ids.shape[1] < classes or (row := first(level[:, -1] > 0)) is None:
            return None
        return row, "leaves something behind its last class"

    def unpack(self, raw: NDArray[np.uint8], classes: int) -> NDArray[np.float32]:
        """Return the (n, k) log-probabilities of (n, row_bytes) encoded rows that have no problem; they sum to 1."""
        return self.sent(raw, classes).in_full(classes)

    def sent(self, raw: NDArray[np.uint8], classes: int) -> Sent:
        """Return what `unpack` does, but not more than was sent."""
        ids, level = self._parts(raw, classes)
        sent = ids.shape[1]
        rest = _even(sent, classes) * ((level + 0.5) / _cell(classes)[1]) ** 2
        with np.errstate(divide="ignore"):
            left = np.cumsum(np.log(rest), axis=1)
        values = np.log1p(-rest)
        values[:, 1:] += left[:, :-1]
        apart = _APART * np.arange(sent)
        falling = np.minimum.accumulate(values + apart, axis=1) - apart
        lifted = np.flatnonzero(np.any(values > falling + _APART / 2, axis=1))
        cut = np.exp(values[lifted]).sum(axis=1) - np.exp(falling[lifted]).sum(axis=1)
        values[lifted] = falling[lifted]
        values[lifted, 0] = np.log(np.exp(values[lifted, 0]) + cut)
        other = left[:, -1] - np.log(classes - sent) if sent < classes else np.full(len(raw), -np.inf)
        return Sent(ids, values.astype(np.float32), other.astype(np.float32))

    def _parts(self, raw: NDArray[np.uint8], classes: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return ids and levels (n, m)."""
        dtype, levels = _cell(classes)
        cells = raw.view(dtype).astype(np.int64)
        return cells // levels, cells % levels
