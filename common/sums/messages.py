"""What server and sites say to each other in a secure sum, round by round. Every field is validated on arrival.

Lives here: the records, their digests, and the signature over a site's keys. Does not live here: who does what with
them. Each round's request comes from the server:

0. `Terms` -> `Advert`: what is summed, by whom; a site's public keys, signed with its identity key
1. `Roster` -> `SealedShares`: all adverts; the site's seeds, shared out and sealed for each holder
2. `Delivery` -> `Delivered`: what the others sealed for this site, which also says whose masks it is to wear;
   then `RowsQuestion` -> `MaskedRows`, as often as it takes
3. `Unmask` -> `Opened`: whose rows arrived whole; one share of one seed of each site, never of both
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, Self, TypeVar

import numpy as np
from flwr.app import ConfigRecord, RecordDict
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, FailFast, Field, model_validator

from consilience.common.cards import MOST_CLASSES, SumNoiseCard
from consilience.common.errors import IdentityError, ProtocolError, SettingsError
from consilience.common.files import canonical_json, sha256
from consilience.common.identity import PrivateKey, key_fingerprint, key_line, read_key_line, sign, verify
from consilience.common.protocol import read_reply
from consilience.common.records import Digest, Record, SiteName
from consilience.common.settings import ClassName
from consilience.common.sums.masks import SEED_BYTES
from consilience.common.sums.noise import SharedNoise
from consilience.common.sums.ring import MOST_SITES, WORD, NoisyRing, Ring, Words
from consilience.common.sums.shares import SEALED_BYTES

TERMS, ROSTER, DELIVERY = "query.sum_terms", "query.sum_roster", "query.sum_delivery"
ROWS, UNMASK = "query.sum_rows", "query.sum_unmask"
SUM_QUESTIONS = (TERMS, ROSTER, DELIVERY, ROWS, UNMASK)
LEAST_SITES = 3

Key = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""An X25519 public key in hexadecimal."""
Share = Annotated[str, Field(pattern=rf"^[0-9a-f]{{{2 * SEED_BYTES}}}$")]
SealedShare = Annotated[str, Field(pattern=rf"^[0-9a-f]{{{2 * SEALED_BYTES}}}$")]
SeedKind = Literal["mask", "self"]
"""Which seed a share is of: of the key that agrees on masks with others, or of the site's own mask."""
Several = TypeVar("Several")
Many = Annotated[tuple[Several, ...], FailFast()]
"""Ends with its first mistake: a stranger's message could hold millions, and each is kept with what it is about."""
Sites = Annotated[Many[SiteName], Field(min_length=1, max_length=MOST_SITES)]


def default_threshold(sites: int) -> int:
    """Return how many sites must remain by default: two thirds of them, rounded up."""
    return -(-2 * sites // 3)


Signature = Annotated[str, Field(pattern=r"^[0-9a-f]{2,400}$")]


def _signed_by(line: str, signature: str, data: bytes) -> bool:
    """Whether the owner of the public key `line` signed `data`; `signature` in hexadecimal."""
    try:
        return verify(read_key_line(line), bytes.fromhex(signature), data)
    except (ValueError, IdentityError):
        return False


class Part(BaseModel):
    """Something inside a record."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Member(Part):
    """A site of the sum. `classes` are its class set in the label space, in the order of its answers."""

    site: SiteName
    classes: Many[Annotated[int, Field(ge=0, lt=MOST_CLASSES)]] = Field(min_length=1, max_length=MOST_CLASSES)
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    teacher: Digest
    policy: str = Field(pattern=r"^[0-9a-f]{16}$")
    identity: Digest
    """Fingerprint of the key that signs its advert."""
    noise: SumNoiseCard | None = None
    """What it says on its card of its noise."""

    @model_validator(mode="after")
    def _each_class_once(self) -> Member:
        if len(np.unique(self.classes)) != len(self.classes):
            raise ValueError("a class is named twice")
        return self


def _noise_of(members: Sequence[Member], labels: int) -> SharedNoise | None:
    noises = {member.site: member.noise for member in members if member.noise is not None}
    return SharedNoise({member.site: member.classes for member in members}, noises, labels) if noises else None


def ring_of(members: Sequence[Member], labels: int) -> Ring:
    """Return the numbers of a sum over so many labels. Raises `SettingsError` for weights and noise that do not fit."""
    weights, noise = [member.weight for member in members], _noise_of(members, labels)
    if noise is None:
        return Ring(weights)
    return NoisyRing(weights, [len(member.classes) for member in members], noise.bounds())


class Terms(Record):
    """What is summed, and by whom: pool samples start..stop-1. Its digest goes into every key."""

    job: SiteName
    contract: Digest
    pool: Digest
    start: int = Field(ge=0)
    stop: int = Field(ge=1, le=2**48)
    kind: Literal["log-probs"] = "log-probs"
    labels: Many[ClassName] = Field(min_length=1, max_length=MOST_CLASSES)
    """The label space, by name: each site sees for itself that its class set is that of its own classes."""
    synonyms: Many[Many[ClassName]] = Field(default=(), max_length=MOST_CLASSES)
    """Names of one class, that in `labels` first. The same for all sites."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """By which each site softens its answer before it is added."""
    attempt: int = Field(default=1, ge=1)
    """Another attempt has other keys."""
    threshold: int = Field(ge=2, le=MOST_SITES)
    """How many sites must remain for the sum to be unmasked, and how many shares give a seed back."""
    members: Many[Member] = Field(min_length=LEAST_SITES, max_length=MOST_SITES)
    """Sorted by name."""

    @model_validator(mode="after")
    def _fits(self) -> Terms:
        names = [member.site for member in self.members]
        if self.stop <= self.start:
            raise ValueError("stop must be greater than start")
        if names != sorted(set(names)):
            raise ValueError("members must be sorted by name, each once")
        if not len(names) / 2 < self.threshold <= len(names):
            raise ValueError("threshold must be more than half of the members")
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("a class is named twice")
        if not all(self.synonyms):
            raise ValueError("synonyms must be names of a class")
        if any(max(member.classes) >= len(self.labels) for member in self.members):
            raise ValueError("a member's class is not in the label space")
        try:
            self.ring()
        except SettingsError as error:
            raise ValueError(str(error)) from None
        return self

    def __len__(self) -> int:
        return self.stop - self.start

    def ring(self) -> Ring:
        """Return the fixed-point numbers of this sum, of a `NoisyRing` where some site adds noise."""
        return self.fixed_point

    @cached_property
    def fixed_point(self) -> Ring:
        """What `ring` returns."""
        return ring_of(self.members, len(self.labels))

    @cached_property
    def noise(self) -> SharedNoise | None:
        """Who adds how much noise; None where nobody does."""
        return _noise_of(self.members, len(self.labels))

    def owners(self) -> NDArray[np.int64]:
        """Return (L,) how many members know each class."""
        counts = np.zeros(len(self.labels), np.int64)
        for member in self.members:
            counts[list(member.classes)] += 1
        return counts

    @cached_property
    def digest(self) -> str:
        """What stands for these terms in every message, key and signature."""
        return sha256(canonical_json(self.model_dump(mode="json")))

    @cached_property
    def ground(self) -> str:
        """What stands for all of the terms that a number of the sum depends on: not who wants it, nor how often."""
        other = {"job", "contract", "start", "stop", "attempt", "labels", "synonyms"}
        return sha256(canonical_json(self.model_dump(mode="json", exclude=other)))

    @cached_property
    def by_name(self) -> dict[str, Member]:
        """The members by name."""
        return {member.site: member for member in self.members}


class Advert(Record):
    """A site's public keys for one sum, signed with its identity key, so that nobody on the way can change them."""

    terms: Digest
    site: SiteName
    mask_key: Key
    """With which it agrees on masks."""
    seal_key: Key
    """For which shares are sealed."""
    commitment: Digest
    """SHA-256 over the terms and the seed of its own mask."""
    public_key: Annotated[str, Field(max_length=1000, pattern=r"^ecdsa-sha2-nistp384 [A-Za-z0-9+/=]+$")]
    signature: Signature

    @classmethod
    def make(
        cls, identity: PrivateKey, terms: Terms, site: str, mask_key: str, seal_key: str, commitment: str
    ) -> Advert:
        """Fill in and sign an advert."""
        draft = cls(
            terms=terms.digest,
            site=site,
            mask_key=mask_key,
            seal_key=seal_key,
            commitment=commitment,
            public_key=key_line(identity.public_key()),
            signature="00",
        )
        return draft.model_copy(update={"signature": sign(identity, draft._signed()).hex()})

    def _signed(self) -> bytes:
        return b"consilience sum keys\n" + canonical_json(self.model_dump(mode="json", exclude={"signature"}))

    def check(self, terms: Terms) -> None:
        """Raise `ProtocolError` unless this is a member's advert for these terms, signed with the key they name."""
        member = terms.by_name.get(self.site)
        if self.terms != terms.digest or member is None:
            raise ProtocolError("An advert is for another sum, or from a site that is no member of it")
        if not _signed_by(self.public_key, self.signature, self._signed()):
            raise ProtocolError(f"The advert of site {self.site} does not carry its signature")
        if key_fingerprint(read_key_line(self.public_key)) != member.identity:
            raise ProtocolError(f"The advert of site {self.site} is signed with another key than its own")


def commit(seed: bytes, terms: str, site: str) -> str:
    """Return what an advert says of the seed of the site's own mask: enough to recognise it, not to find it."""
    return sha256(b"consilience sum seed\n" + canonical_json([terms, site, seed.hex()]))


class Roster(Record):
    """The adverts of all sites that sent one, sorted by name. A share's place is its holder's place here."""

    terms: Digest
    adverts: Many[Advert] = Field(min_length=LEAST_SITES, max_length=MOST_SITES)

    @cached_property
    def digest(self) -> str:
        """What stands for the roster in seals."""
        return sha256(canonical_json(self.model_dump(mode="json")))

    @cached_property
    def by_name(self) -> dict[str, Advert]:
        """The adverts by site."""
        return {advert.site: advert for advert in self.adverts}

    @cached_property
    def places(self) -> dict[str, int]:
        """Each site's place among the holders of shares."""
        return {advert.site: place for place, advert in enumerate(self.adverts)}

    def check(self, terms: Terms) -> None:
        """Raise `ProtocolError` unless these are adverts for `terms`, enough of them, each site's once, all signed."""
        names = [advert.site for advert in self.adverts]
        if self.terms != terms.digest or names != sorted(set(names)):
            raise ProtocolError("A roster is for another sum, or does not name each site once")
        if len(names) < max(terms.threshold, LEAST_SITES):
            raise ProtocolError(f"A roster has {len(names)} sites; needed: {max(terms.threshold, LEAST_SITES)}")
        for advert in self.adverts:
            advert.check(terms)
        if len({advert.mask_key for advert in self.adverts} | {a.seal_key for a in self.adverts}) < 2 * len(names):
            raise ProtocolError("A roster holds a public key twice")


class Sealed(Part):
    """Two sealed shares, of both seeds of `sender`, for `holder`."""

    sender: SiteName
    holder: SiteName
    data: SealedShare


class SealedShares(Record):
    """What a site sealed for each other site of the roster."""

    roster: Digest
    site: SiteName
    shares: Many[Sealed] = Field(max_length=MOST_SITES)

    def check(self, roster: Roster, site: str) -> None:
        """Raise `ProtocolError` unless this is what `site` sealed for everybody else of `roster`."""
        due = [(site, other) for other in roster.places if other != site]
        if self.roster != roster.digest or self.site != site or [(s.sender, s.holder) for s in self.shares] != due:
            raise ProtocolError(f"What site {site} sealed is not one share for each other site of the roster")


class Delivery(Record):
    """What the other sites sealed for one: it is to wear the masks that it shares with these sites."""

    terms: Digest
    roster: Digest
    site: SiteName
    shares: Many[Sealed] = Field(max_length=MOST_SITES)


class Delivered(Record):
    """The site holds the shares of these sites, its own among them: it says so to the others, in its own hand.

    Whoever opens shares must know that all survivors wear the masks of the same sites.
    """

    terms: Digest
    roster: Digest
    site: SiteName
    holds: Sites
    signature: Signature

    @classmethod
    def make(cls, identity: PrivateKey, roster: Roster, site: str, holds: tuple[str, ...]) -> Delivered:
        """Fill in and sign."""
        draft = cls(terms=roster.terms, roster=roster.digest, site=site, holds=holds, signature="00")
        return draft.model_copy(update={"signature": sign(identity, draft._signed()).hex()})

    def _signed(self) -> bytes:
        return b"consilience sum shares\n" + canonical_json(self.model_dump(mode="json", exclude={"signature"}))

    def check(self, roster: Roster) -> None:
        """Raise `ProtocolError` unless a site of this roster, of digest `self.roster`, signed it."""
        advert = roster.by_name.get(self.site)
        if advert is None or (self.terms, self.roster) != (roster.terms, roster.digest):
            raise ProtocolError("Word of delivered shares is of another sum, or of a site that is not in its roster")
        if not _signed_by(advert.public_key, self.signature, self._signed()):
            raise ProtocolError(f"Site {self.site} has not signed that it holds the shares of these sites")


class RowsQuestion(Record):
    """The server asks for masked rows of pool samples start..stop-1."""

    terms: Digest
    start: int = Field(ge=0)
    stop: int = Field(ge=1)

    @model_validator(mode="after")
    def _range(self) -> RowsQuestion:
        if self.stop <= self.start:
            raise ValueError("stop must be greater than start")
        return self

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class MaskedRows:
    """A site's masked rows, one 32-bit word for each sample and class of its own: uniform, whatever it answered."""

    question: RowsQuestion
    data: bytes

    def to_content(self) -> RecordDict:
        """Return the message content."""
        return RecordDict({"record": ConfigRecord({"json": self.question.model_dump_json(), "data": self.data})})

    @classmethod
    def from_content(cls, content: RecordDict, expected: RowsQuestion) -> Self:
        """Read the reply to `expected`. Raises `ProtocolError` when it is a refusal or anything else."""
        if read_reply(content, RowsQuestion) != expected:
            raise ProtocolError("Masked rows are not those that were asked for")
        record: Any = content["record"]
        data = record.get("data")
        if len(content) != 1 or not isinstance(data, bytes):
            raise ProtocolError("A message carries no masked rows")
        return cls(expected, data)

    def rows(self, width: int) -> Words:
        """Return (n, width) uint32, read-only. Raises `ProtocolError` when the length is another."""
        expected = len(self.question) * width * WORD.itemsize
        if len(self.data) != expected:
            raise ProtocolError(
                f"Masked rows have {len(self.data):,} bytes; allowed: {expected:,} for {len(self.question)} rows of "
                f"{width} classes"
            )
        return np.frombuffer(self.data, WORD).astype(np.uint32, copy=False).reshape(-1, width)


class Unmask(Record):
    """Whose rows arrived whole. All other sites of the delivery count as lost, and their rows are not used."""

    terms: Digest
    survivors: Sites
    signatures: Many[Signature] = Field(max_length=MOST_SITES)
    """Of their `Delivered`, in the order of `survivors`."""

    @model_validator(mode="after")
    def _one_each(self) -> Unmask:
        if len(self.signatures) != len(self.survivors):
            raise ValueError("signatures must be one a survivor")
        return self


class OpenedShare(Part):
    """One share of one seed of site `of`."""

    of: SiteName
    kind: SeedKind
    share: Share


class Opened(Record):
    """A site's shares: of a survivor's own mask, or of a lost site's mask key. Never of both."""

    terms: Digest
    site: SiteName
    shares: Many[OpenedShare] = Field(max_length=MOST_SITES)
