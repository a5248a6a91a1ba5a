"""Shares of seeds: enough of them give the seed back, fewer fit every seed alike, and seals open for their holder."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from scipy.stats import chisquare

from consilience.common.errors import ProtocolError
from consilience.common.sums.masks import public_hex
from consilience.common.sums.shares import SEALED_BYTES, combine, seal, split, unseal

SEED = bytes(range(16))
ROSTER = "a" * 64
ONE, TWO = (X25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in (1, 2))


def times(a: int, b: int) -> int:
    """Product in GF(2^128) modulo x^128 + x^7 + x^2 + x + 1, bit by bit: the oracle."""
    out = 0
    while b:
        if b & 1:
            out ^= a
        a, b = a << 1, b >> 1
        if a >> 128:
            a ^= (1 << 128) | 0x87
    return out


def inverse(a: int) -> int:
    """a^(2^128 - 2)."""
    out, power = 1, a
    for _ in range(127):
        power = times(power, power)
        out = times(out, power)
    return out


def interpolate(points: dict[int, int], at: int) -> int:
    """Value at `at` of the polynomial through the points."""
    out = 0
    for x, y in points.items():
        term = y
        for other in points:
            if other != x:
                term = times(times(term, at ^ other), inverse(x ^ other))
        out ^= term
    return out


def test_any_threshold_of_shares_gives_the_seed_back() -> None:
    shares = dict(enumerate(split(SEED, 3, 5)))
    for chosen in combinations(range(5), 3):
        held = {place: shares[place] for place in chosen}
        assert combine(held, 3) == SEED
        oracle = interpolate({place + 1: int.from_bytes(share, "big") for place, share in held.items()}, 0)
        assert oracle.to_bytes(16, "big") == SEED
    assert combine(shares, 3) == SEED
    assert combine(dict(reversed(list(shares.items()))), 3) == SEED


def test_fewer_shares_fit_every_seed() -> None:
    shares = split(SEED, 3, 5)
    told = {place + 1: int.from_bytes(shares[place], "big") for place in (0, 3)}
    for other in (bytes(16), b"another seed, ok"):
        points = {**told, 0: int.from_bytes(other, "big")}
        # A polynomial of degree 2 goes through the two shares and any seed at all.
        third = interpolate(points, 2).to_bytes(16, "big")
        assert combine({0: shares[0], 3: shares[3], 1: third}, 3) == other


def test_shares_look_the_same_whatever_the_seed() -> None:
    for seed in (bytes(16), b"\xff" * 16):
        counts = np.bincount(
            np.frombuffer(b"".join(b"".join(split(seed, 2, 3)[:1]) for _ in range(600)), np.uint8) >> 4, minlength=16
        )
        assert chisquare(counts).pvalue > 1e-4


def test_too_few_shares_are_refused() -> None:
    shares = dict(enumerate(split(SEED, 3, 5)))
    with pytest.raises(ProtocolError, match="2 shares of a seed are there; needed: 3"):
        combine({0: shares[0], 1: shares[1]}, 3)


def test_a_seal_opens_for_its_holder_only() -> None:
    data = seal(ONE, public_hex(TWO), ROSTER, "ant", "bee", (SEED, bytes(16)))
    assert len(data) == 2 * SEALED_BYTES
    assert SEED.hex() not in data
    assert unseal(TWO, public_hex(ONE), ROSTER, "ant", "bee", data) == (SEED, bytes(16))
    wrong = f"{int(data[0], 16) ^ 1:x}{data[1:]}"
    for key, theirs, roster, sender, holder, sealed in (
        (TWO, public_hex(ONE), "b" * 64, "ant", "bee", data),  # another roster
        (TWO, public_hex(ONE), ROSTER, "bee", "ant", data),  # the other way round
        (TWO, public_hex(ONE), ROSTER, "cat", "bee", data),
        (TWO, public_hex(TWO), ROSTER, "ant", "bee", data),
        (TWO, public_hex(ONE), ROSTER, "ant", "bee", wrong),
        (TWO, public_hex(ONE), ROSTER, "ant", "bee", ""),
    ):
        with pytest.raises(ProtocolError, match="are not what it sealed"):
            unseal(key, theirs, roster, sender, holder, sealed)
