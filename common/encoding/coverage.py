"""Coverage as bytes and back: one number a sample.

Binary16 (`f16`), or a byte (`u8`) of which v means (v + 0.5) / 256.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from consilience.common.errors import ProtocolError
from consilience.common.settings import CoverageEncoding

_DTYPES: dict[CoverageEncoding, np.dtype[Any]] = {"f16": np.dtype("<f2"), "u8": np.dtype("u1")}


def coverage_bytes(encoding: CoverageEncoding) -> int:
    """Return the bytes of the coverage of one sample."""
    return _DTYPES[encoding].itemsize


def encode_coverage(
    coverage: NDArray[np.floating[Any]], encoding: CoverageEncoding, *, within: CoverageEncoding | None = None
) -> bytes:
    """Encode (n,) coverage in [0, 1]. `within`: the finest encoding that it may leave in, of which others are made."""
    if within is not None and within != encoding:
        coverage = coverage_values(np.frombuffer(encode_coverage(coverage, within), np.uint8), within)
    if encoding == "u8":
        coverage = np.minimum(coverage * 256, 255)
    return bytes(coverage.astype(_DTYPES[encoding]).tobytes())


def decode_coverage(data: bytes | memoryview, rows: int, encoding: CoverageEncoding) -> NDArray[np.float32]:
    """Decode the coverage of `rows` samples to (rows,) float32.

    Raises `ProtocolError` when the length is wrong, or a value is NaN or not in [0, 1].
    """
    expected = rows * coverage_bytes(encoding)
    if len(data) != expected:
        raise ProtocolError(
            f"An answer has {len(data):,} bytes; allowed: {expected:,} for {rows} rows of 1 {encoding} values"
        )
    values = coverage_values(np.frombuffer(data, np.uint8), encoding)
    problem = None if encoding == "u8" else coverage_problem(values)  # every byte is one
    if problem:
        raise ProtocolError(f"An answer holds no coverage: {problem}")
    return values


def coverage_values(raw: NDArray[np.uint8], encoding: CoverageEncoding) -> NDArray[np.float32]:
    """Return what encoded coverage means, (n,) float32, whatever it is."""
    if encoding == "u8":
        values = raw.astype(np.float32)
        values += np.float32(0.5)
        values /= np.float32(256)  # in place: a second array would be as large
        return values
    return raw.view(_DTYPES[encoding]).astype(np.float32)


def coverage_problem(values: NDArray[np.floating[Any]]) -> str | None:
    """Say what keeps (n,) values from being coverage, naming the first bad row; None when nothing does."""
    wrong = ~((values >= 0) & (values <= 1))  # NaN is neither
    if wrong.any():
        row = int(np.argmax(wrong))
        return f"row {row} is {float(values[row]):.4g}, not a number from 0 to 1"
    return None
