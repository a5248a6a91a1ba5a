"""Answers as bytes and back, with every value checked on the way in. docs/encodings.md specifies the bytes.

An encoded block is n rows of one width, row by row, everything little-endian. Lives here: log-probabilities in any
encoding, and the log-odds of labels that do not exclude one another, block by block, so that memory does not grow with
rows times classes. Does not live here: what a row is, by kind of encoding (floats, squares, largest, shares, odds);
coverage (coverage), features (features).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from consilience.common.encoding.coverage import (
    coverage_bytes,
    coverage_problem,
    coverage_values,
    decode_coverage,
    encode_coverage,
)
from consilience.common.encoding.features import check_features, encode_features, feature_bytes, feature_values
from consilience.common.encoding.floats import SUM_TOLERANCE, Floats, RowProblem
from consilience.common.encoding.largest import Largest, Sent, Votes
from consilience.common.encoding.odds import OddsFloats, OddsLargest, OddsLargestBytes, OddsSquares, OddsVotes
from consilience.common.encoding.shares import LargestShares
from consilience.common.encoding.squares import Squares
from consilience.common.errors import ProtocolError
from consilience.common.settings import Encoding, largest_sent, sent_in_bytes

__all__ = [
    "SUM_TOLERANCE",
    "Sent",
    "check",
    "check_features",
    "coverage_bytes",
    "coverage_problem",
    "coverage_values",
    "decode",
    "decode_coverage",
    "encode",
    "encode_coverage",
    "encode_features",
    "feature_bytes",
    "feature_values",
    "named",
    "row_bytes",
    "unpack",
    "unpack_sent",
]

BLOCK_VALUES = 2**18
"""Classes, or encoded bytes, worked on at a time."""


class _Codec(Protocol):
    """What a row is in one encoding. `raw` is (n, row_bytes) contiguous."""

    def row_bytes(self, classes: int) -> int: ...
    def pack(self, rows: NDArray[np.float32]) -> bytes: ...
    def problem(self, raw: NDArray[np.uint8], classes: int) -> RowProblem | None: ...
    def unpack(self, raw: NDArray[np.uint8], classes: int) -> NDArray[np.float32]: ...


_CODECS: dict[str, _Codec] = {
    "f32": Floats(np.dtype("<f4")),
    "f16": Floats(np.dtype("<f2")),
    "u8": Squares(),
    "votes": Votes(),
}
_ODDS_CODECS: dict[str, _Codec] = {
    "f32": OddsFloats(np.dtype("<f4")),
    "f16": OddsFloats(np.dtype("<f2")),
    "u8": OddsSquares(),
    "votes": OddsVotes(),
}


@cache
def _codec(encoding: Encoding, odds: bool = False) -> _Codec:
    most = largest_sent(encoding)
    if most is None:
        return (_ODDS_CODECS if odds else _CODECS)[encoding]
    if odds:
        return OddsLargestBytes(most) if sent_in_bytes(encoding) else OddsLargest(most)
    return _largest(encoding)


def _largest(encoding: Encoding) -> Largest | LargestShares:
    most = largest_sent(encoding)
    assert most is not None, encoding
    return LargestShares(most) if sent_in_bytes(encoding) else Largest(most)


def named(encoding: Encoding, classes: int) -> Encoding:
    """Return the one name that an encoding has over `classes` classes: `top-K` of more is of all."""
    most = largest_sent(encoding)
    if most is None or most <= classes:
        return encoding
    return f"top-{classes}{'-u8' if sent_in_bytes(encoding) else ''}"


def row_bytes(classes: int, encoding: Encoding, *, odds: bool = False) -> int:
    """Return the bytes of one row over `classes` classes. `odds`, here and below: of log-odds of so many labels."""
    return _codec(encoding, odds).row_bytes(classes)


def encode(
    rows: NDArray[np.float32], encoding: Encoding, *, odds: bool = False, within: Encoding | None = None
) -> bytes:
    """Encode (n, k) log-probabilities, or log-odds. A row's bytes depend on this row alone.

    `within`: the finest encoding that the rows may leave in, if they may not in any. Another is then made of what they
    are read as in that one, so that it tells nothing more.
    """
    if within is None or named(within, rows.shape[1]) == named(encoding, rows.shape[1]):
        codec = _codec(encoding, odds)
        return b"".join(codec.pack(rows[low:high]) for low, high in _blocks(*rows.shape))
    read = np.empty(rows.shape, np.float32)
    unpack(np.frombuffer(encode(rows, within, odds=odds), np.uint8), within, read, odds=odds)
    return encode(read, encoding, odds=odds)


def check(data: bytes | memoryview, rows: int, classes: int, encoding: Encoding, *, odds: bool = False) -> None:
    """Check `rows` encoded rows over `classes` classes; takes little memory, however many classes there are.

    Raises `ProtocolError` when the length is wrong, or a row is not the log of a distribution, naming the first: NaN
    or infinite values, probabilities that do not sum to 1 within `SUM_TOLERANCE`, classes that do not exist, stand
    twice or out of order. Log-odds are refused when they are not finite or out of their bounds.
    """
    codec, width = _codec(encoding, odds), row_bytes(classes, encoding, odds=odds)
    if len(data) != rows * width:
        raise ProtocolError(
            f"An answer has {len(data):,} bytes; allowed: {rows * width:,} for {rows} rows of {classes} classes as "
            f"{encoding}"
        )
    raw = np.frombuffer(data, np.uint8).reshape(rows, width)
    for low, high in _blocks(rows, width):
        if problem := codec.problem(raw[low:high], classes):
            what = "log-odds" if odds else "log-probabilities"
            raise ProtocolError(f"An answer holds no {what}: row {low + problem[0]} {problem[1]}")


def unpack(raw: NDArray[np.uint8], encoding: Encoding, out: NDArray[np.float32], *, odds: bool = False) -> None:
    """Decode the bytes of `check`ed rows, (n * row_bytes,) contiguous, into `out` (n, k)."""
    codec = _codec(encoding, odds)
    rows, classes = out.shape
    whole = raw.reshape(rows, codec.row_bytes(classes))
    for low, high in _blocks(rows, classes):
        out[low:high] = codec.unpack(whole[low:high], classes)


def unpack_sent(raw: NDArray[np.uint8], classes: int, encoding: Encoding) -> Sent:
    """Return what the bytes of `check`ed rows, (n * row_bytes,) contiguous, tell of log-probabilities.

    They are encoded as `top-K` or `top-K-u8`. It is what `unpack` gives, without the classes
    that were not sent. Memory is that of what was sent.
    """
    codec = _largest(encoding)
    return codec.sent(raw.reshape(-1, codec.row_bytes(classes)), classes)


def decode(
    data: bytes | memoryview, rows: int, classes: int, encoding: Encoding, *, odds: bool = False
) -> NDArray[np.float32]:
    """Decode `rows` rows over `classes` classes to (rows, classes) float32. Raises `ProtocolError` as `check` does."""
    check(data, rows, classes, encoding, odds=odds)
    out = np.empty((rows, classes), np.float32)
    unpack(np.frombuffer(data, np.uint8), encoding, out, odds=odds)
    return out


def _blocks(rows: int, width: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows, each of about `BLOCK_VALUES` values."""
    size = max(1, BLOCK_VALUES // width)
    for low in range(0, rows, size):
        yield low, min(low + size, rows)
