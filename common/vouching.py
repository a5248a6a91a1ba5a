"""What a site signs of each answer, so that anyone can check later which site vouched for what.

A site signs job, pool, range, kind, encoding, teacher, policy version, its name, its class names in the order of its
answers, and a digest of the answer's bytes. The digest is salted: signatures are published, and short answers, votes
about a few samples, could else be guessed from them. Does not live here: keys and fingerprints (common/identity), where
signatures are kept (server/answers) and published (server/signatures).
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from consilience.common.errors import ProtocolError
from consilience.common.files import canonical_json, sha256
from consilience.common.identity import PrivateKey, PublicKey, sign, verify
from consilience.common.protocol import Question

SALT_BYTES = 16


def salted(salt: bytes, data_sha256: str) -> str:
    """Return the digest that stands for an answer's bytes, of which `data_sha256` is the SHA-256."""
    return hashlib.sha256(b"consilience answer bytes\n" + salt + bytes.fromhex(data_sha256)).hexdigest()


@dataclass(frozen=True)
class Signer:
    """A site that signs its answers. `classes` are its class names in the order of its answers."""

    key: PrivateKey
    site: str
    classes: Sequence[str]

    def vouch(self, question: Question, data: bytes) -> bytes:
        """Return what goes with the answer `data`: a salt and the signature."""
        salt = secrets.token_bytes(SALT_BYTES)
        return salt + sign(self.key, _signed(self.site, self.classes, question, salted(salt, sha256(data))))


@dataclass(frozen=True)
class KnownSigner:
    """A site whose signatures can be checked."""

    key: PublicKey
    site: str
    classes: Sequence[str]

    def check(self, question: Question, digest: str, signature: bytes) -> None:
        """Raise `ProtocolError` unless the site signed that its answer to `question` has this (salted) digest."""
        if not verify(self.key, signature, _signed(self.site, self.classes, question, digest)):
            raise ProtocolError("An answer does not carry its site's signature")


def _signed(site: str, classes: Sequence[str], question: Question, digest: str) -> bytes:
    about = question.model_dump(mode="json", exclude={"protocol", "job_key"})
    return b"consilience answer\n" + canonical_json({**about, "site": site, "classes": list(classes), "digest": digest})
