"""The key that a job's answers are sealed for, and the authority's word that it is the coordinator's.

Lives here: the record that travels in contracts and questions, and its signature. Does not live here: encryption
(common/sealing), the authority's own key (server/authority).

A site believes the authority in its kit alone, which it got and compared by another way than the connection. So
whoever carries messages, a SuperLink above all, cannot put a key of its own in the place of the coordinator's.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import BaseModel, ConfigDict, Field

from consilience.common.errors import IdentityError, ProtocolError
from consilience.common.files import canonical_json
from consilience.common.identity import read_certificate
from consilience.common.settings import NAME_PATTERN

LIFE = timedelta(days=2)
"""How long a job's key is good for. A run makes another one before half of that is over: no site sees its end."""
CLOCK_SKEW = timedelta(hours=1)
"""How far a site's clock may differ from the server's: certificates too begin that much in the past."""


class JobKey(BaseModel):
    """A job's public key. A run makes another one each time it is begun or resumed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    job: Annotated[str, Field(pattern=NAME_PATTERN)]
    key: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """An X25519 public key in hexadecimal."""
    not_after: Annotated[int, Field(ge=0, le=2**40)]
    """When it ends, in seconds since 1970."""
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{2,400}$")]
    """The authority's, over all the rest."""

    @staticmethod
    def signed(job: str, key: str, not_after: int) -> bytes:
        """Return what the authority signs. No certificate begins like this, so neither passes for the other."""
        return b"consilience job key\n" + canonical_json({"job": job, "key": key, "not_after": not_after})

    def left(self, now: datetime) -> timedelta:
        """Return how long the key is still good for; less than nothing after its end."""
        return timedelta(seconds=self.not_after - now.timestamp())

    def check(self, job: str, authority: str, now: datetime | None = None) -> None:
        """Raise `ProtocolError` unless this is a key for `job`, `authority` (its certificate, PEM) signed it, and it
        has not ended by this machine's clock."""
        if self.job != job:
            raise ProtocolError("The job's key is that of another job")
        try:
            key = read_certificate(authority).public_key()
            if not isinstance(key, ec.EllipticCurvePublicKey):
                raise ProtocolError("The authority in the kit has a key of another kind than EC")
            signed = self.signed(self.job, self.key, self.not_after)
            key.verify(bytes.fromhex(self.signature), signed, ec.ECDSA(hashes.SHA256()))
        except (InvalidSignature, ValueError, IdentityError):
            raise ProtocolError("The job's key is not signed by the authority in the kit") from None
        if self.left(now or datetime.now(UTC)) < -CLOCK_SKEW:
            raise ProtocolError("The job's key has ended by this machine's clock")
