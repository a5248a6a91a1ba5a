"""What a site signs: any change to what an answer is about, whose it is or what it says shows."""

from __future__ import annotations

from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from consilience.common.errors import ProtocolError
from consilience.common.files import sha256
from consilience.common.job_key import JobKey
from consilience.common.protocol import Question
from consilience.common.vouching import SALT_BYTES, KnownSigner, Signer, salted

KEY = ec.generate_private_key(ec.SECP384R1())
CLASSES = ("cat", "dog")
DATA = b"the rows of an answer"


def question(**changes: Any) -> Question:
    fields = {"job": "clothes", "pool": "a" * 64, "start": 3, "stop": 9, "kind": "coverage", "encoding": "u8"}
    return Question(**{**fields, "teacher": "b" * 64, "policy": "c" * 16, **changes})  # type: ignore[arg-type]


def signed() -> tuple[str, bytes]:
    """Return salted digest and signature of a site's answer."""
    vouch = Signer(KEY, "site-1", CLASSES).vouch(question(), DATA)
    return salted(vouch[:SALT_BYTES], sha256(DATA)), vouch[SALT_BYTES:]


def known(**changes: Any) -> KnownSigner:
    return KnownSigner(**{"key": KEY.public_key(), "site": "site-1", "classes": CLASSES, **changes})  # type: ignore[arg-type]


def test_a_good_signature_is_good_whether_the_answer_was_sealed_or_not() -> None:
    digest, signature = signed()
    known().check(question(), digest, signature)
    known().check(question(job_key=JobKey(job="clothes", key="0" * 64, not_after=1, signature="00")), digest, signature)


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
    ],
)
def test_a_signature_is_for_one_question(other: dict[str, Any]) -> None:
    digest, signature = signed()
    with pytest.raises(ProtocolError, match=r"^An answer does not carry its site's signature$"):
        known().check(question(**other), digest, signature)


@pytest.mark.parametrize(
    "other",
    [
        {"site": "site-2"},
        {"classes": ("dog", "cat")},
        {"classes": ("cat", "dog", "cow")},
        {"key": ec.generate_private_key(ec.SECP384R1()).public_key()},
    ],
)
def test_a_signature_is_of_one_site_and_its_classes(other: dict[str, Any]) -> None:
    digest, signature = signed()
    with pytest.raises(ProtocolError, match="its site's signature"):
        known(**other).check(question(), digest, signature)


def test_a_signature_is_over_the_bytes() -> None:
    vouch = Signer(KEY, "site-1", CLASSES).vouch(question(), DATA)
    for salt, data in ((vouch[:SALT_BYTES], DATA + b"x"), (bytes(SALT_BYTES), DATA)):
        with pytest.raises(ProtocolError):
            known().check(question(), salted(salt, sha256(data)), vouch[SALT_BYTES:])
    for damaged in (b"", vouch[SALT_BYTES:-1], b"\0" * 100):
        with pytest.raises(ProtocolError):
            known().check(question(), salted(vouch[:SALT_BYTES], sha256(DATA)), damaged)


def test_nobody_can_try_guesses_against_what_is_published() -> None:
    assert signed()[0] != signed()[0]
    assert sha256(DATA) not in {digest for digest, _ in (signed(), signed())}
