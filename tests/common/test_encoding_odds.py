"""Log-odds of labels as bytes: bounds of what is lost, and every value that is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.special import expit

from consilience.common.encoding import check, decode, encode, named, row_bytes
from consilience.common.encoding.odds import MOST_ODDS, REACH, log_odds_of
from consilience.common.errors import ProtocolError

ROWS = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(1, 20)),
    elements=st.floats(-MOST_ODDS, MOST_ODDS, width=32),
)
ENCODINGS = ["f32", "f16", "u8", "top-1", "top-3", "top-1-u8", "top-3-u8", "votes"]


def there_and_back(rows: np.ndarray, encoding: str) -> np.ndarray:
    return decode(encode(rows, encoding, odds=True), len(rows), rows.shape[1], encoding, odds=True)


@given(ROWS)
def test_floats_keep_what_they_say(rows: np.ndarray) -> None:
    assert np.array_equal(there_and_back(rows, "f32"), rows)
    assert np.all(np.abs(there_and_back(rows, "f16") - rows) <= 2.0**-11 * np.abs(rows) + 2.0**-25)


@given(ROWS)
def test_a_byte_a_label_is_within_its_bounds(rows: np.ndarray) -> None:
    wide, found = rows.astype(np.float64), there_and_back(rows, "u8").astype(np.float64)
    near = np.abs(wide) <= REACH
    assert np.all(np.abs(found - wide)[near] <= 0.0386 * np.sqrt(np.abs(wide[near])) + 0.0004)
    assert np.all(np.abs(expit(found) - expit(wide)) <= 0.0072)
    assert np.all(np.abs(found[~near]) == REACH)
    assert np.all(np.sign(found[~near]) == np.sign(wide[~near]))


def test_the_bound_of_the_probability_is_no_wider_than_it_must_be() -> None:
    odds = np.linspace(-8, 8, 200_001, dtype=np.float32)[None]
    assert np.abs(expit(there_and_back(odds, "u8")) - expit(odds)).max() > 0.0068


@given(ROWS, st.integers(1, 25))
def test_the_likeliest_are_told_and_the_others_share_their_mean(rows: np.ndarray, most: int) -> None:
    found = there_and_back(rows, f"top-{most}")
    for given_row, row in zip(rows.astype(np.float64), found, strict=True):
        order = np.argsort(-given_row, kind="stable")
        sent, left = order[:most], order[most:]
        assert np.all(np.abs(row[sent] - given_row[sent]) <= 2.0**-11 * np.abs(given_row[sent]) + 2.0**-25)
        if len(left):
            odds = np.log(expit(given_row[left]).mean()) - np.log(expit(-given_row[left]).mean())
            mean = np.clip(odds, -MOST_ODDS, MOST_ODDS)
            assert len(set(row[left].tolist())) == 1
            assert row[left][0] <= row[sent].min()
            # The f16 of the mean, or of the least that is sent where rounding would lift it above.
            assert abs(row[left][0] - mean) <= 2.0**-10 * abs(mean) + 1e-6


@given(ROWS, st.integers(1, 25))
def test_the_likeliest_in_bytes_are_those_of_a_byte_a_label(rows: np.ndarray, most: int) -> None:
    found, whole = there_and_back(rows, f"top-{most}-u8"), there_and_back(rows, "u8")
    for given_row, row, byte in zip(rows.astype(np.float64), found, whole, strict=True):
        order = np.argsort(-given_row, kind="stable")
        sent, left = order[:most], order[most:]
        assert np.array_equal(row[sent], byte[sent])
        if len(left):
            odds = np.log(expit(given_row[left]).mean()) - np.log(expit(-given_row[left]).mean())
            mean = there_and_back(np.array([[odds]], np.float32), "u8")[0, 0]
            assert len(set(row[left].tolist())) == 1
            assert row[left][0] <= row[sent].min()
            assert row[left][0] == pytest.approx(min(mean, row[sent].min()), abs=0.38)  # one step at most


@given(ROWS)
def test_a_vote_says_which_labels_are_likelier_than_not(rows: np.ndarray) -> None:
    assert np.allclose(there_and_back(rows, "votes"), np.where(rows > 0, np.log(9), -np.log(9)))


@pytest.mark.parametrize("encoding", ENCODINGS)
@given(rows=ROWS)
def test_what_was_decoded_is_the_same_once_more(encoding: str, rows: np.ndarray) -> None:
    data = encode(rows, encoding, odds=True)
    assert len(data) == len(rows) * row_bytes(rows.shape[1], encoding, odds=True)
    once = there_and_back(rows, encoding)
    # Of labels not sent the mean is that of f16 numbers, which may round by one step more.
    assert np.allclose(there_and_back(once, encoding), once, rtol=2.0**-10, atol=1e-6)


@pytest.mark.parametrize("finest", ["f16", "u8", "top-3", "top-3-u8"])
@given(rows=ROWS)
def test_a_coarser_encoding_is_made_of_the_bytes_of_the_finest(finest: str, rows: np.ndarray) -> None:
    for coarser in {
        "f16": ENCODINGS[1:],
        "u8": ["u8", "top-1-u8", "top-3-u8", "votes"],
        "top-3": ["top-1", "top-3", "top-1-u8", "top-3-u8", "votes"],
        "top-3-u8": ["top-1-u8", "top-3-u8", "votes"],
    }[finest]:
        made = encode(rows, coarser, odds=True, within=finest)
        same = named(finest, rows.shape[1]) == named(coarser, rows.shape[1])
        read = rows if same else there_and_back(rows, finest)
        assert made == encode(read, coarser, odds=True)


def test_what_lies_beyond_the_bounds_is_brought_to_them() -> None:
    rows = np.array([[1e30, -1e30, 101]], np.float32)
    for encoding in ("f32", "f16", "top-3"):
        assert there_and_back(rows, encoding).tolist() == [[MOST_ODDS, -MOST_ODDS, MOST_ODDS]]
    assert np.array_equal(log_odds_of(np.array([0.0, 0.5, 1.0])), [-MOST_ODDS, 0, MOST_ODDS])


F16 = "<f2"
BAD = [
    ("f32", np.array([0, np.nan], "<f4").tobytes(), 2, "not finite"),
    ("f32", np.array([np.inf, 0], "<f4").tobytes(), 2, "not finite"),
    ("f32", np.array([0, 100.1], "<f4").tobytes(), 2, "beyond 100"),
    ("f16", np.array([-101, 0], F16).tobytes(), 2, "beyond 100"),
    ("u8", bytes([0, 128]), 2, "byte 128"),
    ("votes", bytes([0b1000]), 3, "bit behind its last of 3"),
    ("votes", bytes([0, 2]), 9, "bit behind its last of 9"),
    ("top-1", bytes([2]) + np.array([1, 0], F16).tobytes(), 2, "names label 2 of 2"),
    ("top-1", bytes([1]) + np.array([1, 1.5], F16).tobytes(), 2, "likelier than one that is"),
    ("top-1", bytes([1]) + np.array([np.nan, 0], F16).tobytes(), 2, "not finite"),
    ("top-1", bytes([1]) + np.array([1, -np.inf], F16).tobytes(), 2, "not finite"),
    ("top-1-u8", bytes([2, 1, 0]), 2, "names label 2 of 2"),
    ("top-1-u8", bytes([1, 1, 2]), 2, "likelier than one that is"),
    ("top-1-u8", bytes([1, 128, 0]), 2, "not finite"),
    ("top-1-u8", bytes([1, 1, 128]), 2, "not finite"),
    ("top-2-u8", bytes([0, 1, 1, 2, 0]), 3, "not in order"),
    ("top-2-u8", bytes([1, 1, 2, 1, 0]), 3, "twice"),
    ("top-2", bytes([0, 1]) + np.array([1, 2, 0], F16).tobytes(), 3, "not in order"),
    ("top-2", bytes([1, 0]) + np.array([1, 1, 0], F16).tobytes(), 3, "not in order"),
    ("top-2", bytes([1, 1]) + np.array([2, 1, 0], F16).tobytes(), 3, "twice"),
]


@pytest.mark.parametrize(("encoding", "row", "labels", "reason"), BAD)
def test_a_bad_row_is_refused_by_its_number(encoding: str, row: bytes, labels: int, reason: str) -> None:
    good = encode(np.zeros((2, labels), np.float32), encoding, odds=True)
    with pytest.raises(ProtocolError, match=f"no log-odds: row 2 .*{reason}"):
        check(good + row, 3, labels, encoding, odds=True)


def test_log_probabilities_are_no_log_odds_of_another_length() -> None:
    with pytest.raises(ProtocolError, match="allowed: 4 for 2 rows"):
        check(bytes(3), 2, 9, "votes", odds=True)
