"""Log-odds of labels that do not exclude one another: one number a label, from -`MOST_ODDS` to `MOST_ODDS`.

A row over k labels is, as `f32` and `f16`, k numbers. As `u8` it is k signed bytes, square steps around 0: byte v from
-127 to 127 means sign(v) 24 (v / 127)^2, so that steps are finest where a label is uncertain, and

    |error of the log-odds d| <= 0.0386 sqrt(|d|) + 0.0004      where |d| <= 24
    |error of the probability| <= 0.0072

`top-K` has the m = min(K, k) likeliest labels (ids, then log-odds f16) and, where labels are left, the log-odds of
their mean probability (f16): they are decoded as all having that. `top-K-u8` is the same with the signed bytes of `u8`
in place of f16. `votes` has one bit a label, lowest bit first, 1 where the label is likelier than not; it is decoded as
a probability of 1 - OTHERS or OTHERS.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from consilience.common.encoding.floats import RowProblem, first
from consilience.common.encoding.largest import OTHERS, LargestRows, named_twice, names_none, not_in_order

MOST_ODDS = 100.0
"""No log-odds are told above it: beyond, no single answer can outweigh others without end."""
REACH = 24.0
"""How far from 0 the steps of `u8` reach: a probability of 4e-11."""
_STEPS = 127
_LEVELS_F32 = (np.sign(np.arange(-128, 128)) * REACH * (np.arange(-128, 128) / _STEPS) ** 2).astype(np.float32)
_LEVELS_F32[0] = np.nan  # byte 128 stands for nothing
_VOTE = float(np.log((1 - OTHERS) / OTHERS))
_BEYOND = f"holds a number that is not finite or beyond {MOST_ODDS:g}"


def bounded(log_odds: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """Return log-odds within `MOST_ODDS`."""
    return np.asarray(np.clip(log_odds, -MOST_ODDS, MOST_ODDS))


def log_odds_of(probs: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Return the log-odds of probabilities in [0, 1], within `MOST_ODDS`."""
    wide = np.asarray(probs, np.float64)
    with np.errstate(divide="ignore"):
        return np.asarray(bounded(np.log(wide) - np.log1p(-wide)), np.float64)


@dataclass(frozen=True)
class OddsFloats:
    """One number a label."""

    dtype: np.dtype[Any]

    def row_bytes(self, classes: int) -> int:
        """Return the bytes of one row."""
        return classes * self.dtype.itemsize

    def pack(self, rows: NDArray[np.float32]) -> bytes:
        """Encode (n, k) log-odds."""
        return bounded(rows).astype(self.dtype).tobytes()

    def problem(self, raw: NDArray[np.uint8], classes: int) -> RowProblem | None:
        """Say which of (n, row_bytes) encoded rows are no log-odds; None when all are."""
        row = first(~(np.abs(raw.view(self.dtype)) <= MOST_ODDS).all(axis=1))  # NaN fails
        return None if row is None else (row, _BEYOND)

    def unpack(self, raw: NDArray[np.uint8], classes: int) -> NDArray[np.float32]:
        """Return the (n, k) log-odds of (n, row_bytes) encoded rows that have no problem."""
        return raw.view(self.dtype).astype(np.float32)


def _to_bytes(log_odds: NDArray[np.floating[Any]]) -> NDArray[np.int8]:
    """Return the signed bytes of log-odds, in square steps around 0."""
    size = np.sqrt(np.minimum(np.abs(log_odds), np.float32(REACH)) / np.float32(REACH))
    signed: NDArray[np.int8] = np.copysign(np.rint(size * np.float32(_STEPS)), log_odds).astype(np.int8)
    return signed


def _of_bytes(signed: NDArray[np.int8]) -> NDArray[np.float32]:
    """Return what signed bytes stand for, NaN where for nothing."""
    levels: NDArray[np.float32] = _LEVELS_F32[signed.astype(np.int64) + 128]
    return levels


class OddsSquares:
    """One byte a label."""

    def row_bytes(self, classes: int) -> int:
        """Return the bytes of one row."""
        return classes

    def pack(self, rows: NDArray[np.float32]) -> bytes:
        """Encode (n, k) log-odds."""
        return _to_bytes(rows).tobytes()

    def problem(self, raw: NDArray[np.uint8], classes: int) -> RowProblem | None:
        """Say which of (n, k) encoded rows has a byte that stands for nothing, the first; None when none has."""
        row = first((raw.view(np.int8) == -128).any(axis=1))
        return None if row is None else (row, "has byte 128, which stands for no number")

    def unpack(self, raw: NDArray[np.uint8], classes: int) -> NDArray[np.float32]:
        """Return the (n, k) log-odds of (n, k) encoded rows that have no problem."""
        return _of_bytes(raw.view(np.int8))


class OddsLargest(LargestRows):
    """The `most` likeliest labels, and how likely the others are on average."""

    def pack(self, rows: NDArray[np.float32]) -> bytes:
        """Encode (n, k) log-odds."""
        out, ids = self._begun(rows, -MOST_ODDS, MOST_ODDS)
        if ids.shape[1] < rows.shape[1]:
            # Of probabilities near 1 it is what is left to 1 that tells them apart.
            applies, not_so = (expit(sign * rows.astype(np.float64)) for sign in (1, -1))
            for part in (applies, not_so):
                np.put_along_axis(part, ids, 0.0, axis=1)
            with np.errstate(divide="ignore"):
                mean = bounded(np.log(applies.sum(axis=1)) - np.log(not_so.sum(axis=1)))
            # Rounding may not lift it above the least that is sent.
            out["rest"] = np.minimum(self._as_sent(mean), out["values"][:, -1])
        return out.tobytes()

    def problem(self, raw: NDArray[np.uint8], classes: int) -> RowProblem | None:
        """Say which of (n, row_bytes) encoded rows is not as it must be; None when all are."""
        ids, values, rest = self._parts(raw, classes)
        if found := names_none(ids, classes, "label"):
            return found
        known = values if rest is None else np.concatenate([values, rest], axis=1)
        row = first(~np.all(np.abs(known) <= MOST_ODDS, axis=1))
        if row is not None:
            return row, _BEYOND
        if (row := not_in_order(ids, values)) is not None:
            return row, "is not in order: the likeliest first, equal ones by label"
        if (row := named_twice(ids)) is not None:
            return row, "names a label twice"
        if rest is None:
            return None
        row = first(np.any(rest > values[:, -1:], axis=1))
        return None if row is None else (row, "takes a label not sent for likelier than one that is")

    def unpack(self, raw: NDArray[np.uint8], classes: int) -> NDArray[np.float32]:
        """Return the (n, k) log-odds of (n, row_bytes) encoded rows that have no problem."""
        ids, values, rest = self._parts(raw, classes)
        out = np.empty((len(raw), classes), np.float32)
        if rest is not None:
            out[:] = rest
        np.put_along_axis(out, ids, values, axis=1)
        return out


class OddsLargestBytes(OddsLargest):
    """The same, each number a signed byte."""

    number = "i1"

    def _as_sent(self, numbers: NDArray[np.floating[Any]]) -> NDArray[np.int8]:
        return _to_bytes(numbers)

    def _as_read(self, numbers: NDArray[np.int8]) -> NDArray[np.float32]:
        return _of_bytes(numbers)


class OddsVotes:
    """Which labels are likelier than not, alone."""

    def row_bytes(self, classes: int) -> int:
        """Return the bytes of one row."""
        return -(-classes // 8)

    def pack(self, rows: NDArray[np.float32]) -> bytes:
        """Encode (n, k) log-odds."""
        return np.packbits(rows > 0, axis=1, bitorder="little").tobytes()

    def problem(self, raw: NDArray[np.uint8], classes: int) -> RowProblem | None:
        """Say which of (n, row_bytes) encoded rows has a bit behind its last label; None when none has."""
        spare = 8 * raw.shape[1] - classes
        row = first(np.any(raw[:, -1:] >= 1 << (8 - spare), axis=1)) if spare else None
        return None if row is None else (row, f"has a bit behind its last of {classes} labels")

    def unpack(self, raw: NDArray[np.uint8], classes: int) -> NDArray[np.float32]:
        """Return the (n, k) log-odds of (n, row_bytes) encoded rows that have no problem."""
        bits = np.unpackbits(raw, axis=1, count=classes, bitorder="little")
        return np.where(bits == 1, np.float32(_VOTE), np.float32(-_VOTE))
