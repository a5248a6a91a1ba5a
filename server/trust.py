"""Whom a run believes, and what sites may seal their answers for: both follow from the server's folder.

Lives here: a site's card against its admission, and the job's key with its secret half. Does not live here: admission
itself (server/admission), the authority (server/authority), what sites sign (common/vouching).
"""

from __future__ import annotations

from datetime import UTC, datetime

from consilience.common.cards import SiteCard
from consilience.common.errors import ProtocolError
from consilience.common.identity import key_fingerprint, read_key_line
from consilience.common.job_key import LIFE, JobKey
from consilience.common.sealing import Secret
from consilience.common.vouching import KnownSigner
from consilience.server.admission import Register
from consilience.server.authority import make_job_key
from consilience.server.settings import Home


class Unsealing:
    """A job's keys and their secret halves, which are nowhere but in memory: a run that is begun again makes others."""

    def __init__(self, home: Home, job: str) -> None:
        """Make a key that the authority of `home` signs. Raises `IdentityError`, `StorageError`."""
        self._home, self._job = home, job
        self._secrets: dict[JobKey, Secret] = {}  # the oldest first
        self._key = self._make(datetime.now(UTC))

    def key(self, now: datetime | None = None) -> JobKey:
        """Return the key for what is asked from now on: another one when half of the last one's life is over.

        Raises `IdentityError`, `StorageError`.
        """
        now = now or datetime.now(UTC)
        if not LIFE / 2 <= self._key.left(now) <= LIFE:  # more than all of it: the clock was put back
            self._key = self._make(now)
        return self._key

    def secret_of(self, key: JobKey) -> Secret:
        """Return the secret half of a key that `key` gave. It is kept while the process lives: answers may be slow."""
        return self._secrets[key]

    def _make(self, now: datetime) -> JobKey:
        secret = Secret()
        key = make_job_key(self._home, self._job, secret.public, now)
        self._secrets[key] = secret
        return key


def need_admitted(card: SiteCard, home: Home | None) -> None:
    """Raise `ProtocolError` when a card names another key than its site was admitted with; None admits all.

    Whoever carries messages could else put a key of its own into the card, and sign what it likes.
    """
    if home is None:
        return
    line = Register(home).key_of(card.name)
    if line is None or card.public_key is None or card.identity != key_fingerprint(read_key_line(line)):
        raise ProtocolError("its card does not name the key that it was admitted with")


def signer_of(card: SiteCard) -> KnownSigner | None:
    """Return with what a site signs; None where its card names no key. Raises `IdentityError`."""
    return None if card.public_key is None else KnownSigner(read_key_line(card.public_key), card.name, card.classes)
