"""audit.json: what an audit found out, what it did not look at, and the sentences that say so.

Lives here: the record, and its verdict in words. Does not live here: the attacks, the page (page).
"""

from __future__ import annotations

from typing import Literal

from consilience.client.audit.averaging import Averaging
from consilience.client.audit.canaries import CanaryAudit
from consilience.client.audit.membership import FALSE_RATES, Membership
from consilience.client.audit.pooled import Pooled
from consilience.client.audit.shares import Shares
from consilience.common.pages.numbers import percent
from consilience.common.settings import Settings

Part = Literal["loss", "shadows", "shares", "averaging", "canaries"]
CLEARLY = 0.6
"""Area from which on members are told clearly."""
NOTICEABLY = 0.02
"""Share of the images by which a guess of the shares of classes is at least nearer to be called so."""
NO_PROOF = (
    "An attack that fails is no guarantee: it says that these attacks, with these means, got no further. Only a "
    "mechanism of differential privacy bounds what every attack can reach."
)


class Audit(Settings):
    """What came of every part, None where it was left out; `left_out` says why."""

    site: str
    made: str
    """Day, by this machine's clock (UTC)."""
    version: str
    """Of Consilience."""
    seed: int
    teacher: str
    """In words."""
    fingerprint: str
    """The teacher's."""
    policy: str
    """The policy's version."""
    mechanism: str
    """In words; empty where there is none, and so no formal guarantee."""
    encoding: str
    """The finest that the policy allows: what was audited."""
    shadow_count: int
    """Shadow teachers that were trained."""
    loss: Membership | None
    """Of the loss threshold."""
    shadows: Membership | None
    """Of the likelihood ratio."""
    pooled: Pooled | None = None
    """Of the likelihood ratio against each shadow in turn; None with too few shadows."""
    shares: Shares | None
    averaging: Averaging | None
    canaries: CanaryAudit | None = None
    """None where none were asked for."""
    left_out: dict[Part, str]
    notes: tuple[str, ...]
    """What else is to be known when the figures are read."""

    @property
    def strongest(self) -> Membership | None:
        """The attack on membership with the largest area."""
        done = [found for found in (self.shadows, self.loss) if found is not None]
        return max(done, key=lambda found: found.auc, default=None)

    @property
    def worst(self) -> Membership | None:
        """Of the attacks that tell members from others for sure, the strongest.

        Where two were tried, that one of them comes out so by chance is no likelier than where one was.
        """
        done = [found for found in (self.shadows, self.loss) if found is not None]
        sure = [found for found in done if (found.low if len(done) == 1 else found.low_of_two) > 0.5]
        return max(sure, key=lambda found: found.auc, default=None)

    @property
    def guarantee(self) -> str:
        """The mechanism, or that there is none, as a sentence."""
        if not self.mechanism:
            return "No formal guarantee: the answers leave without a mechanism of differential privacy."
        if self.mechanism.startswith("sum-noise"):
            return (
                f"Answers leave in sums with noise, and what was attacked here is without it: {self.mechanism}. What "
                "it comes to is told by `site ledger show`."
            )
        return f"Answers leave behind a mechanism: {self.mechanism}. What it comes to is told by `site ledger show`."

    @property
    def verdict(self) -> str:
        """The result in one sentence."""
        found = self.strongest
        if found is None:
            return "Whether answers tell which images the teacher learned from was not audited"
        if self.worst is None:
            return "These attacks did not tell the images that the teacher learned from from others"
        how = "clearly" if self.worst.auc >= CLEARLY else "a little"
        return f"Answers tell {how} better than chance whether the teacher learned from an image"

    @property
    def findings(self) -> tuple[str, ...]:
        """The parts' results, a sentence or two each."""
        told = [_membership(self.strongest, self.worst is not None)] if self.strongest is not None else []
        if self.pooled is not None:
            told += _pooled(self.pooled)
        if self.shares is not None:
            told.append(_shares(self.shares))
        if self.averaging is not None:
            told.append(_averaging(self.averaging))
        if self.canaries is not None:
            told.append(_canaries(self.canaries))
        return tuple(told)

    @property
    def summary(self) -> dict[str, object]:
        """The few numbers that stand for the audit elsewhere."""
        found = self.strongest
        return {
            "verdict": self.verdict,
            "mechanism": self.mechanism,
            "membership": None if found is None else {"auc": found.auc, "low": found.low, "high": found.high},
            "averaging": None if self.averaging is None else self.averaging.works,
        }


def _membership(found: Membership, sure: bool) -> str:
    text = (
        f"Given one image that the teacher learned from and one that it did not, the strongest attack names the right "
        f"one in {percent(found.auc)} of cases (95\u00a0% interval {percent(found.low)} to {percent(found.high)}); "
        f"guessing, in {percent(0.5)}."
    )
    rate = next((rate for rate in FALSE_RATES if found.found[rate] is not None), None)
    if rate is None or (share := found.found[rate]) is None:
        return text
    more = f" Where {percent(rate)} of other images are wrongly taken for such, it finds {percent(share.share)} of them"
    if sure and share.low > rate:
        return f"{text}{more}: for these the attack is far surer than the average says."
    return f"{text}{more} (95\u00a0% interval {percent(share.low)} to {percent(share.high)})."


def _pooled(found: Pooled) -> list[str]:
    """Return a sentence on the lowest false rate that is resolved, if one is."""
    for rate in FALSE_RATES:
        if (share := found.found[rate]) is not None:
            return [
                f"Pooled over {found.targets} shadows, which are attacked in turn, the likelihood ratio finds "
                f"{percent(share.share)} of what was learned from (95\u00a0% interval {percent(share.low)} to "
                f"{percent(share.high)}) where {percent(rate)} of the rest is wrongly taken for such."
            ]
    return []


def _shares(found: Shares) -> str:
    best = min(found.distance_by_mean, found.distance_by_scaling)
    start = (
        f"From answers about {found.samples:,} pool images the shares of the classes in the private data are guessed "
        f"with {percent(best)} of the images in a wrong class; without any answer, by equal shares, with "
        f"{percent(found.distance_uniform)}"
    )
    if found.gained > NOTICEABLY:
        return f"{start}: answers tell of the shares."
    return f"{start}: no nearer worth the name."


def _averaging(found: Averaging) -> str:
    first, last = found.errors[1], found.errors[found.repetitions]
    if found.works:
        return (
            f"Asking the same {found.repetitions:,} times and averaging brings an attacker nearer to what the teacher "
            f"says without noise: the error falls from {first:.4f} to {last:.4f}. This must not be: report it, unless "
            "the teacher draws its answers at random, by dropout say; then switch that off."
        )
    if not found.noisy:
        return f"Asking the same {found.repetitions:,} times gives the same answer; there is no noise to average away."
    return (
        f"Asking the same {found.repetitions:,} times and averaging gains nothing: the error is {last:.4f} as after "
        f"asking once ({first:.4f})."
    )


def _canaries(found: CanaryAudit) -> str:
    text = (
        f"Of {found.canaries:,} wrong records {found.planted:,} were planted in the training of a copy of the teacher. "
        f"Its answers tell a planted one from another in {percent(found.auc)} of pairs (95\u00a0% interval "
        f"{percent(found.low)} to {percent(found.high)}), and show that epsilon for a record is {found.lower:.2f} at "
        f"least (at delta {found.delta:g}, with {found.confidence:.0%} confidence)"
    )
    if found.upper is None:
        return f"{text}. No upper bound stands beside it: {found.why}."
    bound = f"; the accountant says {found.upper:.3g} at most, for a {found.unit}."
    return f"{text}{bound}" if found.holds else f"{text}{bound} This must not be: report it."
