"""Whom a run believes, and what sites may seal their answers for: both follow from the server's folder.

Lives here: a site's card against its admission, and the job's key with its secret half. Does not live here: admission
itself (server/admission), the authority (server/authority), what sites sign (common/vouching).
"""

from __future__ import annotations

from dataclasses import dataclass

from consilience.common.errors import ProtocolError
from consilience.common.identity import key_fingerprint, read_key_line
from consilience.common.job_key import JobKey
from consilience.common.protocol import SiteCard
from consilience.common.sealing import Secret
from consilience.common.vouching import KnownSigner
from consilience.server.admission import Register
from consilience.server.authority import make_job_key
from consilience.server.settings import Home


@dataclass(frozen=True)
class Unsealing:
    """A job's key and its secret half, which is nowhere but in memory: a run that is begun again makes another."""

    key: JobKey
    secret: Secret

    @classmethod
    def make(cls, home: Home, job: str) -> Unsealing:
        """Make a key that the authority of `home` signs. Raises `IdentityError`, `StorageError`."""
        secret = Secret()
        return cls(make_job_key(home, job, secret.public), secret)


def need_admitted(card: SiteCard, home: Home | None) -> None:
    """Raise `ProtocolError` when a card names another key than its site was admitted with; None admits all.

    Whoever carries messages could else put a key of its own into the card, and sign what it likes.
    """
    if home is None:
        return
    line = Register(home).keys().get(card.name)
    if line is None or card.public_key is None or card.identity != key_fingerprint(read_key_line(line)):
        raise ProtocolError("its card does not name the key that it was admitted with")


def signer_of(card: SiteCard) -> KnownSigner | None:
    """Return with what a site signs; None where its card names no key. Raises `IdentityError`."""
    return None if card.public_key is None else KnownSigner(read_key_line(card.public_key), card.name, card.classes)
