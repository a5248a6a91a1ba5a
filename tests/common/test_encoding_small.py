"""Log-probabilities in few bytes (u8, top-K, top-K-u8, votes): bounds, bytes written out by hand, and hostile rows."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax, logsumexp

from consilience.common import encoding as encoding_module
from consilience.common.encoding import check, decode, encode, row_bytes
from consilience.common.errors import ProtocolError

EVERY = ["f32", "f16", "u8", "top-1", "top-2", "top-3", "top-200", "top-1-u8", "top-2-u8", "top-200-u8", "votes"]
SMALL = EVERY[2:]


def random_rows(seed: int, rows: int, classes: int, spread: float) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(0, spread, (rows, classes))
    return np.asarray(log_softmax(logits, axis=1), np.float32)


def log_of(*probs: float) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(np.array([probs], np.float32))


def sure_of(place: int, classes: int) -> np.ndarray:
    return np.where(np.arange(classes) == place, 0, -np.inf)[None].astype(np.float32)


HALVES = log_of(0.1, 0.5, 0.25, 0.15)
VECTORS = [
    ("f32", log_of(0.5, 0.5), "18 72 31 bf 18 72 31 bf"),
    ("f16", log_of(0.5, 0.25, 0.25), "8c b9 8c bd 8c bd"),
    ("u8", log_of(0.5, 0.25, 0.25), "00 2b 2b"),
    ("u8", log_of(0, 1), "ff 00"),
    ("top-2", HALVES, "01 02 8c b9 8c bd 8c bd"),
    ("top-1", HALVES, "01 8c b9 8c b9"),
    ("top-9", log_of(0.5, 0.5), "00 01 8c b9 8c b9"),
    ("top-1", sure_of(258, 300), "02 01 00 00 ff fb"),
    # 64 levels. The first leaves 0.5 of 3/4, level floor(64 sqrt(2/3)), the next half of 2/3, floor(64 sqrt(3/4)).
    ("top-1-u8", HALVES, "74"),
    ("top-2-u8", HALVES, "74 b7"),
    ("top-4-u8", HALVES, "74 b7 f9 00"),
    ("top-1-u8", log_of(0.5, 0.5), "7f"),
    ("top-9-u8", log_of(0, 1), "80 00"),
    ("top-1-u8", sure_of(258, 300), "b4 db"),
    ("top-1-u8", sure_of(65_536, 65_537), "00 00 00 01"),
    ("top-3-u8", np.zeros((1, 1), np.float32), "00"),
    ("votes", HALVES, "01"),
    ("votes", sure_of(258, 300), "02 01"),
    ("votes", sure_of(65_536, 65_537), "00 00 01 00"),
]


@pytest.mark.parametrize(("encoding", "row", "expected"), VECTORS, ids=[f"{v[0]}-{v[2]}" for v in VECTORS])
def test_bytes_are_those_that_the_page_specifies(encoding: str, row: np.ndarray, expected: str) -> None:
    assert encode(row, encoding) == bytes.fromhex(expected)
    check(bytes.fromhex(expected), 1, row.shape[1], encoding)


def test_what_known_bytes_mean() -> None:
    byte = np.exp(-24 * (43 / 255) ** 2)
    found = np.exp(decode(bytes([0, 43, 43]), 1, 3, "u8"))
    assert np.allclose(found, np.array([[1, byte, byte]]) / (1 + 2 * byte), atol=1e-6)
    found = np.exp(decode(bytes.fromhex("01 02 8c b9 8c bd 8c bd"), 1, 4, "top-2"))
    assert np.allclose(found, [[0.125, 0.5, 0.25, 0.125]], atol=2e-4)
    left = np.array([0.75 * (52.5 / 64) ** 2, 2 / 3 * (55.5 / 64) ** 2])
    told = [left[0] * left[1] / 2, 1 - left[0], left[0] * (1 - left[1]), left[0] * left[1] / 2]
    assert np.allclose(np.exp(decode(bytes.fromhex("74 b7"), 1, 4, "top-2-u8")), [told], atol=1e-6)
    assert np.allclose(np.exp(decode(b"\1", 1, 4, "votes")), [[0.1 / 3, 0.9, 0.1 / 3, 0.1 / 3]])
    assert np.array_equal(decode(b"\0", 1, 1, "votes"), [[0]])


@given(st.integers(0, 2**32 - 1), st.integers(0, 20), st.integers(1, 300), st.floats(0, 30))
def test_u8_is_within_its_bounds(seed: int, rows: int, classes: int, spread: float) -> None:
    given_rows = random_rows(seed, rows, classes, spread).astype(np.float64)
    back = decode(encode(given_rows.astype(np.float32), "u8"), rows, classes, "u8").astype(np.float64)
    below = given_rows.max(axis=1, keepdims=True) - given_rows
    root = np.sqrt(np.log(classes))
    bound = 0.0193 * np.sqrt(below) + 0.0202 * root + 0.0003
    assert np.all((np.abs(back - given_rows) <= bound)[below <= 24])
    assert np.all(np.abs(np.exp(back) - np.exp(given_rows)) <= 0.005 + 0.0085 * root)


@pytest.mark.parametrize("classes", [2, 10, 1_000, 30_000])
@pytest.mark.parametrize("side", [-1, 1])
def test_u8_is_within_its_bounds_where_it_is_worst(classes: int, side: int) -> None:
    """All classes but the largest stand a hair beside the middle of one step, so that every error has one sign."""
    steps = np.arange(0, 255, max(1, classes // 500))
    middles = 24 * ((steps + 0.5 + side * 1e-4) / 255) ** 2
    logits = np.repeat(-middles[:, None], classes, axis=1)
    logits[:, 0] = 0
    given_rows = log_softmax(logits, axis=1)
    back = decode(encode(given_rows.astype(np.float32), "u8"), len(middles), classes, "u8").astype(np.float64)
    root = np.sqrt(np.log(classes))
    error = np.abs(back - given_rows)
    assert np.all(error <= 0.0193 * np.sqrt(-logits) + 0.0202 * root + 0.0003)
    assert error.max() > 0.06
    assert np.all(np.abs(np.exp(back) - np.exp(given_rows)) <= 0.005 + 0.0085 * root)


def test_u8_keeps_what_is_far_below_at_its_reach() -> None:
    row = np.array([[0, -23.9, -30, -1e30, -np.inf]], np.float32)
    assert encode(row, "u8")[2:] == b"\xff\xff\xff"
    assert np.allclose(decode(encode(row, "u8"), 1, 5, "u8"), [[0, -23.9, -24, -24, -24]], atol=0.1)


@given(
    st.integers(0, 2**32 - 1), st.integers(0, 10), st.integers(1, 400), st.floats(0, 30), st.sampled_from([1, 3, 20])
)
def test_the_largest_are_within_their_bounds_and_the_rest_is_even(
    seed: int, rows: int, classes: int, spread: float, most: int
) -> None:
    given_rows = random_rows(seed, rows, classes, spread).astype(np.float64)
    back = decode(encode(given_rows.astype(np.float32), f"top-{most}"), rows, classes, f"top-{most}")
    order = np.argsort(-given_rows.astype(np.float32), axis=1, kind="stable")
    sent, left = order[:, :most], order[:, most:]
    error = np.abs(np.take_along_axis(back - given_rows, sent, axis=1))
    slack = 2.0**-11 * 1.02 * np.log(most + 1) + 1e-5
    assert np.all(error <= np.abs(np.take_along_axis(given_rows, sent, axis=1)) * 2.0**-11 + slack)
    if classes > most:
        even = np.take_along_axis(back, left, axis=1)
        assert np.all(even == even[:, :1])
        rest = logsumexp(np.take_along_axis(given_rows, left, axis=1), axis=1) - np.log(classes - most)
        assert np.all(np.abs(even[:, 0] - rest) <= np.abs(rest) * 2.0**-11 + slack + 2.0**-11 * np.log(classes))


@given(
    st.integers(0, 2**32 - 1), st.integers(0, 10), st.integers(1, 400), st.floats(0, 30), st.sampled_from([1, 3, 20])
)
def test_shares_of_what_is_left_are_within_their_bounds(
    seed: int, rows: int, classes: int, spread: float, most: int
) -> None:
    given_rows = random_rows(seed, rows, classes, spread)
    data = encode(given_rows, f"top-{most}-u8")
    levels = 256 // classes if classes <= 16 else min(256, 65536 // classes)
    assert len(data) == rows * min(most, classes) * (1 if classes <= 16 else 2)
    back = decode(data, rows, classes, f"top-{most}-u8")
    order = np.argsort(-given_rows, axis=1, kind="stable")
    told, found = (np.take_along_axis(np.exp(each, dtype=np.float64), order, axis=1) for each in (given_rows, back))
    step, sent = 1 / levels + 1 / (4 * levels**2), min(most, classes)
    bound = step * np.maximum(np.arange(1, sent + 1), np.where(np.arange(sent) == 0, sent**2, 0))
    assert np.all(np.abs(told - found)[:, :sent] <= bound + 2e-5)
    assert np.all(np.diff(found[:, :sent], axis=1) < np.finfo(np.float32).tiny)  # each below the one before
    before = [each[:, ::-1].cumsum(axis=1)[:, ::-1][:, :sent] for each in (told, found)]
    shares = [(each[:, :1] / left[:, :1]) for each, left in zip((told, found), before, strict=True)]
    assert most > 1 or np.all(np.abs(shares[0] - shares[1]) <= step + 1e-6)
    if classes > most:
        assert np.all(found[:, most:] == found[:, most : most + 1])
        assert np.all(found[:, most] <= found[:, most - 1])


def test_the_bound_of_a_share_is_no_wider_than_it_must_be() -> None:
    """Of 16 classes there are 16 levels; a top probability at the end of the coarsest one is off by half of it."""
    sure = np.linspace(1 / 16, 1, 20_001)
    rows = np.log(np.concatenate([sure[:, None], np.repeat((1 - sure)[:, None] / 15, 15, axis=1)], axis=1) + 1e-300)
    back = decode(encode(rows.astype(np.float32), "top-1-u8"), len(rows), 16, "top-1-u8")
    error = np.abs(np.exp(back[:, 0]) - sure)
    assert 0.9 * 15 / 16 * (1 / 16 - 1 / 1024) < error.max() <= 1 / 16 + 1 / 1024


def test_classes_that_the_steps_would_have_in_the_other_order_keep_theirs() -> None:
    """Ten classes, the second close to the first: 0.33 is told as 0.342, and 0.36 as 0.334."""
    row = log_of(0.36, 0.33, *[0.31 / 8] * 8)
    back = np.exp(decode(encode(row, "top-2-u8"), 1, 10, "top-2-u8"))[0]
    assert back.argmax() == 0
    assert back[:2] == pytest.approx([0.342, 0.334], abs=1e-3)
    assert back.sum() == pytest.approx(1, abs=1e-6)


def test_a_class_that_nothing_is_left_for_has_an_even_share_of_it() -> None:
    row = np.array([[0, -np.inf, -1e30, -2000]], np.float32)
    back = np.exp(decode(encode(row, "top-3-u8"), 1, 4, "top-3-u8"))
    assert np.all(np.isfinite(back))
    assert back[0, 0] > 1 - 1e-4


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 9), st.sampled_from(EVERY))
def test_a_vote_is_the_first_of_the_largest_and_every_encoding_keeps_it_among_them(
    seed: int, rows: int, classes: int, encoding: str
) -> None:
    """Values on a coarse grid, so that there are ties."""
    given_rows = log_softmax(np.random.default_rng(seed).integers(0, 3, (rows, classes)), axis=1).astype(np.float32)
    back = decode(encode(given_rows, encoding), rows, classes, encoding)
    kept = np.take_along_axis(given_rows, back.argmax(axis=1)[:, None], axis=1)[:, 0]
    assert np.array_equal(kept, given_rows.max(axis=1))
    assert np.array_equal(back.argmax(axis=1), given_rows.argmax(axis=1))


@given(st.integers(0, 2**32 - 1), st.integers(0, 12), st.integers(1, 40), st.sampled_from(EVERY))
def test_rows_sum_to_one_and_stand_alone(seed: int, rows: int, classes: int, encoding: str) -> None:
    given_rows = random_rows(seed, rows, classes, 3)
    data = encode(given_rows, encoding)
    width = row_bytes(classes, encoding)
    assert len(data) == rows * width
    assert data == b"".join(encode(given_rows[i : i + 1], encoding) for i in range(rows))
    back = decode(data, rows, classes, encoding)
    tolerance = 2.0**-10 * np.log(classes + 1) if encoding == "f16" else 1e-5
    assert np.all(np.abs(np.exp(back.astype(np.float64)).sum(axis=1) - 1) <= tolerance)
    again = [decode(data[i * width :][:width], 1, classes, encoding) for i in range(rows)]
    assert np.array_equal(back, np.concatenate([np.empty((0, classes), np.float32), *again]))


@pytest.mark.parametrize("encoding", EVERY)
def test_blocks_change_nothing(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(1, 50, 30, 4)
    data = encode(rows, encoding)
    back = decode(data, 50, 30, encoding)
    for size in (1, 100, 777):
        monkeypatch.setattr(encoding_module, "BLOCK_VALUES", size)
        assert encode(rows, encoding) == data
        assert np.array_equal(decode(data, 50, 30, encoding), back)


def top(ids: list[int], *values: float, id_type: str = "u1") -> bytes:
    with np.errstate(divide="ignore"):
        return np.array(ids, id_type).tobytes() + np.log(np.array(values)).astype("<f2").tobytes()


GOOD = top([3, 0], 0.5, 0.3, 0.2)
BAD = [
    ("top-2", top([5, 0], 0.5, 0.3, 0.2), "names class 5 of 5, which are counted from 0"),
    ("top-2", top([3, 255], 0.5, 0.3, 0.2), "names class 255 of 5"),
    ("top-2", top([3, 3], 0.5, 0.3, 0.2), "names a class twice"),
    ("top-2", top([3, 0], 0.3, 0.5, 0.2), "is not in order"),
    ("top-2", top([3, 0], 0.4, 0.4, 0.2), "is not in order"),
    ("top-2", top([0, 0], 0.4, 0.4, 0.2), "is not in order"),
    ("top-2", top([3, 0], 0.5, 0.3, 0.3), "sum to 1.1"),
    ("top-2", top([3, 0], 0.5, 0.3, 0.1), "sum to 0.8998"),
    ("top-2", top([3, 0], 0.5, 0.3, np.nan), "NaN"),
    ("top-2", top([3, 0], np.nan, 0.3, 0.7), "NaN"),
    ("top-2", top([3, 0], 1, 0, 0), "NaN or an infinite"),
    ("top-2", top([3, 0], 1e4, 0.3, 0.2), "sum to"),
    ("top-2", top([3, 0], 1.0, 1e-3, 5e-3), "leaves more to a class not sent than to one that is"),
    ("top-2", top([0, 3], 1e-3, 1e-3, 1.005), "leaves more than everything"),
    ("top-2", top([0, 3], 0.1, 0.1, 0.8), "leaves more to a class not sent"),
    ("u8", bytes([1, 2, 3, 4, 5]), "has no byte 0"),
    ("top-2-u8", bytes([51, 255]), "names class 5 of 5, which are counted from 0"),
    ("top-2-u8", bytes([51, 60]), "names a class twice"),
    ("top-5-u8", bytes([51, 0, 102, 153, 205]), "leaves something behind its last class"),
    ("votes", bytes([5]), "names class 5 of 5"),
]


@pytest.mark.parametrize(("encoding", "row", "words"), BAD, ids=[f"{b[0]}-{b[1].hex()}" for b in BAD])
def test_rows_that_are_not_as_specified_are_refused_by_number(encoding: str, row: bytes, words: str) -> None:
    good = {
        "top-2": GOOD,
        "u8": bytes([9, 0, 9, 9, 9]),
        "top-2-u8": bytes([51, 0]),
        "top-5-u8": bytes([51, 0, 102, 153, 204]),
        "votes": b"\0",
    }[encoding]
    check(good * 3, 3, 5, encoding)
    with pytest.raises(ProtocolError, match=f"row 1 .*{words}"):
        decode(good + row + good, 3, 5, encoding)


def test_a_bad_row_is_named_by_its_number_in_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding_module, "BLOCK_VALUES", 100)
    with pytest.raises(ProtocolError, match="row 777 names class 9 of 5"):
        check(bytes(777) + b"\x09" + bytes(100), 878, 5, "votes")


def test_two_classes_apart_are_found_twice_though_another_stands_between() -> None:
    row = top([3, 0, 3], 0.5, 0.3, 0.15, 0.05)
    with pytest.raises(ProtocolError, match="names a class twice"):
        decode(row, 1, 5, "top-3")


@pytest.mark.parametrize("encoding", SMALL)
@pytest.mark.parametrize("wrong", [-1, 1, 100])
def test_other_lengths_are_refused(encoding: str, wrong: int) -> None:
    data = encode(random_rows(0, 4, 7, 2), encoding)
    changed = data[:wrong] if wrong < 0 else data + bytes(wrong)
    with pytest.raises(ProtocolError, match=f"allowed: {len(data)} for 4 rows of 7 classes as {encoding}"):
        decode(changed, 4, 7, encoding)
    with pytest.raises(ProtocolError, match="allowed: 0 for 0 rows"):
        decode(data, 0, 7, encoding)


@given(st.data(), st.integers(0, 3), st.sampled_from([1, 2, 3, 5, 257]), st.sampled_from(SMALL))
def test_random_bytes_give_a_distribution_or_a_refusal(
    draw: st.DataObject, rows: int, classes: int, encoding: str
) -> None:
    size = rows * row_bytes(classes, encoding)
    data = draw.draw(st.binary(min_size=size, max_size=size) | st.binary(max_size=40))
    try:
        values = decode(data, rows, classes, encoding)
    except ProtocolError:
        return
    assert values.shape == (rows, classes)
    assert np.all(np.isfinite(values))
    assert np.all(np.abs(np.exp(values.astype(np.float64)).sum(axis=1) - 1) <= 1e-4)


@given(st.data(), st.sampled_from([2, 3, 5, 257]), st.sampled_from(SMALL))
def test_a_changed_byte_gives_a_distribution_or_a_refusal(draw: st.DataObject, classes: int, encoding: str) -> None:
    data = bytearray(encode(random_rows(7, 2, classes, 2), encoding))
    for _ in range(draw.draw(st.integers(1, 3))):
        data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    try:
        values = decode(bytes(data), 2, classes, encoding)
    except ProtocolError:
        return
    assert np.all(np.abs(np.exp(values.astype(np.float64)).sum(axis=1) - 1) <= 1e-4)


@pytest.mark.parametrize("encoding", ["f16", "u8", "top-10", "top-10-u8", "votes"])
def test_a_check_takes_little_memory_however_many_classes_there_are(encoding: str) -> None:
    """A site that claims 1,000,000 classes cannot make the server hold rows of them."""
    classes = 1_000_000
    one = encode(np.full((1, classes), -np.log(classes), np.float32), encoding)
    rows = max(2, 8_000_000 // len(one))
    data = one * rows
    tracemalloc.start()
    check(data, rows, classes, encoding)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * len(data) + 2**20
