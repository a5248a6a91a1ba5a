"""What events add up to: epsilon at a delta, by dp-accounting and by no formula of ours.

Lives here: events as dp-accounting's, both of its accountants, and whether there is a guarantee at all. Does not live
here: the events (events). Accounting is independent of the data: what the votes were never enters, so that epsilon may
be told. (Accounting by the votes gives smaller numbers that themselves tell of the data, and must not be published
unless smoothed: Papernot et al. 2018, section 4.)
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from consilience.client.privacy.events import DpSgdTraining, Event, PateThreshold, Unit
from consilience.common.errors import MissingExtraError, SettingsError
from consilience.common.settings import LEAST_NOISE, MOST_NOISE, Settings

EXTRA = "pip install 'consilience[privacy]'"
APART = math.sqrt(2)
"""How far apart two rows of probabilities, or two votes, can lie: the L2 sensitivity of what noise is added to."""
ORDERS = (
    *(1 + x / 100 for x in range(1, 10)),
    *(1 + x / 10 for x in range(1, 100)),
    *range(11, 64),
    *(80, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096),
)
"""Orders at which Rényi divergence is followed: a bound holds at any, and the best of them is taken."""
WHOLE_ORDERS = tuple(int(order) for order in ORDERS if order == int(order))
"""Orders for what samples records: dp-accounting 0.6 is exact at these there, and slow and loose between them."""
FINEST = 1e-4
"""Steps of privacy loss that distributions are kept in; wider where losses are large."""
MOST_STEPS = 2e4
"""About how many such steps the loss expected may take: more would need memory and say no more."""
LARGEST = 1e4
"""Epsilon from which on no distribution is kept: nothing is protected there, and exponentials overflow."""


class Spent(Settings):
    """What events came to. With `epsilon` None there is no formal guarantee, and `why` says for what reason."""

    unit: Unit | None
    """What the guarantee speaks of; None where there is none, or nothing left."""
    delta: float
    epsilon: float | None
    """The smaller of the two, each of which holds."""
    rdp: float | None
    """Epsilon by Rényi differential privacy."""
    pld: float | None
    """Epsilon by privacy loss distributions; None where that by Rényi is above `LARGEST`."""
    why: str = ""


def account(events: Iterable[Event], delta: float) -> Spent:
    """Return what all the events together come to at `delta`, in (0, 1).

    A guarantee for a unit holds only where everything was protected for that unit: events of several units, or one
    without a mechanism, leave none. Of a training, `dp-sgd`, only the first telling counts.
    Raises `SettingsError` for another delta and `MissingExtraError` without dp-accounting.
    """
    if not 0 < delta < 1:
        raise SettingsError(f"delta is {delta:g}; allowed: between 0 and 1", hint="Give about 1e-5")
    counts = _together(events)
    units: set[Unit | None] = {event.unit for event in counts}
    if not counts:
        return Spent(unit=None, delta=delta, epsilon=0.0, rdp=0.0, pld=0.0, why="nothing left the site")
    if None in units or len(units) > 1:
        bare = "something left without a mechanism" if None in units else "one and the other unit were protected"
        return Spent(unit=None, delta=delta, epsilon=None, rdp=None, pld=None, why=f"{bare}: no formal guarantee")
    library = accountant_library()
    composed = _composed(counts, library)
    orders = WHOLE_ORDERS if _samples(counts) else ORDERS
    rdp = float(library.rdp.RdpAccountant(orders).compose(composed).get_epsilon(delta))
    pld: float | None = None
    if rdp < LARGEST:
        # Every step gives a bound, a wider one a looser.
        accountant = library.pld.PLDAccountant(value_discretization_interval=max(FINEST, rdp / MOST_STEPS))
        pld = float(accountant.compose(composed).get_epsilon(delta))
    (unit,) = units
    return Spent(unit=unit, delta=delta, epsilon=rdp if pld is None else min(rdp, pld), rdp=rdp, pld=pld)


def noise_for(events: Callable[[float], Iterable[Event]], epsilon: float, delta: float, guess: float) -> float:
    """Return about the least noise with which `events` of that noise come to at most `epsilon`, above 0, at `delta`.

    `guess` says where to look first, from `LEAST_NOISE` to `MOST_NOISE`: settings take no other. It is found by privacy
    loss distributions, or by Rényi's divergence for what samples records, where that is quicker, and is a little more
    than `account` would ask for. Raises `SettingsError` where `MOST_NOISE` is not enough, `MissingExtraError` without
    dp-accounting.
    """
    library = accountant_library()
    sampled = _samples(events(guess))

    def fresh() -> Any:
        if sampled:
            return library.rdp.RdpAccountant(WHOLE_ORDERS)
        return library.pld.PLDAccountant(value_discretization_interval=max(FINEST, 10 * epsilon / MOST_STEPS))

    def composed(noise: float) -> Any:
        return _composed(_together(events(noise)), library)

    def enough(noise: float) -> bool:
        if library.rdp.RdpAccountant(WHOLE_ORDERS).compose(composed(noise)).get_epsilon(delta) >= LARGEST:
            return False  # a distribution of such losses would fill the memory
        return bool(fresh().compose(composed(noise)).get_epsilon(delta) <= epsilon)

    guess = min(max(guess, LEAST_NOISE), MOST_NOISE)
    while not enough(guess):
        if guess == MOST_NOISE:
            raise SettingsError(
                f"Epsilon {epsilon:g} at delta {delta:g} needs more noise than {MOST_NOISE:g}, the most that settings "
                "take",
                hint="Raise --epsilon, or lower --samples",
            )
        guess = min(guess * 2, MOST_NOISE)
    while guess > LEAST_NOISE and enough(low := max(guess / 2, LEAST_NOISE)):
        guess = low
    if guess == LEAST_NOISE:
        return guess
    bracket = library.mechanism_calibration.ExplicitBracketInterval(max(guess / 2, LEAST_NOISE), guess)
    found = library.mechanism_calibration.calibrate_dp_mechanism(
        fresh, composed, epsilon, delta, bracket, tol=guess * 5e-4
    )
    return float(found)


def accountant_library() -> Any:
    """Return dp-accounting's module. Raises `MissingExtraError` where it is not installed."""
    try:
        library = importlib.import_module("dp_accounting")
        for part in ("dp_event", "rdp", "pld", "mechanism_calibration"):
            importlib.import_module(f"dp_accounting.{part}")
    except ModuleNotFoundError as error:
        raise MissingExtraError("Accounting for privacy needs dp-accounting", hint=EXTRA) from error
    logging.getLogger("absl").setLevel(logging.ERROR)  # it warns of every order that it leaves out, which is allowed
    return library


def _composed(counts: Mapping[Event, int], library: Any) -> Any:
    """Return events, each with how many there are of it, as one of dp-accounting's."""
    return library.dp_event.ComposedDpEvent(
        [library.dp_event.SelfComposedDpEvent(_gaussian(event, library), count) for event, count in counts.items()]
    )


def _gaussian(event: Event, library: Any) -> Any:
    """All mechanisms here are Gaussian: noise over sensitivity is all that tells one from another.

    A record is in one part alone and moves that part's vote or probabilities: by `APART` in the counts of all
    classes, by 1 in the largest count. A model's whole row moves by `APART`, in a secure sum too: noise in steps is
    scaled by what the site's weight and rounding make of it (common/sums/ring).
    """
    if isinstance(event, DpSgdTraining):
        noisy = library.dp_event.GaussianDpEvent(event.noise_multiplier)
        return library.dp_event.SelfComposedDpEvent(
            library.dp_event.PoissonSampledDpEvent(event.sample_rate, noisy), event.steps
        )
    sensitivity = 1.0 if isinstance(event, PateThreshold) else APART
    sigma: float = event.sigma  # type: ignore[union-attr]  # a bare output never comes here
    return library.dp_event.GaussianDpEvent(sigma / sensitivity)


def _together(events: Iterable[Event]) -> dict[Event, int]:
    """Return events, each with a count of 1, and how many there are of it: a ledger has one row a batch."""
    counts: dict[Event, int] = {}
    for event in events:
        one = event.model_copy(update={"count": 1})
        counts[one] = 1 if isinstance(event, DpSgdTraining) else counts.get(one, 0) + event.count
    # In one order, so that the same events come to the same number to its last digit.
    return dict(sorted(counts.items(), key=lambda item: item[0].model_dump_json()))


def _samples(events: Iterable[Event]) -> bool:
    return any(isinstance(event, DpSgdTraining) for event in events)
