"""Sealed answers: HPKE as RFC 9180 has it, and nothing but the one answer to the one question opens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from Crypto.Protocol.DH import import_x25519_private_key
from Crypto.PublicKey import ECC
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from hypothesis import given
from hypothesis import strategies as st

from consilience.common.errors import ProtocolError
from consilience.common.files import canonical_json
from consilience.common.job_key import JobKey
from consilience.common.protocol import Answer, Question
from consilience.common.sealing import SEAL_BYTES, Secret, seal, seal_answer, unseal_answer

SECRET = Secret()
VOUCH = b"v" * 110


def question(**changes: Any) -> Question:
    key = JobKey(job="clothes", key=SECRET.public, not_after=1, signature="00")
    fields = {"job": "clothes", "pool": "a" * 64, "start": 3, "stop": 9, "kind": "coverage", "encoding": "u8"}
    return Question(**{**fields, "teacher": "b" * 64, "policy": "c" * 16, "job_key": key, **changes})  # type: ignore[arg-type]


def answer(data: bytes = b"rows", vouch: bytes = VOUCH) -> Answer:
    return Answer(question(), data, 0.5, vouch)


def rfc_9180(monkeypatch: pytest.MonkeyPatch, private: str) -> None:
    """Let the next key that is made be this one."""
    key = import_x25519_private_key(bytes.fromhex(private))
    monkeypatch.setattr(ECC, "generate", lambda **_: key)


def test_sealing_gives_what_the_rfc_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """A.2.1: mode base. Its ciphertexts have additional data, ours none, which changes the tag alone."""
    info, plain = b"Ode on a Grecian Urn", b"Beauty is truth, truth beauty"
    key = bytes.fromhex("ad2744de8e17f4ebba575b3f5f5a8fa1f69c2a07f6e7500bc60ca6e3e3ec1c91")
    nonce = bytes.fromhex("5c4d98150661b848853b547f")
    told = bytes.fromhex("1c5250d8034ec2b784ba2cfd69dbdb8af406cfe3ff938e131f0def8c8b60b4db21993c62ce81883d2dd1b51a28")
    assert ChaCha20Poly1305(key).encrypt(nonce, plain, b"Count-0") == told
    rfc_9180(monkeypatch, "8057991eef8f1f1af18f4a9491d16a1ce333f695d4db8e38da75975c4478e0fb")
    secret = Secret()
    assert secret.public == "4310ee97d88cc1f088a5576c77ab0cf5c3ac797f3d95139c6c84b5429c59662a"
    rfc_9180(monkeypatch, "f4ec9b33b792c372c1d2c2063507b684ef925b8c75a42dbcbf57d63ccd381600")
    sealed = seal(secret.public, info, plain)
    assert sealed[:32].hex() == "1afa08d3dec047a643885163f1180476fa7ddb54c6a8029ea33f95796bf2ac4a"
    assert sealed[32:] == ChaCha20Poly1305(key).encrypt(nonce, plain, None)
    assert sealed[32:-16] == told[:-16]
    assert secret.unseal(info, sealed) == plain


@given(st.binary(max_size=200), st.binary(max_size=200))
def test_what_is_sealed_opens_as_it_was(data: bytes, vouch: bytes) -> None:
    sealed = seal_answer(answer(data, vouch), "site-1")
    assert sealed.vouch == b""
    assert len(sealed.data) == SEAL_BYTES + 2 + len(vouch) + len(data)
    assert unseal_answer(sealed, "site-1", SECRET) == answer(data, vouch)


def test_the_same_answer_is_never_sealed_alike() -> None:
    assert seal_answer(answer(), "site-1").data != seal_answer(answer(), "site-1").data


@pytest.mark.parametrize(
    "other",
    [
        {"job": "shoes"},
        {"pool": "d" * 64},
        {"start": 2},
        {"stop": 10},
        {"encoding": "f16"},
        {"kind": "log-probs"},
        {"teacher": "e" * 64},
        {"policy": "f" * 16},
        {"job_key": JobKey(job="clothes", key=SECRET.public, not_after=1, signature="01")},
    ],
)
def test_a_sealed_answer_is_the_answer_to_no_other_question(other: dict[str, Any]) -> None:
    sealed = seal_answer(answer(), "site-1")
    assert unseal_answer(sealed, "site-1", SECRET).data == b"rows"
    with pytest.raises(ProtocolError, match="not sealed for this question"):
        unseal_answer(replace(sealed, question=question(**other)), "site-1", SECRET)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"",
        lambda data: data[:31],
        lambda data: data[:40],
        lambda data: bytes(32) + data[32:],
        lambda data: bytes([data[0] ^ 1]) + data[1:],
        lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:],
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        lambda data: data[:-1],
        lambda data: data + b"\0",
    ],
)
def test_changed_ciphertext_does_not_open(change: Callable[[bytes], bytes]) -> None:
    sealed = seal_answer(answer(), "site-1")
    with pytest.raises(ProtocolError):
        unseal_answer(replace(sealed, data=change(sealed.data)), "site-1", SECRET)


def test_it_opens_for_its_site_and_its_key_alone() -> None:
    sealed = seal_answer(answer(), "site-1")
    with pytest.raises(ProtocolError):
        unseal_answer(sealed, "site-2", SECRET)
    with pytest.raises(ProtocolError):
        unseal_answer(sealed, "site-1", Secret())
    with pytest.raises(ProtocolError, match="does not hold"):
        unseal_answer(replace(sealed, vouch=VOUCH), "site-1", SECRET)


@pytest.mark.parametrize("plain", [b"", b"\0", b"\0\5abcd"])
def test_what_was_sealed_must_be_signature_and_rows(plain: bytes) -> None:
    """Anybody can seal anything for a public key."""
    sealed = replace(answer(), vouch=b"", data=seal_answer(answer(), "site-1").data)
    info = b"consilience sealed answer\n" + canonical_json(["site-1", question().model_dump(mode="json")])
    forged = replace(sealed, data=seal(SECRET.public, info, plain))
    with pytest.raises(ProtocolError, match="does not hold"):
        unseal_answer(forged, "site-1", SECRET)


@pytest.mark.parametrize("key", [bytes(32).hex(), (1).to_bytes(32, "little").hex()])
def test_a_key_that_would_hide_nothing_is_refused(key: str) -> None:
    with pytest.raises(ProtocolError, match="no X25519 key"):
        seal(key, b"", b"plain")
