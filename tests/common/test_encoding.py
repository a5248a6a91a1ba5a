"""Log-probabilities and coverage as bytes: error bounds, and refusal of everything else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax

from consilience.common.encoding import (
    SUM_TOLERANCE,
    check,
    decode,
    decode_coverage,
    encode,
    encode_coverage,
    named,
    row_bytes,
)
from consilience.common.errors import ProtocolError
from consilience.common.settings import CoverageEncoding, Encoding, Policy, allowed_by


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


@given(st.lists(st.floats(0, 1, width=32), max_size=30))
def test_coverage_comes_back_within_its_bound(values: list[float]) -> None:
    coverage = np.array(values, np.float32)
    fine = decode_coverage(encode_coverage(coverage, "f16"), len(values), "f16")
    assert np.all(np.abs(fine - coverage) <= coverage * 2.0**-11 + 2.0**-25)
    coarse = decode_coverage(encode_coverage(coverage, "u8"), len(values), "u8")
    assert np.all(np.abs(coarse - coverage) <= 1 / 512)
    assert np.all(np.diff(coarse[np.argsort(coverage, kind="stable")]) >= 0)


def test_a_byte_of_coverage_is_the_middle_of_its_interval() -> None:
    told = decode_coverage(bytes(range(256)), 256, "u8")
    assert np.array_equal(told, (np.arange(256) + 0.5) / 256)
    assert encode_coverage(told, "u8") == bytes(range(256))
    assert encode_coverage(np.array([0, 1 / 256, 1], np.float32), "u8") == bytes([0, 1, 255])


@pytest.mark.parametrize("value", [np.nan, 2.0, -0.001, 1.001, np.inf, -np.inf])
def test_numbers_that_are_no_coverage_are_refused_by_row(value: float) -> None:
    data = np.array([0.0, 1.0, value, 0.5], "<f2").tobytes()
    with pytest.raises(ProtocolError, match=r"no coverage: row 2 is .*, not a number from 0 to 1"):
        decode_coverage(data, 4, "f16")


@pytest.mark.parametrize(("encoding", "size"), [("f16", 3), ("f16", 2), ("f16", 5), ("u8", 1), ("u8", 3), ("u8", 0)])
def test_coverage_of_another_length_is_refused(encoding: CoverageEncoding, size: int) -> None:
    with pytest.raises(ProtocolError, match=f"{size} bytes; allowed: [24] for 2 rows of 1 {encoding} values"):
        decode_coverage(bytes(size), 2, encoding)


@given(st.binary(max_size=16), st.integers(0, 8), st.sampled_from(["f16", "u8"]))
def test_random_bytes_are_coverage_or_refused(data: bytes, rows: int, encoding: CoverageEncoding) -> None:
    try:
        values = decode_coverage(data, rows, encoding)
    except ProtocolError:
        return
    assert values.shape == (rows,)
    assert np.all((values >= 0) & (values <= 1))


FINER = [
    (finest, coarser)
    for finest in ("f32", "f16", "u8", "top-4", "top-40", "top-4-u8", "votes")
    for coarser in ("f32", "f16", "u8", "top-2", "top-4", "top-40", "top-2-u8", "top-40-u8", "votes")
    if allowed_by(Policy(precision=finest).encodings, coarser)
]


@pytest.mark.parametrize(("finest", "coarser"), FINER)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.sampled_from([1e-4, 0.01, 3.0]))
def test_a_coarser_encoding_is_made_of_the_bytes_of_the_finest(
    finest: Encoding, coarser: Encoding, seed: int, classes: int, spread: float
) -> None:
    rows = random_rows(seed, 30, classes, spread)  # close to one another where the spread is small
    told, made = encode(rows, finest), encode(rows, coarser, within=finest)
    check(made, 30, classes, coarser)
    by_server = encode(decode(told, 30, classes, finest), coarser)
    same = named(finest, classes) == named(coarser, classes)  # `top-K` of more classes is of all
    assert made == (told if same else by_server)
    # other rows of the same bytes: as they are read, and a little beside that
    random = np.random.default_rng(seed)
    read = decode(told, 30, classes, finest)
    for other in (read, (read + random.normal(0, 1e-5, read.shape)).astype(np.float32)):
        again, width = encode(other, finest), row_bytes(classes, finest)
        equal = [again[k * width : k * width + width] == told[k * width : k * width + width] for k in range(30)]
        found, width = encode(other, coarser, within=finest), row_bytes(classes, coarser)
        for k in np.flatnonzero(equal):
            assert found[k * width : k * width + width] == made[k * width : k * width + width]


@pytest.mark.parametrize(
    ("asked", "name"),
    [("f16", "f16"), ("votes", "votes"), ("top-3", "top-3"), ("top-6", "top-5"), ("top-9-u8", "top-5-u8")],
)
def test_an_encoding_has_one_name_over_five_classes(asked: Encoding, name: Encoding) -> None:
    assert named(asked, 5) == name


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=50))
def test_coarser_coverage_is_made_of_the_bytes_of_the_finest(values: list[float]) -> None:
    rows = np.array(values, np.float32)
    told = encode_coverage(rows, "f16")
    assert encode_coverage(rows, "f16", within="f16") == told
    read = decode_coverage(told, len(rows), "f16")
    assert encode_coverage(rows, "u8", within="f16") == encode_coverage(read, "u8")
    assert encode_coverage(rows, "u8", within="u8") == encode_coverage(rows, "u8")
