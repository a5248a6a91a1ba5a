"""What may leave: a site's decisions, for each question and for each job, and what remains of its limits.

Lives here: yes or no, with the constant reason that a stranger is told. Does not live here: the fields
(common/settings.Policy), what is taken from an answer (client/shaping), the record (client/ledger).
"""

from __future__ import annotations

from dataclasses import dataclass

from consilience.client.ledger import Ledger
from consilience.common.errors import IdentityError, ProtocolError, StorageError
from consilience.common.identity import Kit
from consilience.common.job_key import JobKey
from consilience.common.protocol import Kind, RefusalCode
from consilience.common.settings import Policy, SiteSettings, allowed_by


class RefusedError(ProtocolError):
    """The site will not or cannot answer: `code` and the constant `reason` are all that a stranger is told."""

    def __init__(self, code: RefusalCode, reason: str) -> None:
        super().__init__(reason)
        self.code: RefusalCode = code
        self.reason = reason


@dataclass(frozen=True)
class Limit:
    """One of the policy's limits: what counts towards it, how much that may be (None: no limit) and is."""

    name: str
    most: int | None
    spent: int

    @property
    def left(self) -> int | None:
        """Samples that may still be released, never below 0; None where there is no limit."""
        return None if self.most is None else max(0, self.most - self.spent)


def limits(policy: Policy, ledger: Ledger, job: str) -> tuple[Limit, ...]:
    """Return the limits as they stand for a job."""
    held, spent, month = policy.limits, ledger.spent, ledger.now[:7]
    return (
        Limit(f"job {job}", held.per_job, spent.jobs[job]),
        Limit(f"month {month}", held.per_month, spent.months[month]),
        Limit("lifetime", held.lifetime, spent.lifetime),
    )


def check_pool(policy: Policy, pool: str) -> None:
    """Refuse a pool that the policy does not list, where it lists any. Raises `RefusedError`."""
    if policy.pools and pool not in policy.pools:
        raise RefusedError("pool-not-allowed", "the site's policy does not allow this pool")


def check_encoding(policy: Policy, kind: Kind, encoding: str) -> None:
    """Refuse an encoding that is finer than the policy allows. Raises `RefusedError`."""
    allowed = allowed_by(policy.encodings, encoding) if kind == "log-probs" else encoding in policy.coverage_encodings
    if not allowed:
        raise RefusedError("encoding-not-allowed", "the site's policy does not allow this encoding")


def check_open(policy: Policy) -> None:
    """Refuse to answer openly where the policy lets sums out alone. Raises `RefusedError`."""
    if policy.sums_only:
        raise RefusedError("sums-only", "the site answers in secure sums only")


def check_sealed(policy: Policy, *, sealed: bool) -> None:
    """Refuse to answer unsealed where the policy lets sealed answers out alone. Raises `RefusedError`."""
    if policy.sealed_only and not sealed:
        raise RefusedError("sealed-only", "the site answers only jobs that have answers sealed")


def check_job_key(settings: SiteSettings, job: str, key: JobKey | None) -> None:
    """Refuse a job's key that the authority in the site's kit did not sign for this job, and to do without one where
    the policy needs one. Raises `RefusedError`."""
    check_sealed(settings.policy, sealed=key is not None)
    if key is None:
        return
    try:
        key.check(job, Kit.read(settings.kit).ca)
    except (ProtocolError, IdentityError, StorageError) as error:
        raise RefusedError("job-key", "the authority in the site's kit does not vouch for the job's key") from error


def check_job(policy: Policy, ledger: Ledger, job: str) -> None:
    """Refuse a job after the policy's end, or that needs an approval and has none. Raises `RefusedError`."""
    if policy.ends is not None and ledger.now[:10] > policy.ends.isoformat():
        raise RefusedError("policy-ended", "the site's policy has ended")
    if policy.approval and not ledger.approved(job, policy.version):
        raise RefusedError("not-approved", "nobody at the site has approved this job yet")


def check_budget(policy: Policy, ledger: Ledger, job: str, samples: int) -> None:
    """Refuse to release so many samples more than were, where a limit does not allow it. Raises `RefusedError`."""
    if any(limit.left is not None and samples > limit.left for limit in limits(policy, ledger, job)):
        raise RefusedError("budget-exhausted", "the site's limits do not allow so many samples more")
