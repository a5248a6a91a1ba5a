"""Log-probabilities as bytes: error bounds, and refusal of everything else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax

from consilience.common.encoding import SUM_TOLERANCE, decode, encode, row_bytes
from consilience.common.errors import ProtocolError
from consilience.common.settings import Encoding


def random_rows(seed: int, rows: int, classes: int, spread: float = 5) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(0, spread, (rows, classes))
    return np.asarray(log_softmax(logits, axis=1), np.float32)


@given(st.integers(0, 2**32 - 1), st.integers(0, 20), st.integers(1, 50), st.floats(0.1, 30))
def test_f32_is_exact_and_f16_within_its_bound(seed: int, rows: int, classes: int, spread: float) -> None:
    given_rows = random_rows(seed, rows, classes, spread)
    assert np.array_equal(decode(encode(given_rows, "f32"), rows, classes, "f32"), given_rows)
    back = decode(encode(given_rows, "f16"), rows, classes, "f16")
    # relative 2^-11 for normal numbers, absolute 2^-25 below them
    assert np.all(np.abs(back - given_rows) <= np.abs(given_rows) * 2.0**-11 + 2.0**-25)


def test_f16_of_100_000_classes_still_sums_to_one() -> None:
    rows = np.full((2, 100_000), -np.log(100_000), np.float32)
    assert decode(encode(rows, "f16"), 2, 100_000, "f16").shape == (2, 100_000)


def test_very_small_probabilities_stay_finite() -> None:
    rows = np.array([[0.0, -1e30]], np.float32)
    assert decode(encode(rows, "f16"), 1, 2, "f16")[0, 1] == -65504
    assert decode(encode(np.array([[0.0, -np.inf]], np.float32), "f32"), 1, 2, "f32")[0, 1] < -1e38


@pytest.mark.parametrize("encoding", ["f32", "f16"])
@pytest.mark.parametrize("wrong", [b"", b"\0", b"\0" * 100])
def test_other_lengths_are_refused(encoding: Encoding, wrong: bytes) -> None:
    with pytest.raises(ProtocolError, match="allowed"):
        decode(wrong, 2, 3, encoding)


@pytest.mark.parametrize(
    ("row", "word"),
    [
        ([np.nan, 0], "NaN"),
        ([np.inf, 0], "NaN or an infinite"),
        ([-np.inf, 0], "NaN or an infinite"),
        ([0, 0], "sum to 2"),
        ([100, 100], "sum to"),
        ([-5, -5], "sum to 0.01"),
        ([np.log(0.5), np.log(0.5 + 2 * SUM_TOLERANCE)], "sum to 1.02"),
    ],
)
def test_rows_that_are_no_distribution_are_refused(row: list[float], word: str) -> None:
    good = [np.log(0.25), np.log(0.75)]
    data = np.array([good, row], "<f4").tobytes()
    with pytest.raises(ProtocolError, match="row 1") as caught:
        decode(data, 2, 2, "f32")
    assert word in str(caught.value)


@given(st.binary(max_size=64), st.integers(0, 4), st.integers(1, 4), st.sampled_from(["f32", "f16"]))
def test_random_bytes_give_a_distribution_or_a_refusal(
    data: bytes, rows: int, classes: int, encoding: Encoding
) -> None:
    try:
        values = decode(data, rows, classes, encoding)
    except ProtocolError:
        return
    assert len(data) == rows * row_bytes(classes, encoding)
    assert np.all(np.abs(np.exp(values.astype(np.float64)).sum(axis=1) - 1) <= SUM_TOLERANCE)
