"""student/signatures.json: what each site signed of its answers, published with the student, and the check of it.

Lives here: the file and what follows from it alone, and from the answers where they are at hand. Does not live here:
what a site signs (common/vouching), where signatures are kept until then (server/answers). The file may come from
anybody: every field is checked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, model_validator

from consilience.common.bounded import bounded
from consilience.common.cards import MOST_CLASSES, SiteCard
from consilience.common.errors import ConsilienceError, IdentityError, ProtocolError, StorageError, StudentError
from consilience.common.files import read_bytes, storage_error, write_json
from consilience.common.identity import key_fingerprint, read_key_line
from consilience.common.pool import Pool
from consilience.common.protocol import MOST_SPAN, Kind, Question
from consilience.common.records import Digest, SiteName
from consilience.common.settings import MOST_ROUNDS, ClassName, Encoding
from consilience.common.subsets import subset_mask, text_length
from consilience.common.vouching import KnownSigner
from consilience.server.answer_files import Range, digests_in
from consilience.server.answers import AnswerStore
from consilience.server.stores import store_folder

FILE = "signatures.json"
MOST_BYTES = 256 * 2**20
"""Anybody may have made the file: a longer one is not read. An answer takes about 400 bytes of it."""
MOST_SAMPLES = 2**40
"""No pool has more; numbers above are refused before they are added up or shown."""

Count = Annotated[int, Field(ge=0, le=MOST_SAMPLES)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Signed(_Part):
    """One answer that a site vouched for: samples start..stop-1, or some of them."""

    start: Count
    stop: Count
    subset: Annotated[str, Field(max_length=text_length(MOST_SPAN))] | None = None
    """Which of these samples, as `protocol.Question` says; None: all."""
    digest: Digest
    """Salted, so that nobody can guess the answer from it."""
    signature: Annotated[str, Field(pattern=r"^([0-9a-f]{2})+$", max_length=400)]


class SignedAnswers(_Part):
    """A site's answers of one kind about one pool of `size` samples; of `answers` of them there are some, signed or
    not."""

    pool: Digest
    size: Count
    kind: Kind
    encoding: Encoding
    teacher: Digest
    policy: str = Field(pattern=r"^[0-9a-f]{16}$")
    answers: Count
    signed: Annotated[tuple[Signed, ...], FailFast()]


class SignedSite(_Part):
    """One site: its class names in the order of its answers, and its key where it signs."""

    site: SiteName
    classes: tuple[ClassName, ...] = Field(min_length=1, max_length=MOST_CLASSES)
    public_key: Annotated[str, Field(max_length=1000)] | None
    answers: Annotated[tuple[SignedAnswers, ...], FailFast()]

    @model_validator(mode="after")
    def _no_part_twice(self) -> SignedSite:
        if len({_place(self.site, part) for part in self.answers}) < len(self.answers):
            raise ValueError("answers of one kind about one pool are listed twice")
        return self


class Signatures(_Part):
    """The file."""

    consilience_signatures: Literal[1] = 1
    job: SiteName
    sites: Annotated[tuple[SignedSite, ...], FailFast()]

    @model_validator(mode="after")
    def _no_site_twice(self) -> Signatures:
        if len({site.site for site in self.sites}) < len(self.sites):
            raise ValueError("a site is listed twice")
        return self

    @classmethod
    def collect(
        cls, job: str, cards: Sequence[SiteCard], stores: Mapping[str, Sequence[AnswerStore]], pools: Sequence[Pool]
    ) -> Signatures:
        """Return what the sites signed of the answers in these stores, which are about `pools`."""
        sizes = {pool.digest: pool.manifest.size for pool in pools}
        return cls(
            job=job,
            sites=tuple(
                SignedSite(
                    site=card.name,
                    classes=card.classes,
                    public_key=card.public_key,
                    answers=tuple(
                        _answers(store, sizes[store.about.pool]) for store in stores[card.name] if len(store)
                    ),
                )
                for card in cards
            ),
        )

    def write(self, student: Path) -> None:
        """Write the file into a student's folder. Raises `StorageError`."""
        write_json(student / FILE, self.model_dump(mode="json"))

    @classmethod
    def read(cls, student: Path) -> Signatures:
        """Read the file of a student's folder. Raises `StudentError` when there is none or it is not one."""
        path = student / FILE
        if not path.exists():
            raise StudentError(
                f"{path} does not exist: nobody vouched for the answers that this student learnt from",
                hint="Name a student's folder with --student; students made before sites signed have no such file",
            )
        try:
            data = read_bytes(path, MOST_BYTES)
            bounded(data.decode("latin-1"), _FIELDS)  # as many characters as bytes
            return cls.model_validate_json(data)
        except (ValidationError, ProtocolError, StorageError) as error:
            raise StudentError(
                f"{path} is not as it must be, or damaged", hint="Get it anew from whoever published the student"
            ) from error


_FIELDS = frozenset(name for part in (Signed, SignedAnswers, SignedSite, Signatures) for name in part.model_fields)


@dataclass(frozen=True)
class Verdict:
    """What became of the signatures of one site. Numbers count samples, those of coverage too."""

    site: str
    key: str | None
    """Fingerprint of the key that signed; None for a site without one."""
    vouched: int
    """Answered samples with a good signature."""
    unsigned: int
    """Answered samples without a signature that was checked."""
    compared: int
    """Vouched samples whose answers are at hand, and are the ones that were signed."""
    problems: tuple[str, ...]
    damage: StorageError | None = None
    """Why the answers at hand could not be compared, or not all of them."""


def check_signatures(signatures: Signatures, answers: Path | None = None) -> list[Verdict]:
    """Check every signature; with the folder RUN/answers, also that the answers there are those that were signed.

    Answers there that the file does not claim count as unsigned; a site that it does not name has a verdict of its own.
    Raises `StorageError` when the folder cannot be listed.
    """
    verdicts = [_check_site(signatures.job, site, answers) for site in signatures.sites]
    if answers is not None:
        known = {site.site for site in signatures.sites}
        strangers = [_stranger(place) for place in _folders(answers) if place.name not in known]
        verdicts += [found for found in strangers if found.unsigned or found.damage is not None]
    return verdicts


def complaint(verdicts: Sequence[Verdict]) -> ConsilienceError | None:
    """Return what is wrong with the signatures of a student, the worst first; None when every answer is vouched for."""
    wrong = [f"site {found.site}: {problem}" for found in verdicts for problem in found.problems]
    if wrong:
        return IdentityError(
            f"{len(wrong):,} of what the sites are said to have signed is wrong; {wrong[0]}",
            hint="Get the file anew from whoever published the student; if it stays so, ask that site",
        )
    for found in verdicts:
        if found.damage is not None:
            return found.damage
    if not any(found.vouched for found in verdicts):
        return StudentError(
            "No site vouched for an answer that this student learnt from",
            hint="Sums over sites are not signed, nor are answers in runs that began before sites signed",
        )
    unsigned = {found.site: found.unsigned for found in verdicts if found.unsigned}
    if unsigned:
        return IdentityError(
            f"Nobody vouches for {sum(unsigned.values()):,} answers, of: {', '.join(unsigned)}",
            hint="Take these as the coordinator's word; a new run has every answer signed",
        )
    return None


class _Held:
    """What lies in a site's folder of RUN/answers; nothing where there is no such folder."""

    def __init__(self, place: Path | None) -> None:
        self.stores: dict[str, Mapping[Range, tuple[int, str | None]]] = {}
        self.damage: StorageError | None = None
        for store in () if place is None or not place.exists() else _folders(place):
            try:
                self.stores[store.name] = digests_in(store)
            except StorageError as error:
                self.damage = self.damage or error


def _check_site(job: str, site: SignedSite, folder: Path | None) -> Verdict:
    problems: list[str] = []
    signer = None
    try:
        if site.public_key is not None:
            signer = KnownSigner(read_key_line(site.public_key), site.site, site.classes)
    except IdentityError as error:
        problems.append(error.message)
    held = _Held(None if folder is None else folder / site.site)
    vouched = compared = unsigned = 0
    for part in site.answers:
        good, bad = _check_part(job, part, signer, problems)
        here = held.stores.pop(_place(site.site, part).name, {})
        for asked in sorted(good.keys() & here.keys()):
            if here[asked] == good[asked]:
                compared += good[asked][0]
            else:
                problems.append(f"{_where(part, asked)}: the answer here is not the one that was signed")
        vouched += _samples(good)
        claimed = part.answers - _samples(good) - sum(bad.values())
        unclaimed = {asked: held for asked, held in here.items() if asked not in good and asked not in bad}
        unsigned += max(0, claimed, _samples(unclaimed))
    return Verdict(
        site=site.site,
        key=None if signer is None else key_fingerprint(signer.key),
        vouched=vouched,
        unsigned=unsigned + sum(map(_samples, held.stores.values())),  # the stores left: no part claims them
        compared=compared,
        problems=tuple(problems),
        damage=held.damage,
    )


def _check_part(
    job: str, part: SignedAnswers, signer: KnownSigner | None, problems: list[str]
) -> tuple[dict[Range, tuple[int, str | None]], dict[Range, int]]:
    """Return how many samples, and the digest, of each answer with a good signature; and the samples of wrong ones."""
    good: dict[Range, tuple[int, str | None]] = {}
    bad: dict[Range, int] = {}
    if signer is None:
        if part.signed:
            problems.append(f"{part.kind} of pool {part.pool[:12]}: they are signed, and there is no key to check with")
        return good, bad
    open_ones: list[Range] = []  # those that reach beyond the start of the next: of other rounds of a job
    for signed in sorted(part.signed, key=lambda each: each.start):
        asked, samples = Range(signed.start, signed.stop, signed.subset), signed.stop - signed.start
        where = _where(part, asked)
        open_ones = [other for other in open_ones if other.stop > asked.start]
        if (
            not asked.start < asked.stop <= part.size
            or len(open_ones) >= MOST_ROUNDS
            or any(_overlap(asked, other) for other in open_ones)
        ):
            problems.append(f"{where}: they are signed twice, or do not exist")
            continue
        open_ones.append(asked)
        try:
            question = _question(job, part, signed)
            samples = len(question)
            signer.check(question, signed.digest, bytes.fromhex(signed.signature))
        except (ProtocolError, ValidationError):
            problems.append(f"{where}: the signature is not the site's")
            bad[asked] = samples
        else:
            good[asked] = samples, signed.digest
    return good, bad


def _overlap(one: Range, other: Range) -> bool:
    """Whether two ranges have a sample in common; one whose subset cannot be read has all of its range."""
    start, stop = max(one.start, other.start), min(one.stop, other.stop)
    if start >= stop:
        return False
    if one.subset is None and other.subset is None:
        return True
    return bool((_within(one, start, stop) & _within(other, start, stop)).any())


def _within(asked: Range, start: int, stop: int) -> NDArray[np.bool_]:
    """Return which of the samples start..stop-1 of its range, at most `MOST_SPAN`, it has."""
    try:
        if asked.subset is not None and asked.stop - asked.start <= MOST_SPAN:
            return subset_mask(asked.subset, asked.stop - asked.start)[start - asked.start : stop - asked.start]
    except ValueError:
        pass
    return np.ones(min(stop - start, MOST_SPAN), np.bool_)


def _stranger(place: Path) -> Verdict:
    """Return the verdict on answers of a site that the file does not name."""
    held = _Held(place)
    return Verdict(
        site=place.name if place.name.isprintable() else ascii(place.name),
        key=None,
        vouched=0,
        unsigned=sum(map(_samples, held.stores.values())),
        compared=0,
        problems=(f"answers of it lie in the run's folder, and {FILE} does not name it",),
        damage=held.damage,
    )


def _folders(place: Path) -> list[Path]:
    try:
        return sorted(path for path in place.iterdir() if path.is_dir())
    except OSError as error:
        raise storage_error(error, place, "read") from error


def _samples(held: Mapping[Range, tuple[int, str | None]]) -> int:
    return sum(samples for samples, _ in held.values())


def _place(site: str, part: SignedAnswers) -> Path:
    """Return where, in the folder RUN/answers, the part's answers lie."""
    return store_folder(Path(), site, part.pool, part.kind, part.teacher)


def _where(part: SignedAnswers, asked: Range) -> str:
    return f"{part.kind} of samples {asked.start} to {asked.stop} of pool {part.pool[:12]}"


def _question(job: str, part: SignedAnswers, signed: Signed) -> Question:
    return Question(
        job=job,
        pool=part.pool,
        start=signed.start,
        stop=signed.stop,
        subset=signed.subset,
        kind=part.kind,
        encoding=part.encoding,
        teacher=part.teacher,
        policy=part.policy,
    )


def _answers(store: AnswerStore, size: int) -> SignedAnswers:
    about = store.about
    return SignedAnswers(
        pool=about.pool,
        size=size,
        kind=about.kind,
        encoding=about.encoding,
        teacher=about.teacher,
        policy=about.policy,
        answers=len(store),
        signed=tuple(_signed(store)),
    )


def _signed(store: AnswerStore) -> Iterator[Signed]:
    for shard in store.shards():
        asked = shard.range
        yield Signed(
            start=asked.start,
            stop=asked.stop,
            subset=asked.subset,
            digest=shard.digest,
            signature=shard.signature,
        )
