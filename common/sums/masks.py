"""Keys and masks: streams of uniform words, of which a sample's are found without making those before it.

Lives here: key agreement (X25519), derivation (HKDF-SHA256) and the stream (AES-256 in counter mode). Does not live
here: who shares a mask with whom (client/sums, server/secure_sums).

Every key is derived for one purpose in one context: the digest of the terms, which name the job, contract, pool,
samples, kind, teachers, policies and sites, and the names and public keys of those who share it. A key makes one
stream, whose word for (sample, class) is always the same; it masks one number only, since a site's answer to a
sample is fixed by the terms.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from consilience.common.errors import ProtocolError
from consilience.common.files import canonical_json
from consilience.common.sums.ring import WORD, Words

SEED_BYTES = 16
"""Bytes of a seed, which is what is shared: 128 bits."""
_BLOCK = 16  # bytes of the cipher's block


def derive(secret: bytes, purpose: str, *context: str) -> bytes:
    """Return 32 bytes derived from `secret` for one purpose in one context."""
    info = b"consilience sums 1\n" + canonical_json([purpose, *context])
    return HKDF(hashes.SHA256(), 32, salt=None, info=info).derive(secret)


def mask_key(seed: bytes, terms: str, site: str) -> X25519PrivateKey:
    """Return the key with which a site agrees on masks, made from the seed that is shared."""
    return X25519PrivateKey.from_private_bytes(derive(seed, "mask key", terms, site))


def self_key(seed: bytes, terms: str, site: str) -> bytes:
    """Return the key of a site's own mask."""
    return derive(seed, "self mask", terms, site)


def public_hex(key: X25519PrivateKey) -> str:
    """Return the public half, 64 hexadecimal digits."""
    return key.public_key().public_bytes_raw().hex()


def agree(own: X25519PrivateKey, theirs: str, purpose: str, *context: str) -> bytes:
    """Return the key that `own` and the public key `theirs` (hex) have in common, for one purpose in one context.

    Raises `ProtocolError` when `theirs` is a point that gives everybody the same key.
    """
    try:
        secret = own.exchange(X25519PublicKey.from_public_bytes(bytes.fromhex(theirs)))
    except ValueError:
        raise ProtocolError("A site's public key for secure sums is not a usable X25519 key") from None
    return derive(secret, purpose, *context, *sorted((public_hex(own), theirs)))


def pair_key(own: X25519PrivateKey, theirs: str, terms: str, names: tuple[str, str]) -> bytes:
    """Return the key of the mask that two sites share; the same from either side. Raises `ProtocolError`."""
    return agree(own, theirs, "pair mask", terms, *sorted(names))


def words(key: bytes, first: int, count: int) -> Words:
    """Return words first..first+count-1 of the stream of `key`."""
    start = first * WORD.itemsize
    skipped = start % _BLOCK
    cipher = Cipher(algorithms.AES256(key), modes.CTR((start // _BLOCK).to_bytes(_BLOCK, "big"))).encryptor()
    stream = cipher.update(bytes(skipped + count * WORD.itemsize))
    return np.frombuffer(stream, WORD, offset=skipped).astype(np.uint32, copy=False)


@dataclass(frozen=True)
class Mask:
    """A mask over some columns of a site's rows; `sign` is +1 where it is added, -1 where it is subtracted."""

    key: bytes
    columns: NDArray[np.int64]
    """Which columns, in the order of their classes: both sides of a pair must take the same order."""
    sign: int = 1

    def words(self, first: int, count: int) -> Words:
        """Return (count, columns) the mask of samples first..first+count-1, its sign aside."""
        width = len(self.columns)
        return words(self.key, first * width, count * width).reshape(count, width)


def put_on(masks: Iterable[Mask], rows: Words, first: int) -> None:
    """Mask (b, k) rows of samples first..first+b-1 in place, modulo 2^32."""
    for columns, total in _by_columns(masks, len(rows), first):
        rows[:, columns] += total


def take_off(masks: Iterable[Mask], rows: Words, first: int) -> None:
    """Undo `put_on`."""
    for columns, total in _by_columns(masks, len(rows), first):
        rows[:, columns] -= total


def _by_columns(masks: Iterable[Mask], count: int, first: int) -> Iterable[tuple[NDArray[np.int64], Words]]:
    """Return sums of the masks over the same columns: reaching these takes longer than adding masks up."""
    sums = dict[bytes, tuple[NDArray[np.int64], Words]]()
    for mask in masks:
        empty = np.zeros((count, len(mask.columns)), np.uint32)
        _, total = sums.setdefault(mask.columns.tobytes(), (mask.columns, empty))
        (np.add if mask.sign > 0 else np.subtract)(total, mask.words(first, count), out=total)
    return sums.values()


def pair_sign(site: str, other: str) -> int:
    """Of two sites, the one whose name comes first adds their mask and the other subtracts it."""
    return 1 if site < other else -1
