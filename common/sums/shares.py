"""Shares of seeds: t of n give the seed back, fewer tell nothing; each is sealed for the site that holds it.

Lives here: Shamir's scheme over GF(2^128), which is PyCryptodome's, and sealing. Does not live here: who may open
which share (client/sums).
"""

from __future__ import annotations

from collections.abc import Mapping

from Crypto.Protocol.SecretSharing import Shamir
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from consilience.common.errors import ProtocolError
from consilience.common.sums.masks import SEED_BYTES, agree

SEALED_BYTES = 2 * SEED_BYTES + 16
"""Two shares and the seal's tag."""
_NONCE = bytes(12)  # a key seals one message


def split(seed: bytes, threshold: int, count: int) -> list[bytes]:
    """Return `count` shares of a seed of 16 bytes, any `threshold` of which give it back."""
    return [bytes(share) for _, share in Shamir.split(threshold, count, seed, ssss=False)]


def combine(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """Return the seed from its shares by their places 0..count-1. Raises `ProtocolError` when they are too few."""
    if len(shares) < threshold:
        raise ProtocolError(f"{len(shares)} shares of a seed are there; needed: {threshold}")
    chosen = sorted(shares.items())[:threshold]
    return bytes(Shamir.combine([(place + 1, share) for place, share in chosen], ssss=False))


def seal(key: X25519PrivateKey, theirs: str, roster: str, sender: str, holder: str, shares: tuple[bytes, bytes]) -> str:
    """Encrypt two shares from `sender` for `holder`, whose public key is `theirs`. Raises `ProtocolError`."""
    box = ChaCha20Poly1305(agree(key, theirs, "seal", roster, sender, holder))
    return box.encrypt(_NONCE, b"".join(shares), None).hex()


def unseal(key: X25519PrivateKey, theirs: str, roster: str, sender: str, holder: str, data: str) -> tuple[bytes, bytes]:
    """Decrypt what `sender` sealed for `holder`. Raises `ProtocolError` when it is not just that."""
    box = ChaCha20Poly1305(agree(key, theirs, "seal", roster, sender, holder))
    try:
        plain = box.decrypt(_NONCE, bytes.fromhex(data), None)
    except (InvalidTag, ValueError):
        raise ProtocolError(f"The shares from site {sender} are not what it sealed for site {holder}") from None
    if len(plain) != 2 * SEED_BYTES:
        raise ProtocolError(f"The shares from site {sender} have {len(plain)} bytes; allowed: {2 * SEED_BYTES}")
    return plain[:SEED_BYTES], plain[SEED_BYTES:]
