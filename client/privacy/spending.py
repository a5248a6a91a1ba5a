"""What privacy loss left the site by its ledger, and what its limits allow of it.

Lives here: the ledger's mechanism rows as events, what they come to in a job, a month and a lifetime, and yes or no.
Does not live here: the rows (client/ledger), what events come to (accounting), limits in samples (client/policy).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from consilience.client.ledger import Ledger
from consilience.client.ledger_rows import Entry, mechanism
from consilience.client.policy import RefusedError
from consilience.client.privacy.accounting import Spent, account
from consilience.client.privacy.events import Event, event_from, parameters_of
from consilience.common.settings import NoPrivacy, SiteSettings

DELTA = 1e-5
"""Where no mechanism names another."""


@dataclass(frozen=True)
class LossLimit:
    """One of the policy's limits of epsilon: what counts towards it, how much that may be, and the events so far."""

    name: str
    most: float | None
    events: tuple[Event, ...]


def entries_of(job: str, events: tuple[Event, ...]) -> list[Entry]:
    """Return the ledger's entries of events. Of answers behind no mechanism the answers' own rows tell."""
    return [mechanism(job, event.name, parameters_of(event), event.count) for event in events if event.name != "none"]


def delta_of(settings: SiteSettings) -> float:
    """Return the delta that the site's mechanism names."""
    return DELTA if isinstance(settings.privacy, NoPrivacy) else settings.privacy.delta


def loss_limits(settings: SiteSettings, ledger: Ledger, job: str) -> tuple[LossLimit, ...]:
    """Return the limits of epsilon as they stand for a job. Raises `StorageError` for an event of no known kind."""
    held, month = settings.policy.limits, ledger.now[:7]
    return (
        LossLimit(f"job {job}", held.epsilon_per_job, tuple(_events(ledger, job=job))),
        LossLimit(f"month {month}", held.epsilon_per_month, tuple(_events(ledger, month=month))),
        LossLimit("lifetime", held.epsilon_lifetime, tuple(_events(ledger))),
    )


def _events(ledger: Ledger, job: str | None = None, month: str | None = None) -> Iterator[Event]:
    """Yield the events of all rows, or of one job's or one month's."""
    for (of_job, of_month, name, parameters), count in sorted(ledger.spent.mechanisms.items()):
        if job in (None, of_job) and month in (None, of_month):
            yield event_from(name, json.loads(parameters), 1 if name == "dp-sgd" else count)


class Allowance:
    """Whether events may be added, under a site's limits of epsilon. Remembers what it worked out."""

    def __init__(self, settings: SiteSettings) -> None:
        self._settings, self._delta = settings, delta_of(settings)
        self._most: dict[tuple[float, tuple[Event, ...], tuple[Event, ...]], int] = {}

    def check(self, ledger: Ledger, job: str, costs: tuple[Event, ...]) -> None:
        """Refuse events by which a limit would be passed.

        Raises `RefusedError`; `MissingExtraError` without dp-accounting, `StorageError`.
        """
        for limit in loss_limits(self._settings, ledger, job):
            if limit.most is not None and not self._allows(limit.most, limit.events, costs):
                spent, after = (account(events, self._delta) for events in (limit.events, (*limit.events, *costs)))
                if spent.epsilon is None or after.epsilon is None:
                    known = f"{spent.why or after.why}, so that it cannot be kept any more"
                else:
                    known = f"{spent.epsilon:.3g} spent, {after.epsilon:.3g} with what is asked now"
                raise RefusedError(
                    "budget-exhausted",
                    "the site's limits do not allow so much privacy loss more",
                    f"{limit.name}: epsilon {limit.most:g} at most, {known}",
                )

    def _allows(self, most: float, before: tuple[Event, ...], costs: tuple[Event, ...]) -> bool:
        """Whether `before` and `costs` together come to at most epsilon `most`.

        Accounting takes a moment, and answers go out by the hundred: so how often these costs can be paid at all,
        beside all else that was, is worked out once.
        """
        ones = tuple(event.model_copy(update={"count": 1}) for event in costs)
        paid = Counter[Event]()
        for event in before:  # of several jobs and months there are as many events of a kind
            paid[event.model_copy(update={"count": 1})] += event.count
        others = tuple(one.model_copy(update={"count": count}) for one, count in paid.items() if one not in ones)
        wanted = max(paid[one] + event.count for one, event in zip(ones, costs, strict=True))
        key = (most, others, ones)
        if key not in self._most:
            self._most[key] = self._times(most, others, ones)
        return wanted <= self._most[key]

    def _times(self, most: float, others: tuple[Event, ...], ones: tuple[Event, ...]) -> int:
        """Return how often events of count 1 can be paid, beside `others`, for epsilon at most `most`."""

        def fits(times: int) -> bool:
            # a training is one event however often it is told
            told = tuple(one if one.name == "dp-sgd" else one.model_copy(update={"count": times}) for one in ones)
            spent = account((*others, *told), self._delta)
            return spent.epsilon is not None and spent.epsilon <= most

        if not fits(1):
            return 0
        if all(one.name == "dp-sgd" for one in ones):
            return 2**53
        enough = 1
        while enough < 2**50 and fits(2 * enough):
            enough *= 2
        too_many = 2 * enough
        while too_many - enough > max(1, enough // 1000):  # to a thousandth, and never too many
            middle = (enough + too_many) // 2
            enough, too_many = (middle, too_many) if fits(middle) else (enough, middle)
        return enough


def loss_of(settings: SiteSettings, ledger: Ledger, more: tuple[Event, ...] = ()) -> Spent:
    """Return what everything that left so far, and `more`, come to at the mechanism's delta."""
    return account((*_events(ledger), *more), delta_of(settings))
