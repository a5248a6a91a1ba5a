"""Masks: two sites make the same one, any piece of it stands for itself, and put on and taken off is as before."""

from __future__ import annotations

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from consilience.common.errors import ProtocolError
from consilience.common.sums.masks import Mask, Stream, pair_key, pair_sign, public_hex, put_on, self_key, take_off
from consilience.common.sums.ring import Words

KEY = bytes(range(32))
ONE, TWO = (X25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in (1, 2))
TERMS = "a" * 64


def words(key: bytes, first: int, count: int) -> Words:
    return Stream(key, first).read(count, bytearray(4 * count + 16))


def test_both_sites_make_the_same_key() -> None:
    one = pair_key(ONE, public_hex(TWO), TERMS, ("ant", "bee"))
    assert one == pair_key(TWO, public_hex(ONE), TERMS, ("bee", "ant"))
    assert len(one) == 32
    assert pair_sign("ant", "bee") == -pair_sign("bee", "ant")


def test_another_context_is_another_key() -> None:
    keys = {
        pair_key(ONE, public_hex(TWO), TERMS, ("ant", "bee")),
        pair_key(ONE, public_hex(TWO), "b" * 64, ("ant", "bee")),
        pair_key(ONE, public_hex(TWO), TERMS, ("ant", "cat")),
        self_key(bytes(16), TERMS, "ant"),
        self_key(bytes(16), TERMS, "bee"),
        self_key(bytes(16), "b" * 64, "ant"),
    }
    assert len(keys) == 6


@pytest.mark.parametrize("point", ["00" * 32, "01" + "00" * 31])
def test_a_point_that_gives_everybody_the_same_key_is_refused(point: str) -> None:
    with pytest.raises(ProtocolError, match="X25519"):
        pair_key(ONE, point, TERMS, ("ant", "bee"))


def test_the_stream_is_the_cipher_of_the_standard() -> None:
    """NIST SP 800-38A, F.5.5, has another first counter; FIPS-197's vector is the block of counter 0x0011..ff."""
    key = bytes(range(32))
    counter = int.from_bytes(bytes.fromhex("00112233445566778899aabbccddeeff"), "big")
    block = words(key, 4 * counter, 4).astype("<u4").tobytes()
    assert block.hex() == "8ea2b7ca516745bfeafc49904b496089"


@given(st.integers(0, 1000), st.integers(0, 50), st.integers(0, 50))
@settings(max_examples=40)
def test_any_piece_is_part_of_the_whole(first: int, before: int, count: int) -> None:
    whole = words(KEY, first, before + count)
    np.testing.assert_array_equal(words(KEY, first + before, count), whole[before:])
    stream = Stream(KEY, first)
    np.testing.assert_array_equal(stream.read(before, bytearray(4 * before + 16)), whole[:before])
    np.testing.assert_array_equal(stream.read(count, bytearray(4 * count + 16)), whole[before:])


def test_far_pieces_do_not_wrap() -> None:
    near, far = words(KEY, 0, 8), words(KEY, 2**46, 8)
    assert not np.array_equal(near, far)


@given(st.integers(1, 6), st.integers(1, 20))
@settings(max_examples=30)
def test_pieces_of_rows_are_masked_as_the_whole(piece: int, rows: int) -> None:
    mask = Mask(KEY, np.array([2, 0]), -1)
    before = np.random.default_rng(0).integers(0, 2**32, (rows, 3), dtype=np.uint32)
    whole = before.copy()
    put_on([mask], whole, 10)
    np.testing.assert_array_equal(whole[:, 1], before[:, 1])  # not one of the columns
    assert not np.array_equal(whole, before)
    pieces = before.copy()
    for start in range(0, rows, piece):
        put_on([mask], pieces[start : start + piece], 10 + start)
    np.testing.assert_array_equal(pieces, whole)
    take_off([mask], whole, 10)
    np.testing.assert_array_equal(whole, before)


def test_many_rows_are_masked_as_few_at_a_time() -> None:
    mask = Mask(KEY, np.array([0]))
    whole = np.zeros((70_001, 1), np.uint32)  # more words than are read at a time
    pieces = whole.copy()
    put_on([mask], whole, 3)
    for start in range(0, len(pieces), 9_999):
        put_on([mask], pieces[start : start + 9_999], 3 + start)
    np.testing.assert_array_equal(whole, pieces)
    assert len(np.unique(whole)) > 69_000


def test_one_adds_what_the_other_subtracts() -> None:
    rows = np.array([[1, 2]], np.uint32), np.array([[30, 40]], np.uint32)
    put_on([Mask(KEY, np.array([0, 1]), 1)], rows[0], 5)
    put_on([Mask(KEY, np.array([0, 1]), -1)], rows[1], 5)
    np.testing.assert_array_equal(rows[0] + rows[1], [[31, 42]])


def test_masks_together_are_each_after_the_other() -> None:
    masks = [
        Mask(bytes([number]) * 32, np.array(columns), sign)
        for number, (columns, sign) in enumerate([((2, 0), 1), ((0, 2), -1), ((2, 0), -1), ((1,), 1), ((2, 0), 1)])
    ]
    before = np.random.default_rng(0).integers(0, 2**32, (5, 3), dtype=np.uint32)
    together, one = before.copy(), before.copy()
    put_on(iter(masks), together, 3)
    for mask in masks:
        put_on([mask], one, 3)
    np.testing.assert_array_equal(together, one)
    take_off(masks, together, 3)
    np.testing.assert_array_equal(together, before)
