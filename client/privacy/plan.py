"""What each mechanism needs and gives, for so many answers at so much epsilon.

Lives here: the noise that is needed, and what it costs. Does not live here: what labels are then worth (estimates) and
how it is shown (plan_cli).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from consilience.client.privacy.accounting import APART, Spent, account, noise_for
from consilience.client.privacy.estimates import Held, Value, estimate_outputs, estimate_votes, look
from consilience.client.privacy.events import DpSgdTraining, Event, events_of, sampling
from consilience.client.teacher.kept_training import wanted
from consilience.common.errors import SettingsError
from consilience.common.settings import (
    LEAST_NOISE,
    MOST_NOISE,
    DpSgd,
    Fit,
    Mechanism,
    NoPrivacy,
    OutputNoise,
    Pate,
    SiteSettings,
    SumNoise,
)

MOST_EPSILON = 100.0
MOST_SAMPLES = 10**12
RECORDS_A_PART = 40
"""Where the settings name no parts: so many private records are taken for one."""
_PLANNED = "0" * 64
"""Stands for the digest of a training that is still to come."""
Noisy = TypeVar("Noisy", Pate, OutputNoise, SumNoise)


@dataclass(frozen=True)
class Alternative:
    """One mechanism: strong enough for the epsilon that was asked for, or (`configured`) as the settings have it."""

    settings: Mechanism
    configured: bool
    spent: Spent
    """What `samples` answers come to."""
    value: Value
    trainings: int
    """Networks that are trained for it."""

    @property
    def payment(self) -> str:
        """When epsilon is paid; what is paid once covers any number of answers."""
        if isinstance(self.settings, NoPrivacy):
            return "never"
        return "once" if isinstance(self.settings, DpSgd) else "by answer"


def alternatives(settings: SiteSettings, epsilon: float, samples: int, delta: float | None = None) -> list[Alternative]:
    """Return every mechanism that the site can take, as `samples` answers at `epsilon` need it; then the site's own.

    `delta` is by default the settings'. A mechanism that has to train the teacher is left out for a hosted one.
    Raises `SettingsError` for an epsilon outside (0, 100], samples outside [1, 10^12], a delta outside (0, 1), and
    where these need more noise than settings take;
    `MissingExtraError` without dp-accounting; `DataError` and `TeacherError` where private data are needed and cannot
    be read.
    """
    chosen = getattr(settings.privacy, "delta", 1e-5) if delta is None else delta
    for what, value, allowed, right in (
        ("epsilon", epsilon, f"more than 0, at most {MOST_EPSILON:g}", 0 < epsilon <= MOST_EPSILON),
        ("samples", samples, "1 to 10^12", 1 <= samples <= MOST_SAMPLES),
        ("delta", chosen, "between 0 and 1", 0 < chosen < 1),
    ):
        if not right:
            raise SettingsError(f"--{what} is {value:g}; allowed: {allowed}", hint=f"Correct --{what}")
    held = look(settings)
    needed: list[Mechanism] = []
    if held.records is not None:
        needed += _pate(settings, held.records, epsilon, samples, chosen)
        needed += [_dp_sgd(wanted(settings).fit, held.records, epsilon, chosen)]
    needed += [_outputs(epsilon, samples, chosen)]
    if isinstance(settings.privacy, SumNoise):
        needed += [_sum_noise(settings.privacy, epsilon, samples, chosen)]
    if not isinstance(settings.privacy, NoPrivacy):
        needed += [NoPrivacy()]
    found = [_judged(settings, mechanism, held, samples, chosen, configured=False) for mechanism in needed]
    return [*found, _judged(settings, settings.privacy, held, samples, chosen, configured=True)]


def _pate(settings: SiteSettings, records: int, epsilon: float, samples: int, delta: float) -> list[Mechanism]:
    """The three forms of a vote. Where the settings have no threshold it is 60 % of the parts."""
    own = settings.privacy if isinstance(settings.privacy, Pate) else None
    parts = own.parts if own is not None else max(2, min(250, records // RECORDS_A_PART))
    threshold, ratio = 0.6 * parts, 1.0
    if own is not None and own.threshold is not None and own.threshold_sigma is not None:
        threshold, ratio = own.threshold, own.threshold_sigma / own.sigma

    def simple(answer: str) -> Callable[[float], Pate]:
        return lambda sigma: Pate.model_validate(
            {"mechanism": "pate", "parts": parts, "answer": answer, "sigma": sigma, "delta": _allowed(delta)}
        )

    def confident(sigma: float) -> Pate:
        return Pate(
            mechanism="pate",
            parts=parts,
            answer="confident",
            sigma=sigma,
            threshold=threshold,
            threshold_sigma=min(max(ratio * sigma, LEAST_NOISE), MOST_NOISE),
            delta=_allowed(delta),
        )

    forms = (simple("arg-max"), confident, simple("average"))
    return [_enough(form, epsilon, samples, delta) for form in forms]


def _outputs(epsilon: float, samples: int, delta: float) -> OutputNoise:
    return _enough(
        lambda sigma: OutputNoise(mechanism="output-noise", sigma=sigma, delta=_allowed(delta)), epsilon, samples, delta
    )


def _sum_noise(own: SumNoise, epsilon: float, samples: int, delta: float) -> SumNoise:
    def form(sigma: float) -> SumNoise:
        return SumNoise(mechanism="sum-noise", sigma=sigma, honest=own.honest, delta=_allowed(delta))

    return _enough(form, epsilon, samples, delta)


def _enough(form: Callable[[float], Noisy], epsilon: float, samples: int, delta: float) -> Noisy:
    """Return the mechanism with about the least noise that is enough."""

    def events(sigma: float) -> tuple[Event, ...]:
        return events_of(form(sigma), samples)

    return form(noise_for(events, epsilon, delta, guess=APART * samples**0.5))


def _dp_sgd(fit: Fit, records: int, epsilon: float, delta: float) -> DpSgd:
    def events(noise: float) -> tuple[Event, ...]:
        return (_training(noise, fit, records),)

    noise = noise_for(events, epsilon, delta, guess=1.0)
    return DpSgd(mechanism="dp-sgd", noise_multiplier=noise, delta=_allowed(delta))


def _training(noise: float, fit: Fit, records: int) -> DpSgdTraining:
    rate, steps = sampling(records, fit)
    return DpSgdTraining(noise_multiplier=noise, sample_rate=rate, steps=steps * fit.epochs, run=_PLANNED)


def _judged(
    settings: SiteSettings, mechanism: Mechanism, held: Held, samples: int, delta: float, *, configured: bool
) -> Alternative:
    events: tuple[Event, ...]
    trainings = 1 if settings.teacher.kind == "train" else 0
    if isinstance(mechanism, Pate):
        events, value, trainings = events_of(mechanism, samples), estimate_votes(mechanism, held), mechanism.parts
    elif isinstance(mechanism, DpSgd):
        events = (_training(mechanism.noise_multiplier, wanted(settings).fit, held.records or 1),)
        value = Value(None, 1.0, "known once it is trained")
        if configured and held.trained is not None:
            value = Value(held.trained, 1.0, "the teacher's answers on held-out private images")
    elif isinstance(mechanism, SumNoise):
        events = events_of(mechanism, samples)
        value = Value(None, 1.0, "known once answers are summed: the noise is in the sum over sites, once")
    else:
        noisy = mechanism if isinstance(mechanism, OutputNoise) else None
        events, value = events_of(noisy, samples), estimate_outputs(noisy, held)
    return Alternative(mechanism, configured, account(events, delta), value, trainings)


def _allowed(delta: float) -> float:
    """A delta that settings take; the accounting uses the one that was asked for."""
    return min(delta, 0.01)
