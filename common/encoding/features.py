"""Features of a network's layer as bytes and back: the values of one sample's features a row.

Binary16 (`f16`), or the row's least value and the step as binary32 and a byte a value of which v means least + v * step
(`u8`). Lives here too: a tap's principal components as bytes, which leave with a site's agreement (common/components).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from consilience.common.errors import ProtocolError
from consilience.common.settings import FeatureEncoding

LARGEST = float(np.finfo(np.float16).max)
"""No feature's magnitude may be above it, in either encoding."""
_HEAD = 8
"""Bytes of least value and step."""
_ROUNDING = 1e-5
"""How far a number of a direction of length 1 may lie above 1."""
_SINGLE, _HALF = np.dtype("<f4"), np.dtype("<f2")


def feature_bytes(values: int, encoding: FeatureEncoding) -> int:
    """Return the bytes of the features of one sample, `values` numbers."""
    return 2 * values if encoding == "f16" else _HEAD + values


def encode_features(
    rows: NDArray[np.floating[Any]], encoding: FeatureEncoding, *, within: FeatureEncoding | None = None
) -> bytes:
    """Encode (n, v) features, v >= 1, finite and at most `LARGEST` in magnitude; a row's bytes depend on it alone.

    As `u8` a value is off by at most half a step, a 510th of its row's range. `within`: the finest encoding that they
    may leave in, of which others are made.
    """
    if within is not None and within != encoding:
        raw = np.frombuffer(encode_features(rows, within), np.uint8)
        rows = feature_values(raw.reshape(len(rows), feature_bytes(rows.shape[1], within)), within)
    if encoding == "f16":
        return rows.astype(_HALF).tobytes()
    least = rows.min(axis=1, keepdims=True).astype(_SINGLE)
    step = ((rows.max(axis=1, keepdims=True) - least) / 255).astype(_SINGLE)
    levels = np.rint((rows - least) / np.where(step > 0, step, 1)).clip(0, 255).astype(np.uint8)
    return np.concatenate([least.view(np.uint8), step.view(np.uint8), levels], axis=1).tobytes()


def check_features(data: bytes | memoryview, rows: int, values: int, encoding: FeatureEncoding) -> None:
    """Check the encoded features of `rows` samples of `values` numbers each.

    Raises `ProtocolError` when the length is wrong, or a value is not finite or larger than `LARGEST`, naming the
    first such row.
    """
    width = feature_bytes(values, encoding)
    if len(data) != rows * width:
        raise ProtocolError(
            f"An answer has {len(data):,} bytes; allowed: {rows * width:,} for {rows} rows of {values} features as "
            f"{encoding}"
        )
    raw = np.frombuffer(data, np.uint8).reshape(rows, width)
    if encoding == "f16":
        wrong = ~np.isfinite(raw.view(_HALF)).all(axis=1)
    else:
        head = raw[:, :_HEAD].copy().view(_SINGLE).astype(np.float64)  # NaN fails every comparison
        least, most = head[:, 0], head[:, 0] + 255 * head[:, 1]
        wrong = ~((np.abs(least) <= LARGEST) & (head[:, 1] >= 0) & (most <= LARGEST * (1 + 1e-6)))
    if wrong.any():
        raise ProtocolError(
            f"An answer holds no features: row {int(np.argmax(wrong))} has a value that is not finite or too large"
        )


def feature_values(raw: NDArray[np.uint8], encoding: FeatureEncoding) -> NDArray[np.float32]:
    """Return what checked rows (n, `feature_bytes`) mean, (n, v) float32."""
    if encoding == "f16":
        return np.ascontiguousarray(raw).view(_HALF).astype(np.float32)
    head = np.ascontiguousarray(raw[:, :_HEAD]).view(_SINGLE)
    return head[:, :1] + raw[:, _HEAD:].astype(np.float32) * head[:, 1:]


def pack_basis(basis: NDArray[np.floating[Any]], mean: NDArray[np.floating[Any]]) -> bytes:
    """Return (c, C) principal directions and (C,) means as bytes: float32, the means last."""
    return np.concatenate([basis.ravel(), mean]).astype(_SINGLE).tobytes()


def basis_bytes(kept: int, channels: int) -> int:
    """Return the length of `pack_basis`'s bytes of `kept` directions."""
    return 4 * (kept + 1) * channels


def unpack_basis(data: bytes, kept: int, channels: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return (kept, channels) directions and (channels,) means, float32.

    Features that left, times the directions, plus the means, are the layer's own again, but for what was left out.
    Raises `ProtocolError` for anything else than so many numbers, for directions that no orthonormal rows hold, and for
    means that no feature has.
    """
    if len(data) != basis_bytes(kept, channels):
        raise ProtocolError(
            f"Principal components have {len(data):,} bytes; allowed: {basis_bytes(kept, channels):,} for {kept} of "
            f"{channels} channels"
        )
    values = np.frombuffer(data, _SINGLE)
    directions, mean = values[: kept * channels].reshape(kept, channels), values[kept * channels :]
    # NaN fails every comparison; what components stand for is made of these, by whoever takes them
    if not (np.abs(directions) <= 1 + _ROUNDING).all() or not (np.abs(mean) <= LARGEST).all():
        raise ProtocolError("Principal components have a direction above 1 or a mean that no feature has")
    return directions, mean
