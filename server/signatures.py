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

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from consilience.common.errors import ConsilienceError, IdentityError, ProtocolError, StorageError, StudentError
from consilience.common.files import read_json, write_json
from consilience.common.identity import key_fingerprint, read_key_line
from consilience.common.protocol import MOST_CLASSES, Digest, Kind, Question, SiteCard, SiteName
from consilience.common.settings import ClassName, Encoding
from consilience.common.vouching import KnownSigner
from consilience.server.answers import AnswerStore, digests_in
from consilience.server.stores import store_folder

FILE = "signatures.json"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Signed(_Part):
    """One answer that a site vouched for: samples start..stop-1."""

    start: int = Field(ge=0)
    stop: int = Field(ge=1)
    digest: Digest
    """Salted, so that nobody can guess the answer from it."""
    signature: Annotated[str, Field(pattern=r"^([0-9a-f]{2})+$", max_length=400)]


class SignedAnswers(_Part):
    """A site's answers of one kind about one pool; of `answers` samples there are some, signed or not."""

    pool: Digest
    size: int = Field(ge=0)
    kind: Kind
    encoding: Encoding
    teacher: Digest
    policy: str = Field(pattern=r"^[0-9a-f]{16}$")
    answers: int = Field(ge=0)
    signed: tuple[Signed, ...]


class SignedSite(_Part):
    """One site: its class names in the order of its answers, and its key where it signs."""

    site: SiteName
    classes: tuple[ClassName, ...] = Field(min_length=1, max_length=MOST_CLASSES)
    public_key: Annotated[str, Field(max_length=1000)] | None
    answers: tuple[SignedAnswers, ...]


class Signatures(_Part):
    """The file."""

    consilience_signatures: Literal[1] = 1
    job: SiteName
    sites: tuple[SignedSite, ...]

    @classmethod
    def collect(cls, job: str, cards: Sequence[SiteCard], stores: Mapping[str, Sequence[AnswerStore]]) -> Signatures:
        """Return what the sites signed of the answers in these stores."""
        return cls(
            job=job,
            sites=tuple(
                SignedSite(
                    site=card.name,
                    classes=card.classes,
                    public_key=card.public_key,
                    answers=tuple(_answers(store) for store in stores[card.name] if len(store)),
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
            return cls.model_validate(read_json(path))
        except (ValidationError, StorageError) as error:
            raise StudentError(
                f"{path} is not as it must be, or damaged", hint="Get it anew from whoever published the student"
            ) from error


@dataclass(frozen=True)
class Verdict:
    """What became of the signatures of one site. Numbers count samples, those of coverage too."""

    site: str
    key: str | None
    """Fingerprint of the key that signed; None for a site without one."""
    vouched: int
    """Answered samples with a good signature."""
    unsigned: int
    """Answered samples without a signature."""
    compared: int
    """Vouched samples whose answers are at hand, and are the ones that were signed."""
    problems: tuple[str, ...]


def check_signatures(signatures: Signatures, answers: Path | None = None) -> list[Verdict]:
    """Check every signature; with the folder RUN/answers, also that the answers there are those that were signed."""
    return [_check_site(signatures.job, site, answers) for site in signatures.sites]


def complaint(verdicts: Sequence[Verdict]) -> ConsilienceError | None:
    """Return what is wrong with the signatures of a student, the worst first; None when every answer is vouched for."""
    wrong = [f"site {found.site}: {problem}" for found in verdicts for problem in found.problems]
    if wrong:
        return IdentityError(
            f"{len(wrong):,} of what the sites are said to have signed is wrong; {wrong[0]}",
            hint="Get the file anew from whoever published the student; if it stays so, ask that site",
        )
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


def _check_site(job: str, site: SignedSite, folder: Path | None) -> Verdict:
    problems: list[str] = []
    vouched = compared = 0
    signer, total = None, sum(part.answers for part in site.answers)
    try:
        if site.public_key is not None:
            signer = KnownSigner(read_key_line(site.public_key), site.site, site.classes)
    except IdentityError as error:
        problems.append(error.message)
    for part in site.answers if signer is not None else ():
        assert signer is not None
        held = _held(part, site.site, folder, problems)
        at = 0
        for signed in sorted(part.signed, key=lambda each: each.start):
            where = f"{part.kind} of samples {signed.start} to {signed.stop} of pool {part.pool[:12]}"
            if not at <= signed.start < signed.stop <= part.size:
                problems.append(f"{where}: they are signed twice, or do not exist")
                continue
            at = signed.stop
            try:
                signer.check(_question(job, part, signed), signed.digest, bytes.fromhex(signed.signature))
            except (ProtocolError, ValidationError):
                problems.append(f"{where}: the signature is not the site's")
                continue
            vouched += signed.stop - signed.start
            if held is None:
                continue
            if held.get((signed.start, signed.stop)) == signed.digest:
                compared += signed.stop - signed.start
            else:
                problems.append(f"{where}: the answer here is not the one that was signed")
    claimed = sum(signed.stop - signed.start for part in site.answers for signed in part.signed)
    return Verdict(
        site=site.site,
        key=None if signer is None else key_fingerprint(signer.key),
        vouched=vouched,
        unsigned=max(0, total - claimed),
        compared=compared,
        problems=tuple(problems),
    )


def _held(
    part: SignedAnswers, site: str, folder: Path | None, problems: list[str]
) -> Mapping[tuple[int, int], str] | None:
    """Return the digests of the answers at hand by range; None where there are none."""
    place = None if folder is None else store_folder(folder, site, part.pool, part.kind)
    if place is None or not place.exists():
        return None
    try:
        return digests_in(place)
    except StorageError as error:
        problems.append(error.message)
        return {}


def _question(job: str, part: SignedAnswers, signed: Signed) -> Question:
    return Question(
        job=job,
        pool=part.pool,
        start=signed.start,
        stop=signed.stop,
        kind=part.kind,
        encoding=part.encoding,
        teacher=part.teacher,
        policy=part.policy,
    )


def _answers(store: AnswerStore) -> SignedAnswers:
    about = store.about
    return SignedAnswers(
        pool=about.pool,
        size=about.size,
        kind=about.kind,
        encoding=about.encoding,
        teacher=about.teacher,
        policy=about.policy,
        answers=len(store),
        signed=tuple(_signed(store)),
    )


def _signed(store: AnswerStore) -> Iterator[Signed]:
    for shard in store.shards():
        yield Signed(start=shard.start, stop=shard.stop, digest=shard.digest, signature=shard.signature)
