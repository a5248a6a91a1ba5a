"""What a row of the ledger tells, and the hash that binds it to the row before.

Does not live here: keeping rows (client/ledger).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from consilience.common.cards import TailCard, TapCard
from consilience.common.files import canonical_json, sha256
from consilience.common.tails import TailQuestion

EntryKind = Literal["answer", "card", "features", "tail", "sum", "mechanism", "approval", "carried"]
SumState = Literal["given", "opened"]
"""Masked rows of a secure sum left; shares of other sites' seeds left."""
UNKNOWN = "unknown"
"""State, and subject, of the row that tells that it is not known what was summed with a teacher."""


class Asked(NamedTuple):
    """What a question asks for, whichever samples it names: what an approval is of."""

    use: str
    """`sums`, or nothing where single answers leave."""
    pool: str
    kind: str
    encoding: str
    teacher: str
    """Fingerprint of what answers."""


@dataclass(frozen=True)
class Approval:
    """What a person let a job ask for."""

    asked: Mapping[Asked, int]
    """What it asks for -> samples newly released for it, those before the approval included."""
    sealed: bool = False
    """Whether answers leave sealed alone."""
    tail: tuple[int, int, int] = (0, 0, 0)
    """Of questions about the teacher's last blocks, those before the approval included: how many, samples, bytes."""


@dataclass(frozen=True)
class Entry:
    """What a row tells: of an answer, of principal components of features, of a tail that was asked or lent, of a
    secure sum, of a card that told of private data, of a mechanism that added noise, of a person's approval, or of what
    was carried over.

    `subject`: of an answer the name of the released bytes' file; of components `components_subject`; of a tail its
    fingerprint, of one that was lent `blocks_subject`; of a sum its terms' digest; of a mechanism its name; of an
    approval the policy version; of a card the digest of what it told. `body`: the particulars, JSON values; `behind`
    the mechanisms behind which it left.
    """

    kind: EntryKind
    job: str
    subject: str
    samples: int = 0
    """Samples newly released."""
    body: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """An entry in its place: numbered from 1, its time never before the last row's."""

    seq: int
    time: str
    entry: Entry
    body: str
    """The entry's body as it is stored."""
    chain: str
    """SHA-256 over this row and the chain of the one before."""

    @property
    def month(self) -> str:
        """The month in which it counts, as YYYY-MM."""
        return self.time[:7]


@dataclass
class Spent:
    """Samples newly released so far, and by what mechanisms."""

    jobs: Counter[str] = field(default_factory=Counter)
    months: Counter[str] = field(default_factory=Counter)
    lifetime: int = 0
    features: Counter[str] = field(default_factory=Counter)
    """Bytes of features by job, principal components among them; of those carried over, where the job was known."""
    asked: Counter[tuple[str, Asked]] = field(default_factory=Counter)
    """Samples newly released by job and what was asked for."""
    components: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Bytes of principal components alone, by job and tap."""
    tails: Counter[tuple[str, str]] = field(default_factory=Counter)
    """`rounds`, `samples` and `bytes` of questions about the tail, by job and which of these; of those carried over the
    samples."""
    sums: dict[str, tuple[SumState, str]] = field(default_factory=dict)
    """How far each secure sum is, by its terms' digest, and with which teacher."""
    unsummable: set[str] = field(default_factory=set)
    """Fingerprints of teachers of which it is not known what was summed with them; "" for that of the next sum."""
    mechanisms: Counter[tuple[str, str, str, str]] = field(default_factory=Counter)
    """Uses by job, month, name and parameters, these as JSON; `none` for what left behind no mechanism."""


def mechanism(job: str, name: str, parameters: Mapping[str, Any], count: int) -> Entry:
    """Return the entry of `count` uses of a mechanism: with its parameters any accountant can sum up the loss."""
    return Entry("mechanism", job, name, body={"parameters": dict(parameters), "count": count})


def components_subject(digest: str) -> str:
    """Return the subject of the row of principal components whose bytes have this SHA-256."""
    return f"components-{digest}"


def behind(costs: Sequence[Entry]) -> dict[str, Any]:
    """Return the part of a row's body that names the mechanisms behind which something left; empty without any."""
    return {"behind": [cost.subject for cost in costs]} if costs else {}


def components(job: str, policy: str, tap: TapCard, costs: Sequence[Entry]) -> Entry:
    """Return the entry of a tap's principal components that left, under a policy version; of a tap that has some.

    `costs` tells of the mechanisms behind which they left.
    """
    held = tap.components
    assert held is not None
    body = {"tap": tap.name, "teacher": tap.fingerprint, "policy": policy, "sha256": held.digest, "bytes": held.bytes}
    return Entry("features", job, components_subject(held.digest), body=body | behind(costs))


def summed(job: str, terms: str, state: SumState, teacher: str) -> Entry:
    """Return the entry of a secure sum: that its rows, or shares of its seeds, leave now."""
    return Entry("sum", job, terms, body={"state": state, "teacher": teacher})


def unsummable(teacher: str) -> Entry:
    """Return the entry that tells that it is not known what was summed with a teacher; "": with whichever is next."""
    return Entry("sum", "", UNKNOWN, body={"state": UNKNOWN, "teacher": teacher})


def card_told(job: str, teacher: str, policy: str, told: Mapping[str, Any]) -> Entry:
    """Return the entry of a site card that tells figures of private data, by name, under a policy version."""
    subject = f"card-{sha256(canonical_json([teacher, dict(told)]))}"
    return Entry("card", job, subject, body={"told": sorted(told), "teacher": teacher, "policy": policy})


def blocks_subject(digest: str) -> str:
    """Return the subject of the row of lent blocks whose bytes have this SHA-256."""
    return f"blocks-{digest}"


def blocks_lent(job: str, policy: str, tail: TailCard) -> Entry:
    """Return the entry of the blocks of a tail that left, under a policy version."""
    body = {"teacher": tail.fingerprint, "policy": policy, "first": tail.first, "bytes": tail.bytes}
    return Entry("tail", job, blocks_subject(tail.digest), body={"what": "blocks", **body})


def tail_asked(question: TailQuestion) -> Entry:
    """Return the entry of a question about features."""
    what = "gradient" if question.gradient else "outputs"
    body = {"policy": question.policy, "block": question.block, "samples": question.samples, "bytes": question.bytes}
    return Entry("tail", question.job, question.tail, body={"what": what, **body})


def approval(job: str, policy: str, given: Approval | None) -> Entry:
    """Return the entry of a person's approval of a job under a policy version; None withdraws it."""
    body: dict[str, Any] = {"given": given is not None}
    if given is not None:
        body["asked"] = [{**part._asdict(), "samples": count} for part, count in sorted(given.asked.items())]
        body |= {"sealed": given.sealed, "tail": list(given.tail)}
    return Entry("approval", job, policy, body=body)


def approved_by(entry: Entry) -> Approval | None:
    """Return what an approval is of; None when it withdraws one, and for one that does not say all, as there once were.

    Raises `KeyError`, `TypeError` and `AttributeError` for a body that `approval` does not make.
    """
    body = entry.body
    if not body["given"] or "tail" not in body:
        return None
    asked = {Asked(**{name: part[name] for name in Asked._fields}): part["samples"] for part in body["asked"]}
    counts = [*asked.values(), *body["tail"]]
    if len(body["tail"]) != 3 or not all(isinstance(count, int) and count >= 0 for count in counts):
        raise TypeError("an approval is of whole numbers of samples")
    rounds, samples, size = body["tail"]
    return Approval(asked, bool(body["sealed"]), (rounds, samples, size))


def chain_of(before: str, seq: int, when: str, entry: Entry, body: str) -> str:
    """Return the hash that binds a row to the one before. `body` is the entry's, as it is stored."""
    row = [before, seq, when, entry.kind, entry.job, entry.samples, entry.subject, body]
    return sha256(canonical_json(row))
