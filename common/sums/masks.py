"""Keys and masks: streams of uniform words, of which a sample's are found without making those before it.

Lives here: key agreement (X25519), derivation (HKDF-SHA256) and the stream (AES-256 in counter mode). Does not live
here: who shares a mask with whom (client/sums, server/secure_sums).

Every key is derived for one purpose in one context: the digest of the terms, which name the job, contract, pool,
samples, kind, teachers, policies and sites, and the names and public keys of those who share it. A key makes one
stream, whose word for (sample, class) is always the same; it masks one number only, since a site's answer to a
sample is fixed by the terms.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
_SPARE = 16  # bytes that the cipher wants beyond those it writes
_PART = 2**16  # words of a mask at a time


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


class Stream:
    """The stream of a key from word `first` on."""

    def __init__(self, key: bytes, first: int) -> None:
        start = first * WORD.itemsize
        counter = (start // _BLOCK).to_bytes(_BLOCK, "big")
        self._cipher = Cipher(algorithms.AES256(key), modes.CTR(counter)).encryptor()
        self._cipher.update(bytes(start % _BLOCK))

    def read(self, count: int, memory: bytearray) -> Words:
        """Return the next words, which lie in `memory` if that is `count` words and `_SPARE` bytes."""
        size = count * WORD.itemsize
        self._cipher.update_into(bytes(size), memory)
        return np.frombuffer(memory, WORD, count).astype(np.uint32, copy=False)


@dataclass(frozen=True)
class Mask:
    """A mask over some columns of a site's rows; `sign` is +1 where it is added, -1 where it is subtracted."""

    key: bytes
    columns: NDArray[np.int64]
    """Which columns, in the order of their classes: both sides of a pair must take the same order."""
    sign: int = 1


def put_on(masks: Iterable[Mask], rows: Words, first: int) -> None:
    """Mask (b, k) rows of samples first..first+b-1 in place, modulo 2^32."""
    for part, columns, total in _by_columns(masks, rows, first):
        part[:, columns] += total


def take_off(masks: Iterable[Mask], rows: Words, first: int) -> None:
    """Undo `put_on`."""
    for part, columns, total in _by_columns(masks, rows, first):
        part[:, columns] -= total


def _by_columns(masks: Iterable[Mask], rows: Words, first: int) -> Iterator[tuple[Words, NDArray[np.int64], Words]]:
    """Yield parts of the rows, and sums of the masks over the same columns of them.

    Masks are added up since reaching columns takes longer, and in parts that stay in the processor's cache: into fresh
    memory a stream takes eight times as long.
    """
    streams = [(mask, Stream(mask.key, first * len(mask.columns))) for mask in masks]
    widest = max((len(mask.columns) for mask, _ in streams), default=1)
    size = max(1, _PART // max(1, widest))
    memory = bytearray(_SPARE + size * widest * WORD.itemsize)
    for start in range(0, len(rows), size):
        part, sums = rows[start : start + size], dict[bytes, tuple[NDArray[np.int64], Words]]()
        for mask, stream in streams:
            shape = len(part), len(mask.columns)
            words = stream.read(len(part) * len(mask.columns), memory).reshape(shape)
            _, total = sums.setdefault(mask.columns.tobytes(), (mask.columns, np.zeros(shape, np.uint32)))
            (np.add if mask.sign > 0 else np.subtract)(total, words, out=total)
        for columns, total in sums.values():
            yield part, columns, total


def pair_sign(site: str, other: str) -> int:
    """Of two sites, the one whose name comes first adds their mask and the other subtracts it."""
    return 1 if site < other else -1
