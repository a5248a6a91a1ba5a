"""What is written of keys that were turned away stays small, whoever knocks."""

from __future__ import annotations

import base64
import os
import time
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from consilience.server.strangers import MOST_BYTES, MOST_KEYS, Strangers


def pem() -> bytes:
    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def test_a_key_is_written_down_once_and_many_keys_are_not(tmp_path: Path) -> None:
    strangers, began = Strangers(tmp_path), time.time() - 1
    one = pem()
    for _ in range(3):
        strangers.turned_away(one, "unknown")
    assert [refusal.reason for refusal in strangers.since(began)] == ["unknown"]
    for _ in range(MOST_KEYS + 5):
        strangers.turned_away(pem(), "clock")
    assert len(strangers.since(began)) == MOST_KEYS
    assert strangers.since(time.time() + 1) == []


def test_what_is_no_key_or_cannot_be_written_or_read_does_no_harm(tmp_path: Path) -> None:
    strangers = Strangers(tmp_path)
    strangers.turned_away(b"no key", "unknown")
    curve, none = bytes.fromhex("2b81040022"), bytes.fromhex("2b8104007f")
    der = base64.b64decode(b"".join(pem().splitlines()[1:-1])).replace(curve, none)
    strangers.turned_away(
        b"-----BEGIN PUBLIC KEY-----\n" + base64.encodebytes(der) + b"-----END PUBLIC KEY-----\n", "unknown"
    )
    assert strangers.since(0) == []
    strangers.path.write_bytes(b"{}\n\xff\n" + os.urandom(MOST_BYTES))
    assert strangers.since(0) == []
    strangers.turned_away(pem(), "connected")
    assert strangers.path.stat().st_size < 1000, "a file that grew too large is begun anew"
    assert [refusal.reason for refusal in strangers.since(0)] == ["connected"]
    Strangers(tmp_path / "missing").turned_away(pem(), "unknown")
