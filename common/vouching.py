"""What a site signs of each answer, so that anyone can check later which site vouched for what.

A site signs job, pool, range and what part of it, kind, encoding, teacher, policy version, its name, its class names in
the order of its answers, and a digest of the answer's bytes. The digest is salted: signatures are published, and short
answers, votes about a few samples, could else be guessed from them. Of principal components, whose digest its card
tells, it signs job, teacher, its name, and each tap's name, fingerprint and digest; nobody publishes that. Does not
live here: keys and fingerprints (common/identity), where signatures are kept (server/answers) and published
(server/signatures).
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from consilience.common.errors import ProtocolError
from consilience.common.files import canonical_json, sha256
from consilience.common.identity import PrivateKey, PublicKey, sign, verify
from consilience.common.protocol import Contract, Question

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

    def vouch_components(self, contract: Contract, claims: Sequence[tuple[str, str, str]]) -> bytes:
        """Return the signature of components that go with an agreement: name, fingerprint and digest of each tap."""
        return sign(self.key, _claimed(self.site, contract, claims))


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

    def check_components(self, contract: Contract, claims: Sequence[tuple[str, str, str]], signature: bytes) -> None:
        """Raise `ProtocolError` unless the site signed that its taps have these components."""
        if not verify(self.key, signature, _claimed(self.site, contract, claims)):
            raise ProtocolError("Its principal components do not carry its signature")


def _signed(site: str, classes: Sequence[str], question: Question, digest: str) -> bytes:
    about = question.model_dump(mode="json", exclude={"protocol", "job_key"})
    if question.subset is None:  # signatures of whole ranges are those of before there were parts
        del about["subset"]
    return b"consilience answer\n" + canonical_json({**about, "site": site, "classes": list(classes), "digest": digest})


def _claimed(site: str, contract: Contract, claims: Sequence[tuple[str, str, str]]) -> bytes:
    about = {"site": site, "job": contract.job, "teacher": contract.teacher, "taps": [list(claim) for claim in claims]}
    return b"consilience components\n" + canonical_json(about)
