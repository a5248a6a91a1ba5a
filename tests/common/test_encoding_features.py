"""Features as bytes: error bounds, bytes by hand, and refusal of everything else; a tap's components as bytes."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from consilience.common.encoding import check_features, encode_features, feature_bytes, feature_values
from consilience.common.encoding.features import LARGEST, pack_basis, unpack_basis
from consilience.common.errors import ProtocolError
from consilience.common.settings import FeatureEncoding

ENCODINGS: tuple[FeatureEncoding, ...] = ("f16", "u8")
ROWS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9),
    elements=st.floats(-LARGEST, LARGEST, width=32),
)


def back(data: bytes, rows: int, values: int, encoding: FeatureEncoding) -> NDArray[np.float32]:
    check_features(data, rows, values, encoding)
    return feature_values(np.frombuffer(data, np.uint8).reshape(rows, feature_bytes(values, encoding)), encoding)


@given(ROWS)
def test_features_come_back_within_their_bounds(rows: NDArray[np.float32]) -> None:
    wide = rows.astype(np.float64)
    halves = back(encode_features(rows, "f16"), len(rows), rows.shape[1], "f16")
    assert np.all(np.abs(halves - wide) <= np.abs(wide) * 2.0**-11 + 2.0**-25)
    bytes_ = back(encode_features(rows, "u8"), len(rows), rows.shape[1], "u8")
    span = np.ptp(wide, axis=1, keepdims=True)
    rounding = 2.0**-22 * np.abs(wide).max(axis=1, keepdims=True) + 2.0**-140
    assert np.all(np.abs(bytes_ - wide) <= span / 510 + rounding)


@given(ROWS, st.sampled_from(ENCODINGS))
def test_a_row_s_bytes_depend_on_it_alone(rows: NDArray[np.float32], encoding: FeatureEncoding) -> None:
    data, width = encode_features(rows, encoding), feature_bytes(rows.shape[1], encoding)
    assert len(data) == len(rows) * width
    for at in range(len(rows)):
        assert encode_features(rows[at : at + 1], encoding) == data[at * width : (at + 1) * width]
    assert encode_features(rows[:0], encoding) == b""


@given(ROWS)
def test_coarser_features_are_made_of_the_bytes_of_the_finest(rows: NDArray[np.float32]) -> None:
    told = encode_features(rows, "f16")
    assert encode_features(rows, "f16", within="f16") == told
    assert encode_features(rows, "u8", within="f16") == encode_features(
        back(told, len(rows), rows.shape[1], "f16"), "u8"
    )
    assert encode_features(rows, "u8", within="u8") == encode_features(rows, "u8")


def test_bytes_by_hand() -> None:
    assert encode_features(np.array([[1.0, -2.0, 0.5]]), "f16").hex(" ", 2) == "003c 00c0 0038"
    data = encode_features(np.array([[-1.0, 254.0, 0.4]], np.float32), "u8")
    assert data == struct.pack("<ff", -1.0, 1.0) + bytes([0, 255, 1])
    constant = encode_features(np.full((1, 3), 2.5, np.float32), "u8")
    assert constant == struct.pack("<ff", 2.5, 0.0) + bytes(3)
    assert back(constant, 1, 3, "u8").tolist() == [[2.5, 2.5, 2.5]]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("extra", [-1, 1, 7])
def test_another_length_is_refused(encoding: FeatureEncoding, extra: int) -> None:
    data = (encode_features(np.ones((3, 4)), encoding) + bytes(7))[: 3 * feature_bytes(4, encoding) + extra]
    with pytest.raises(ProtocolError, match=f"bytes; allowed: {3 * feature_bytes(4, encoding)} for 3 rows of 4"):
        check_features(data, 3, 4, encoding)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_halves_that_are_no_numbers_are_refused(wrong: float) -> None:
    rows = np.ones((3, 4))
    rows[1, 2] = wrong
    with pytest.raises(ProtocolError, match="row 1 has a value that is not finite"):
        check_features(rows.astype("<f2").tobytes(), 3, 4, "f16")


@pytest.mark.parametrize(
    ("least", "step"),
    [
        (np.nan, 1.0),
        (1.0, np.nan),
        (np.inf, 0.0),
        (0.0, np.inf),
        (0.0, -1e-30),
        (-LARGEST * 1.01, 0.0),
        (0.0, LARGEST / 254),
        (LARGEST, 1.0),
    ],
)
def test_heads_of_bytes_that_say_no_range_are_refused(least: float, step: float) -> None:
    good = struct.pack("<ff", 0.0, 1.0) + bytes(3)
    bad = np.array([least, step], "<f4").tobytes() + bytes(3)
    check_features(good + good, 2, 3, "u8")
    with pytest.raises(ProtocolError, match="row 1 has a value that is not finite or too large"):
        check_features(good + bad, 2, 3, "u8")


@given(st.binary(max_size=80), st.integers(1, 5), st.sampled_from(ENCODINGS))
def test_what_is_taken_is_finite(data: bytes, values: int, encoding: FeatureEncoding) -> None:
    rows = len(data) // feature_bytes(values, encoding)
    try:
        found = back(data, rows, values, encoding)
    except ProtocolError:
        return
    assert found.shape == (rows, values)
    assert np.all(np.abs(found) <= LARGEST * (1 + 1e-5))


def test_the_largest_features_are_taken() -> None:
    rows = np.array([[LARGEST, -LARGEST, 0.0]], np.float32)
    for encoding in ENCODINGS:
        np.testing.assert_allclose(back(encode_features(rows, encoding), 1, 3, encoding), rows, atol=260)


def test_a_basis_comes_back() -> None:
    random = np.random.default_rng(0)
    basis, mean = random.uniform(-1, 1, (2, 5)).astype(np.float32), random.normal(size=5).astype(np.float32)
    for given_basis in (basis, np.asfortranarray(basis)):
        directions, kept = unpack_basis(pack_basis(given_basis, mean), 2, 5)
        assert np.array_equal(directions, basis)
        assert np.array_equal(kept, mean)


@pytest.mark.parametrize("data", [b"", bytes(4), bytes(4 * 14), bytes(4 * 15) + b"x", bytes(4 * 16)])
def test_bytes_that_are_no_basis_are_refused(data: bytes) -> None:
    unpack_basis(bytes(4 * 15), 2, 5)
    with pytest.raises(ProtocolError, match=rf"have {len(data)} bytes; allowed: 60 for 2 of 5 channels"):
        unpack_basis(data, 2, 5)


@pytest.mark.parametrize(
    ("direction", "mean"),
    [
        (1.001, 0.0),
        (-1.001, 0.0),
        (3e38, 0.0),
        (np.nan, 0.0),
        (np.inf, 0.0),
        (0.0, 65_505.0),
        (0.0, -3e38),
        (0.0, np.nan),
    ],
)
def test_a_basis_beyond_what_components_and_features_are_is_refused(direction: float, mean: float) -> None:
    directions, means = np.eye(5, dtype=np.float32)[:2], np.full(5, LARGEST, np.float32)
    unpack_basis(pack_basis(directions, means), 2, 5)
    directions[1, 3], means[2] = direction, mean
    with pytest.raises(ProtocolError, match="direction above 1 or a mean that no feature has"):
        unpack_basis(pack_basis(directions, means), 2, 5)
