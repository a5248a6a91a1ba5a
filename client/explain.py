"""What a job would take from a site, and what of its limits would be left: in words, before anything leaves.

Does not live here: the decisions (client/policy), how it is shown (client/policy_cli).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from consilience.client.components import not_released
from consilience.client.features import OpenTap, tell_shape
from consilience.client.policy import (
    Demand,
    Limit,
    RefusedError,
    Subset,
    byte_limits,
    check_demand,
    check_sealed,
    limits,
)
from consilience.client.privacy import Spent, account, describe_privacy
from consilience.client.privacy.spending import loss_limits, loss_of
from consilience.client.site import Site
from consilience.client.tails import still, tail_limits
from consilience.common.cards import TapCard
from consilience.common.errors import LabelError, PoolError, SettingsError, StorageError, StudentError
from consilience.common.pool import Pool
from consilience.common.protocol import Kind, TailDemand
from consilience.common.samples_asked import drawn, samples_asked
from consilience.common.settings import (
    EVERY_LAYER,
    Encoding,
    JobSettings,
    NoPrivacy,
    Policy,
    SiteSettings,
    Tail,
    largest_sent,
)
from consilience.common.taps_asked import components_asked, taps_asked


@dataclass(frozen=True)
class Part:
    """One kind of answers about one pool that a job would take. `new` of the `samples` were not released before."""

    pool: str
    kind: Kind
    encoding: Encoding
    samples: int
    new: int
    of: int
    """Samples of the pool."""
    tap: str = ""
    """Of features, the tap's name."""
    bytes_a_sample: int = 0
    shape: tuple[int, ...] = ()
    """Of one sample's features."""
    summed: bool = False
    """The server learns sums over sites of these answers (docs/secure_sums.md)."""
    owners: int = 1
    """Of sums: how many sites know each class that is summed, at least; of a class that this site alone knows the sum
    is its answer."""

    @property
    def words(self) -> str:
        """The part as a person reads it."""
        most = largest_sent(self.encoding)
        if self.kind == "coverage":
            what = "coverage, one number a sample"
        elif self.kind == "features":
            total = f"{self.bytes_a_sample:,} bytes a sample, {self.bytes_a_sample * self.samples:,} in all"
            what = f"features of tap {self.tap}, {tell_shape(self.shape)}, {total}"
        elif self.kind == "log-odds":
            what = "log-odds of every label"
            if self.encoding == "votes":
                what = "which labels are likelier than not"
            elif most is not None:
                what = f"log-odds of the {most:,} likeliest labels, and how likely all others are on average"
        elif self.encoding == "votes":
            what = "the likeliest class"
        elif most is not None:
            what = f"log-probabilities of the {most:,} likeliest classes, and of all others together"
        else:
            what = "log-probabilities of every class"
        if self.summed:
            alone = (
                "no single answer" if self.owners > 1 else "no single answer but on classes that no other site knows"
            )
            what = f"sums over sites of {what}, {alone}"
        known = "" if self.new == self.samples else f", {self.samples - self.new:,} of them released before"
        count = f"{self.samples:,}" if self.samples == self.of else f"{self.samples:,} of the {self.of:,}"
        return f"{what}, as {self.encoding}, of {count} samples of pool {self.pool[:12]}{known}"


@dataclass(frozen=True)
class Explanation:
    """What a job would take. `refusal`: why the site would not give it; empty when it would."""

    demand: Demand
    parts: tuple[Part, ...]
    here: bool
    """Whether the pools are those that the job names; else they are all that the site holds."""
    refusal: str
    left: dict[str, tuple[int | None, int | None]]
    """Limit -> samples left before and after the job; None: no limit."""
    unfit: str = ""
    """Why the job's features, or its questions about blocks, could not be asked, and are not told of; empty where they
    could."""
    bytes_left: dict[str, tuple[int | None, int | None]] = field(default_factory=dict)
    """The same of bytes of features; empty where none leave."""
    new_components: tuple[TapCard, ...] = ()
    """Taps whose principal components would be newly released, of `demand.components`."""
    tail: TailDemand | None = None
    """What would be asked of the teacher's last blocks."""
    tail_left: dict[str, tuple[int | None, int | None]] = field(default_factory=dict)
    """Limit on questions about them -> what is left of it before and after the job."""
    loss: tuple[Spent, Spent] | None = None
    """What all that left comes to, before and after the job; None without a mechanism."""
    most: dict[str, tuple[float, float | None]] = field(default_factory=dict)
    """Limit of epsilon -> what is allowed, and what was spent of it; None where there is no guarantee."""

    @property
    def new(self) -> int:
        """Samples that would be newly released."""
        return sum(part.new for part in self.parts)

    @property
    def new_bytes(self) -> int:
        """Bytes of features that would be newly released."""
        return self.demand.feature_bytes([part.new for part in self.parts], self.new_components)


def explain(job: JobSettings, site: Site) -> Explanation:
    """Work out what `job` would take from `site` now.

    Raises `SettingsError` for more samples than the pool has, `PoolError`, `LedgerError`, `StorageError`.
    """
    pools, here = _pools(job, site)
    subsets = _subsets(job, pools, here=here and job.pool is not None)
    policy, summed, refusal = site.settings.policy, job.privacy.secure_sum, ""
    wanted, reduced, unfit = _taps(job, site)
    tail, no_tail = _tail(job, site, pools)
    unfit = unfit or no_tail
    demand = site.demand(
        job.name,
        pools,
        job.ask.encoding,
        coverage=job.asks_coverage,
        summed=summed,
        taps=wanted,
        features=job.ask.features,
        components=reduced,
        first=here,
        tail=tail,
        subsets=subsets,
    )
    fresh = site.new_of(demand)
    fresh_components = not_released(site.ledger, demand.components)
    parts = _parts(demand, fresh, wanted, summed=summed, owners=policy.sum_owners)
    held = Explanation(demand, parts, here, "", {}, unfit, new_components=fresh_components, tail=tail)
    try:
        if unfit:
            raise RefusedError("bad-question", "the job asks for what the site does not tell", unfit)
        if summed:
            site.encoder.check_kind("log-probs")
        check_sealed(policy, sealed=job.privacy.sealed)
        check_demand(policy, site.ledger, demand, sealed=job.privacy.sealed)
        site.permit(job.name, demand.counted(fresh), held.new_bytes)
        if tail is not None:
            site.tail.check(site.ledger, job.name, tail)
        _check_papers(job, site.settings)
    except RefusedError as error:
        refusal = error.told_here
    left = _left(limits(policy, site.ledger, job.name), held.new)
    bytes_left = _left(byte_limits(policy, site.ledger, job.name), held.new_bytes)
    rest = None if tail is None else still(site.ledger, job.name, tail)
    tail_left = {
        limit.name: (limit.left, None if limit.left is None else limit.left - more)
        for limit, more in zip(
            tail_limits(policy, site.ledger, job.name),
            () if rest is None else (rest.rounds, rest.samples, rest.bytes, rest.samples),
            strict=False,
        )
    }
    loss, most = None, {}
    if not isinstance(site.settings.privacy, NoPrivacy):
        costs = site.costs(held.new) if held.new else ()
        loss = loss_of(site.settings, site.ledger), loss_of(site.settings, site.ledger, costs)
        for limit in loss_limits(site.settings, site.ledger, job.name):
            if limit.most is not None:
                most[limit.name] = (limit.most, account(limit.events, loss[0].delta).epsilon)
    return replace(held, refusal=refusal, left=left, bytes_left=bytes_left, tail_left=tail_left, loss=loss, most=most)


def _left(held: Sequence[Limit], new: int) -> dict[str, tuple[int | None, int | None]]:
    return {limit.name: (limit.left, None if limit.left is None else limit.left - new) for limit in held}


def _taps(job: JobSettings, site: Site) -> tuple[tuple[OpenTap, ...], tuple[OpenTap, ...], str]:
    """Return the taps whose features a job would ask for, those of them whose principal components, and why it could
    not; the server goes by the same rules."""
    try:
        asked, reduced = taps_asked(job, site.card), components_asked(job, site.card)
    except SettingsError as error:
        return (), (), error.message
    return site.taps_named([tap.name for tap in asked]), site.taps_named([tap.name for tap in reduced]), ""


def _subsets(job: JobSettings, pools: Sequence[Pool], *, here: bool) -> dict[str, Subset]:
    """Return which samples a job would ask about of the pools any of which may be its own; whole ones are left out.

    Of samples that are chosen later only the number is known. Raises `SettingsError` where the job's pool, which is
    `here`, has fewer than it wants.
    """
    found = {}
    for pool in pools[:1] if here else pools:
        if not here and len(pool) < (job.ask.samples or 0):  # it is not the job's pool
            continue
        ids = drawn(job, len(pool))
        if ids is not None:
            mask = np.isin(np.arange(len(pool)), ids)
            found[pool.digest] = Subset(mask, samples_asked(job, len(pool)) - len(ids))
    return found


def _tail(job: JobSettings, site: Site, pools: Sequence[Pool]) -> tuple[TailDemand | None, str]:
    """Return what a job would ask of the teacher's last blocks at most, of whichever pool, and why it could not."""
    if job.student.learning != "filtered" or not pools:
        return None, ""
    from consilience.common.nets.tail_plan import check_tail, sides, tail_demand  # which brings torch

    learned_from = pools[:1] if job.pool is not None and pools else pools
    found = []
    try:
        for pool in learned_from:
            shapes = sides(job, pool.shape)
            check_tail(job, site.card, shapes)
            found.append(tail_demand(job, site.card, min(job.ask.samples or len(pool), len(pool)), shapes))
    except (SettingsError, StudentError, LabelError) as error:
        return None, error.message
    told = [each for each in found if each is not None]
    return max(told, key=lambda each: each.bytes, default=None), ""


def _parts(
    demand: Demand, fresh: Sequence[int], taps: Sequence[OpenTap], *, summed: bool, owners: int
) -> tuple[Part, ...]:
    cards = {tap.card.fingerprint: tap.card for tap in taps}
    parts = []
    for question, width, count, new in zip(demand.questions, demand.widths, demand.samples, fresh, strict=True):
        part = Part(
            question.pool,
            question.kind,
            question.encoding,
            count,
            new,
            len(question),
            bytes_a_sample=width,
            summed=summed,
            owners=owners,
        )
        if question.kind == "features":
            card = cards[question.teacher]
            part = replace(part, tap=card.name, shape=card.shape)
        parts.append(part)
    return tuple(parts)


def _check_papers(job: JobSettings, settings: SiteSettings) -> None:
    """Refuse what needs a key or a kit that the site has not got. Raises `RefusedError`."""
    if job.privacy.secure_sum and not settings.key.exists():
        raise RefusedError("sum-refused", "the site has no key to sign with in secure sums", str(settings.key))
    if job.privacy.sealed and not settings.kit.exists():
        raise RefusedError(
            "job-key", "the site has no kit, whose authority vouches for the job's key", f"{settings.kit}"
        )


def tell_site(settings: SiteSettings) -> list[str]:
    """Return what leaves beside answers, behind what they leave, and all of `tell_policy`, in words, one a line."""
    policy = settings.policy
    card = ["the names of the classes", "the teacher's kind and architecture"]
    card += ["accuracy and calibration on private images held out"] if policy.holdout_accuracy else []
    card += ["the classes' shares of the private data"] if policy.class_priors else []
    lines = [f"the site card tells {', '.join(card)}"]
    lines.append(f"answers leave behind {describe_privacy(settings) or 'no mechanism: there is no formal guarantee'}")
    lines += [f"sums are made with {', '.join(settings.peers)} alone"] if settings.peers else []
    return lines + tell_policy(policy)


def tell_policy(policy: Policy) -> list[str]:
    """Return what the policy takes away from answers and asks of jobs, in words, one a line."""
    lines = []
    if policy.temperature != 1:
        lines.append(f"log-probabilities are softened by a temperature of {policy.temperature:g}")
    if policy.decimals is not None:
        lines.append(f"probabilities are rounded to {policy.decimals} decimals")
    if policy.cap < 1:
        lines.append(f"no probability above {policy.cap:g} leaves, but for the encoding's rounding")
    if policy.floor > 0:
        lines.append(f"no probability below {policy.floor:g} leaves, but for the encoding's rounding")
    lines.append(f"pools: {', '.join(digest[:12] for digest in policy.pools) or 'those that site.yaml names'}")
    lines += [_tail_words(policy.tail)] if policy.tail.open else []
    if policy.features.taps:
        named = ", ".join("every layer" if name == EVERY_LAYER else name for name in policy.features.taps)
        lines.append(
            f"features leave of: {named}; at most {policy.features.bytes:,} bytes a job, "
            f"and {policy.features.bytes_lifetime:,} in all"
        )
    lines += ["answers leave in secure sums alone"] if policy.sums_only else []
    if policy.sum_owners > 1:
        lines.append(f"sums are of classes that {policy.sum_owners} sites know, this one among them")
    lines += ["answers leave sealed for the coordinator alone"] if policy.sealed_only else []
    lines.append("each job needs a person's approval" if policy.approval else "no job needs a person's approval")
    lines.append("it has no end" if policy.ends is None else f"the last day is {policy.ends}")
    return lines


def _tail_words(tail: Tail) -> str:
    if tail.allow == "blocks":
        return f"the teacher's blocks after block {tail.first}, and its head, leave as weights"
    return (
        f"the teacher's blocks after block {tail.first} answer questions about features: of a job at most "
        f"{tail.rounds:,} questions, {tail.samples:,} samples and {tail.bytes:,} bytes, and {tail.samples_lifetime:,} "
        "samples in all"
    )


def _pools(job: JobSettings, site: Site) -> tuple[list[Pool], bool]:
    """Return the pools that a job names where they are on this machine, else all that the site holds."""
    test_pool = None if job.privacy.secure_sum else job.judge.test_pool  # sums are made of the pool alone
    named = [folder for folder in (job.pool, test_pool) if folder is not None]
    try:
        pools, here = [Pool.open(folder) for folder in named], bool(named)
    except (PoolError, StorageError):
        pools, here = [], False
    if not here:
        pools = [Pool.open(Path(folder)) for folder in site.settings.pools]
    return list({pool.digest: pool for pool in pools}.values()), here
