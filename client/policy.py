"""What may leave: a site's decisions, for each question and for each job, and what remains of its limits.

Lives here: yes or no, with the constant reason that a stranger is told. Does not live here: the fields
(common/settings.Policy), what is taken from an answer (client/shaping), the record (client/ledger).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from consilience.client.ledger import Ledger
from consilience.client.ledger_rows import Asked
from consilience.common.cards import TapCard
from consilience.common.errors import IdentityError, ProtocolError, StorageError
from consilience.common.identity import Kit, words
from consilience.common.job_key import JobKey
from consilience.common.protocol import Kind, Question, RefusalCode
from consilience.common.settings import Policy, SiteSettings, allowed_by
from consilience.common.sums.messages import Terms


class RefusedError(ProtocolError):
    """The site will not or cannot answer: `code` and the constant `reason` are all that a stranger is told.

    `detail`: the particulars, for the site's own eyes.
    """

    def __init__(self, code: RefusalCode, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.code: RefusalCode = code
        self.reason = reason
        self.detail = detail

    @property
    def told_here(self) -> str:
        """What the site itself is told."""
        return f"{self.reason} ({self.__cause__ or self.detail or 'by its rules'})"


@dataclass(frozen=True)
class Limit:
    """One of the policy's limits: what counts towards it, how much that may be (None: no limit) and is."""

    name: str
    most: int | None
    spent: int

    @property
    def left(self) -> int | None:
        """Samples, or bytes, that may still be released, never below 0; None where there is no limit."""
        return None if self.most is None else max(0, self.most - self.spent)


@dataclass(frozen=True)
class Subset:
    """A part of a pool that a job asks about: the samples of `mask` (n,), and `more` others, not chosen yet."""

    mask: NDArray[np.bool_]
    more: int = 0

    @property
    def count(self) -> int:
        """How many samples they are."""
        return min(int(self.mask.sum()) + self.more, len(self.mask))

    def new(self, missing: NDArray[np.bool_]) -> int:
        """Return how many of them are newly released at most, where the samples `missing` (n,) were not yet."""
        return int((missing & self.mask).sum()) + min(self.more, int((missing & ~self.mask).sum()))


@dataclass(frozen=True)
class Demand:
    """All that a job would ask of a site: `questions`, each about a pool, and principal components.

    `use`: what the answers leave for, as in `Asked`.
    """

    job: str
    questions: tuple[Question, ...]
    use: str = ""
    widths: tuple[int, ...] = ()
    """Bytes a sample of each question's answers."""
    components: tuple[TapCard, ...] = ()
    """Taps whose principal components are to come with the agreement."""
    tail: Asked | None = None
    """What of the teacher's last blocks is asked for; None: nothing."""
    subsets: Mapping[str, Subset] = field(default_factory=dict)
    """Pool -> which of its samples are asked about, of pools that are not asked about as a whole."""

    @property
    def samples(self) -> tuple[int, ...]:
        """How many samples each question asks about."""
        return tuple(
            len(question) if (subset := self.subsets.get(question.pool)) is None else subset.count
            for question in self.questions
        )

    def feature_bytes(self, samples: Sequence[int] | None = None, components: Sequence[TapCard] = ()) -> int:
        """Return the bytes of features, of so many `samples` of each question and the `components` of so many taps, or
        of all that is asked for.

        A job takes features of one pool: of several that it may be, those of which there are most.
        """
        counts = self.samples if samples is None else samples
        pools: Counter[str] = Counter()
        for question, width, count in zip(self.questions, self.widths, counts, strict=True):
            pools[question.pool] += width * count if question.kind == "features" else 0
        return max(pools.values(), default=0) + component_bytes(self.components if samples is None else components)

    def counted(self, samples: Sequence[int]) -> dict[Asked, int]:
        """Return what is asked for, each with so many samples: `samples` of each question, and none of other things."""
        found = dict.fromkeys(self.asked, 0)
        for question, count in zip(self.questions, samples, strict=True):
            found[asked_by(question, self.use)] += count
        return found

    @property
    def asked(self) -> frozenset[Asked]:
        """What an approval of the job is of."""
        answers = frozenset(asked_by(question, self.use) for question in self.questions)
        blocks = frozenset() if self.tail is None else frozenset({self.tail})
        return answers | blocks | {Asked("", "", "components", "f32", tap.fingerprint) for tap in self.components}


def component_bytes(taps: Iterable[TapCard]) -> int:
    """Return the bytes of the principal components of taps; of none where channels leave as they are."""
    return sum(tap.components.bytes for tap in taps if tap.components is not None)


def asked_by(question: Question, use: str = "") -> Asked:
    """Return what a question asks for, whichever samples it names."""
    return Asked(use, question.pool, question.kind, question.encoding, question.teacher)


def limits(policy: Policy, ledger: Ledger, job: str) -> tuple[Limit, ...]:
    """Return the limits as they stand for a job."""
    held, spent, month = policy.limits, ledger.spent, ledger.now[:7]
    return (
        Limit(f"job {job}", held.per_job, spent.jobs[job]),
        Limit(f"month {month}", held.per_month, spent.months[month]),
        Limit("lifetime", held.lifetime, spent.lifetime),
    )


def byte_limits(policy: Policy, ledger: Ledger, job: str) -> tuple[Limit, ...]:
    """Return the limits on bytes of features as they stand for a job; none where no features leave."""
    if not policy.features.taps:
        return ()
    spent = ledger.spent.features
    return (
        Limit(f"features of job {job}", policy.features.bytes, spent[job]),
        Limit("features, lifetime", policy.features.bytes_lifetime, spent.total()),
    )


def check_pool(policy: Policy, pool: str) -> None:
    """Refuse a pool that the policy does not list, where it lists any. Raises `RefusedError`."""
    if policy.pools and pool not in policy.pools:
        listed = ", ".join(digest[:12] for digest in policy.pools)
        raise RefusedError(
            "pool-not-allowed", "the site's policy does not allow this pool", f"{pool[:12]}; policy.pools: {listed}"
        )


def check_encoding(policy: Policy, kind: Kind, encoding: str) -> None:
    """Refuse an encoding that is finer than the policy allows. Raises `RefusedError`."""
    if kind == "coverage":
        allowed, most = encoding in policy.coverage_encodings, f"policy.coverage is {policy.coverage}"
    elif kind == "features":
        allowed = encoding in policy.features.encodings
        most = f"policy.features.precision is {policy.features.precision}"
    else:
        allowed, most = allowed_by(policy.encodings, encoding), f"policy.precision is {policy.precision}"
    if not allowed:
        detail = f"{kind} as {encoding}; {most}"
        raise RefusedError("encoding-not-allowed", "the site's policy does not allow this encoding", detail)


def check_peers(settings: SiteSettings, terms: Terms) -> None:
    """Refuse a secure sum with a site, or under a site's key, that is not among the peers, where any are given.

    Raises `RefusedError`.
    """
    for member in terms.members if settings.peers else ():
        if member.site != settings.name and settings.peers.get(member.site) != words(member.identity):
            raise RefusedError(
                "unknown-peer",
                "the secure sum names a site or a key that this site does not know",
                f"site {member.site} with the words {words(member.identity)}; peers: {', '.join(settings.peers)}",
            )


def check_open(policy: Policy) -> None:
    """Refuse to answer openly where the policy lets sums out alone. Raises `RefusedError`."""
    if policy.sums_only:
        raise RefusedError("sums-only", "the site answers in secure sums only", "policy.sums_only is true")


def check_sealed(policy: Policy, *, sealed: bool) -> None:
    """Refuse to answer unsealed where the policy lets sealed answers out alone. Raises `RefusedError`."""
    if policy.sealed_only and not sealed:
        raise RefusedError(
            "sealed-only", "the site answers only jobs that have answers sealed", "policy.sealed_only is true"
        )


def check_job_key(settings: SiteSettings, job: str, key: JobKey | None) -> None:
    """Refuse a job's key that the authority in the site's kit did not sign for this job, and to do without one where
    the policy needs one. Raises `RefusedError`."""
    check_sealed(settings.policy, sealed=key is not None)
    if key is None:
        return
    try:
        key.check(job, Kit.read(settings.kit).ca)
    except (ProtocolError, IdentityError, StorageError) as error:
        raise RefusedError(
            "job-key", "the authority in the site's kit does not vouch for the job's key", f"job {job}"
        ) from error


def check_job(
    policy: Policy, ledger: Ledger, job: str, asked: Iterable[Asked] = (), *, sealed: bool | None = None
) -> None:
    """Refuse a job after the policy's end, or what it asks for when that needs an approval and has none.

    `sealed`: whether it has answers sealed, where that is known. Raises `RefusedError`.
    """
    if policy.ends is not None and ledger.now[:10] > policy.ends.isoformat():
        raise RefusedError("policy-ended", "the site's policy has ended", f"policy.ends is {policy.ends}")
    if not policy.approval:
        return
    approved = ledger.approved(job, policy.version)
    if approved is None:
        raise RefusedError("not-approved", "nobody at the site has approved this job yet", f"job {job}")

    def where(part: Asked) -> str:
        return f"pool {part.pool[:12]}" if part.pool else "the teacher"

    other = sorted(set(asked) - approved.asked.keys())
    told = [f"{part.use} {part.kind} as {part.encoding} of {where(part)}".strip() for part in other]
    told += ["unsealed answers"] if approved.sealed and sealed is False else []
    if told:
        raise RefusedError("not-approved", _OTHER_THAN_APPROVED, f"job {job}: {'; '.join(told)}; {_APPROVE_AGAIN}")


def check_approved(policy: Policy, ledger: Ledger, job: str, asked: Mapping[Asked, int]) -> None:
    """Refuse to release so many samples more for what is asked for than a person approved. Raises `RefusedError`."""
    approved = ledger.approved(job, policy.version) if policy.approval else None
    if approved is None:  # or there is none: `check_job`
        return
    for part, more in asked.items():
        most, left = approved.asked.get(part, 0), ledger.spent.asked[job, part]
        if more and left + more > most:
            what = (
                f"{part.kind} as {part.encoding}: {more:,} samples more, {left:,} of {most:,} approved ones have left"
            )
            raise RefusedError("not-approved", _OTHER_THAN_APPROVED, f"job {job}: {what}; {_APPROVE_AGAIN}")


def check_tail_approved(policy: Policy, ledger: Ledger, job: str, more: Sequence[int]) -> None:
    """Refuse `more` questions about the tail, samples and bytes than a person approved. Raises `RefusedError`."""
    approved = ledger.approved(job, policy.version) if policy.approval else None
    if approved is None:
        return
    for name, most, count in zip(("rounds", "samples", "bytes"), approved.tail, more, strict=True):
        if count and (left := ledger.spent.tails[job, name]) + count > most:
            what = f"tail {name}: {count:,} more, {left:,} of {most:,} approved ones were asked"
            raise RefusedError("not-approved", _OTHER_THAN_APPROVED, f"job {job}: {what}; {_APPROVE_AGAIN}")


def check_demand(policy: Policy, ledger: Ledger, demand: Demand, *, sealed: bool) -> None:
    """Refuse a job for anything that it would ask for, however few samples are left. Raises `RefusedError`."""
    check_job(policy, ledger, demand.job, demand.asked, sealed=None if demand.use else sealed)
    if not demand.use:
        check_open(policy)
    for question in demand.questions:
        check_encoding(policy, question.kind, question.encoding)
        check_pool(policy, question.pool)
    check_asked_bytes(policy, demand)


def check_budget(policy: Policy, ledger: Ledger, job: str, samples: int) -> None:
    """Refuse to release so many samples more than were, where a limit does not allow it. Raises `RefusedError`."""
    for limit in limits(policy, ledger, job):
        if limit.left is not None and samples > limit.left:
            detail = f"{limit.name}: {samples:,} more, {limit.left:,} left of {limit.most:,}"
            raise RefusedError("budget-exhausted", "the site's limits do not allow so many samples more", detail)


def check_asked_bytes(policy: Policy, demand: Demand) -> None:
    """Refuse a job that asks for more bytes of features than it may, whoever got them before. Raises `RefusedError`."""
    features = demand.feature_bytes()
    if features > policy.features.bytes:
        raise RefusedError(
            "too-many-bytes",
            _TOO_MANY_BYTES,
            f"job {demand.job}: {features:,}; policy.features.bytes is {policy.features.bytes:,}; let taps leave "
            "smaller or with fewer channels, ask for fewer, or raise it",
        )


def check_bytes(policy: Policy, ledger: Ledger, job: str, features: int) -> None:
    """Refuse to release so many bytes of features more than were, where a limit does not allow it.

    Raises `RefusedError`.
    """
    for limit in byte_limits(policy, ledger, job):
        if limit.left is not None and features > limit.left:
            detail = f"{limit.name}: {features:,} bytes more, {limit.left:,} left of {limit.most:,}"
            raise RefusedError("too-many-bytes", _TOO_MANY_BYTES, f"{detail}; policy.features says how many may leave")


_TOO_MANY_BYTES = (
    "the job asks for more bytes of features than the site's policy allows: set ask.features to u8, take fewer taps, "
    "or a smaller pool; or have that site let them leave smaller, or raise policy.features.bytes and bytes_lifetime"
)
_APPROVE_AGAIN = "if that is right, let a person approve the job again: `consilience site approve`"
_OTHER_THAN_APPROVED = "the job asks for something else than was approved at the site"
