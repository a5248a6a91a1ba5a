"""Sealed answers: encrypted at the site for the coordinator alone, so that whoever carries them sees ciphertext.

HPKE (RFC 9180) as PyCryptodome has it: mode base, DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, ChaCha20-Poly1305. The
`info` of each answer is its question and its site, so that it opens as the answer to nothing else. Who sealed it is
told by the signature inside (common/vouching). Does not live here: whose key it is (common/job_key).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from Crypto.Protocol import HPKE
from Crypto.Protocol.DH import import_x25519_public_key
from Crypto.PublicKey import ECC

from consilience.common.errors import ProtocolError
from consilience.common.files import canonical_json
from consilience.common.protocol import Answer, Question

KEY_BYTES = 32
"""An X25519 public key: what a sealed text begins with."""
SEAL_BYTES = KEY_BYTES + 16
"""What sealing adds: the sender's key of the moment, and the tag."""
_SUITE = HPKE.AEAD.CHACHA20_POLY1305
_LENGTH_BYTES = 2


class Secret:
    """The private half of a job's key. It is made here, and leaves neither this object nor the process's memory."""

    def __init__(self) -> None:
        self._key = ECC.generate(curve="Curve25519")

    @property
    def public(self) -> str:
        """The public half in hexadecimal."""
        return bytes(self._key.public_key().export_key(format="raw")).hex()

    def unseal(self, info: bytes, sealed: bytes) -> bytes:
        """Return what `seal` sealed for this key under the same `info`. Raises `ProtocolError` for anything else."""
        try:
            box = HPKE.new(receiver_key=self._key, aead_id=_SUITE, enc=sealed[:KEY_BYTES], info=info)
            rest: Any = memoryview(sealed)[KEY_BYTES:]  # of bytes, every part would be a copy
            return bytes(box.unseal(rest))
        except ValueError:
            raise ProtocolError("An answer is not sealed for this question, this site and the job's key") from None


def seal(key: str, info: bytes, plain: bytes) -> bytes:
    """Encrypt for the owner of the public key (hex), anew each time. Raises `ProtocolError` when it is no key."""
    try:
        box = HPKE.new(receiver_key=import_x25519_public_key(bytes.fromhex(key)), aead_id=_SUITE, info=info)
    except ValueError:
        raise ProtocolError("The job's key is no X25519 key") from None
    return bytes(box.enc + box.seal(plain))


def seal_answer(answer: Answer, site: str) -> Answer:
    """Return the answer with rows and signature sealed for its question's job key; both are hidden, as together they
    would let guesses be tried. Raises `ProtocolError`."""
    key = answer.question.job_key
    assert key is not None
    plain = len(answer.vouch).to_bytes(_LENGTH_BYTES, "big") + answer.vouch + answer.data
    return replace(answer, data=seal(key.key, info_of(answer.question, site), plain), vouch=b"")


def unseal_answer(answer: Answer, site: str, secret: Secret) -> Answer:
    """Return what `site` sealed. Raises `ProtocolError` when it is no sealed answer of this site to its question."""
    plain = secret.unseal(info_of(answer.question, site), answer.data)
    start = _LENGTH_BYTES + int.from_bytes(plain[:_LENGTH_BYTES], "big")
    if answer.vouch or not _LENGTH_BYTES <= start <= len(plain):
        raise ProtocolError("A sealed answer does not hold a signature and rows")
    return replace(answer, data=plain[start:], vouch=plain[_LENGTH_BYTES:start])


def info_of(question: Question, site: str) -> bytes:
    """What a sealed answer is bound to: job, its key, pool, range, kind, encoding, teacher, policy, and the site."""
    return b"consilience sealed answer\n" + canonical_json([site, question.model_dump(mode="json")])
