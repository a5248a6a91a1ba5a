"""Log-probabilities and coverage as bytes and back, with every value checked on the way in.

An encoded block of n rows over k classes is n * k little-endian numbers, row by row: IEEE binary32 (`f32`) or
binary16 (`f16`, relative error of a log-probability at most 2^-11, values below -65504 kept at -65504). A block of
coverage is one number a row: binary16 (`f16`), or a byte (`u8`) of which v means (v + 0.5) / 256.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from consilience.common.errors import ProtocolError
from consilience.common.settings import CoverageEncoding, Encoding

DTYPES: dict[Encoding | CoverageEncoding, np.dtype[Any]] = {
    "f32": np.dtype("<f4"),
    "f16": np.dtype("<f2"),
    "u8": np.dtype("u1"),
}
LOWEST = {"f32": float(np.finfo(np.float32).min), "f16": float(np.finfo(np.float16).min)}

SUM_TOLERANCE = 0.01
"""How far a row's probabilities may sum from 1. f16 rounding moves the sum by at most log(k) * 2^-11, 0.006 for
100,000 classes, because the sum of p |log p| is an entropy."""


def row_bytes(classes: int, encoding: Encoding | CoverageEncoding) -> int:
    """Return the bytes of one row over `classes` classes; a row of coverage is over one."""
    return classes * DTYPES[encoding].itemsize


def encode(log_probs: NDArray[np.float32], encoding: Encoding) -> bytes:
    """Encode (n, k) log-probabilities."""
    return np.maximum(log_probs, LOWEST[encoding]).astype(DTYPES[encoding]).tobytes()


def decode(data: bytes | memoryview, rows: int, classes: int, encoding: Encoding) -> NDArray[np.float32]:
    """Decode `rows` rows over `classes` classes to (rows, classes) float32.

    Raises `ProtocolError` when the length is wrong, or a row is not the log of a distribution: NaN or infinite
    values, or probabilities that do not sum to 1 within `SUM_TOLERANCE`.
    """
    _need_bytes(data, rows, classes, encoding)
    values = np.frombuffer(data, DTYPES[encoding]).reshape(rows, classes).astype(np.float32)
    problem = log_prob_problem(values)
    if problem:
        raise ProtocolError(f"An answer holds no log-probabilities: {problem}")
    return values


def log_prob_problem(values: NDArray[np.float32]) -> str | None:
    """Say what keeps (n, k) values from being log-probabilities, naming the first bad row; None when nothing does."""
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        return f"row {int(np.argmin(finite))} holds NaN or an infinite value"
    with np.errstate(over="ignore"):
        sums = np.exp(values).sum(axis=1, dtype=np.float64)
    wrong = np.abs(sums - 1) > SUM_TOLERANCE
    if wrong.any():
        row = int(np.argmax(wrong))
        return f"row {row}'s probabilities sum to {sums[row]:.4g}, not 1"
    return None


def encode_coverage(coverage: NDArray[np.floating[Any]], encoding: CoverageEncoding) -> bytes:
    """Encode (n,) coverage in [0, 1]."""
    if encoding == "u8":
        coverage = np.minimum(coverage * 256, 255)
    return bytes(coverage.astype(DTYPES[encoding]).tobytes())


def decode_coverage(data: bytes | memoryview, rows: int, encoding: CoverageEncoding) -> NDArray[np.float32]:
    """Decode the coverage of `rows` samples to (rows,) float32.

    Raises `ProtocolError` when the length is wrong, or a value is NaN or not in [0, 1].
    """
    _need_bytes(data, rows, 1, encoding)
    values = wire_values(np.frombuffer(data, DTYPES[encoding]))
    problem = coverage_problem(values)
    if problem:
        raise ProtocolError(f"An answer holds no coverage: {problem}")
    return values


def wire_values(numbers: NDArray[Any]) -> NDArray[np.float32]:
    """Return what numbers as they are sent mean, float32 of the same shape: a byte v means (v + 0.5) / 256."""
    if numbers.dtype == np.uint8:
        return (numbers + np.float32(0.5)) / np.float32(256)
    return numbers.astype(np.float32)


def coverage_problem(values: NDArray[np.floating[Any]]) -> str | None:
    """Say what keeps (n,) values from being coverage, naming the first bad row; None when nothing does."""
    wrong = ~((values >= 0) & (values <= 1))  # NaN is neither
    if wrong.any():
        row = int(np.argmax(wrong))
        return f"row {row} is {float(values[row]):.4g}, not a number from 0 to 1"
    return None


def _need_bytes(data: bytes | memoryview, rows: int, width: int, encoding: Encoding | CoverageEncoding) -> None:
    expected = rows * row_bytes(width, encoding)
    if len(data) != expected:
        raise ProtocolError(
            f"An answer has {len(data):,} bytes; allowed: {expected:,} for {rows} rows of {width} {encoding} values"
        )
