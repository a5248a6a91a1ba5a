"""Mechanisms that say how much a site's answers can tell, with the unit that they protect named.

Lives here: which mechanism trains and which answers. Does not live here: the mechanisms (pate, dp_sgd, outputs), what
they cost (events, accounting), and what may be spent.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from consilience.client.privacy.accounting import Spent, account
from consilience.client.privacy.events import Event, Unit, event_from, events_of, parameters_of
from consilience.client.privacy.noise import load_secret
from consilience.client.privacy.outputs import NoisyTeacher
from consilience.client.privacy.pate import PateTeacher, learned_places, load_pate, train_parts
from consilience.client.privacy.sum_noise import HiddenTeacher
from consilience.client.teacher.private_samples import digest_of, held_out
from consilience.client.teacher.protocol import Teacher
from consilience.common.data import ImageData
from consilience.common.epochs import EpochRecord
from consilience.common.files import make_private
from consilience.common.settings import DpSgd, OutputNoise, Pate, SiteSettings, SumNoise

__all__ = [
    "Event",
    "NoisyTeacher",
    "PateTeacher",
    "Spent",
    "Unit",
    "account",
    "answering_costs",
    "behind_noise",
    "describe_privacy",
    "event_from",
    "events_of",
    "learned_from",
    "load_private",
    "parameters_of",
    "train_private",
    "training_epochs",
]


def train_private(
    settings: SiteSettings, on_epoch: Callable[[EpochRecord], None] | None = None, data: ImageData | None = None
) -> None:
    """Train what the site's mechanism answers from, `teacher.kind` being train; resumes, and returns when it is there.

    On the site's private data, or on `data` in their place. Raises what `train_teacher` raises, and
    `MissingExtraError` where the mechanism needs a library.
    """
    make_private(settings.state)
    if isinstance(settings.privacy, Pate):
        train_parts(settings, settings.privacy, on_epoch, data)
    elif isinstance(settings.privacy, DpSgd):
        from consilience.client.privacy import dp_sgd  # opacus is imported in there, when it trains

        dp_sgd.train_dp(settings, settings.privacy, on_epoch, data)
    elif settings.teacher.labels == "multi":
        from consilience.client.teacher.multi_trained import train_multi

        train_multi(settings, on_epoch, data)
    else:
        from consilience.client.teacher.trained import train_teacher

        train_teacher(settings, on_epoch, data)


def learned_from(settings: SiteSettings, data: ImageData) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return sorted ids of the private `data` that what answers has learned from, and of those that were held out.

    Raises `TeacherError` when it is not there, of other settings or data, or was not trained here.
    """
    if isinstance(settings.privacy, Pate):
        found = learned_places(settings, settings.privacy, data)
    elif isinstance(settings.privacy, DpSgd):
        from consilience.client.privacy import dp_sgd

        found = dp_sgd.learned_places(settings, settings.privacy, data)
    else:
        others, _ = held_out(settings, data, digest_of(data))
        return np.setdiff1d(np.arange(len(data)), others), others
    return np.flatnonzero(found.part >= 0), found.ids(-1)


def training_epochs(settings: SiteSettings) -> int:
    """Return how many epochs `train_private` trains, over all networks."""
    if settings.teacher.kind != "train":
        return 0
    networks = settings.privacy.parts if isinstance(settings.privacy, Pate) else 1
    return networks * settings.teacher.fit.epochs


def load_private(settings: SiteSettings) -> Teacher:
    """Load what `train_private` trained, behind its mechanism where that is one of the parts.

    Raises `TeacherError` when it is not there or of other settings, `IdentityError` when others on the machine may read
    the site's secret.
    """
    if isinstance(settings.privacy, Pate):
        return load_pate(settings, settings.privacy)
    if isinstance(settings.privacy, DpSgd):
        from consilience.client.privacy import dp_sgd

        return dp_sgd.load_dp(settings, settings.privacy)
    from consilience.client.teacher.trained import load_trained  # which brings torch

    return load_trained(settings)


def behind_noise(settings: SiteSettings, teacher: Teacher) -> Teacher:
    """Put `teacher`, with all that its answers go through, behind the noise on outputs, if the settings want it.

    With noise in sums it stays as it is, but for its fingerprint.

    Raises `IdentityError` when others on the machine may read the site's secret, `StorageError`.
    """
    if isinstance(settings.privacy, OutputNoise):
        return NoisyTeacher(teacher, settings.privacy, load_secret(settings))
    if isinstance(settings.privacy, SumNoise):
        return HiddenTeacher(teacher, settings.privacy, load_secret(settings))
    return teacher


def answering_costs(settings: SiteSettings, samples: int) -> tuple[Event, ...]:
    """Return the events of answering about `samples`, at least 1: what a ledger adds before they leave.

    Of `dp-sgd` it is the training, the same event each time. Raises `TeacherError` when that is still to come.
    """
    if isinstance(settings.privacy, DpSgd):
        from consilience.client.privacy import dp_sgd

        return (dp_sgd.dp_record(settings, settings.privacy).event,)
    return events_of(settings.privacy if isinstance(settings.privacy, Pate | OutputNoise | SumNoise) else None, samples)


def describe_privacy(settings: SiteSettings) -> str:
    """Return the mechanism in words that a stranger may read: what it protects, and its noise; empty for none."""
    private = settings.privacy
    if isinstance(private, Pate):
        form = f", threshold {private.threshold:g} with noise {private.threshold_sigma:g}" if private.threshold else ""
        return f"pate ({private.answer}): protects a record; {private.parts} parts, noise {private.sigma:g} votes{form}"
    if isinstance(private, DpSgd):
        return f"dp-sgd: protects a record; noise multiplier {private.noise_multiplier:g}"
    if isinstance(private, OutputNoise):
        return f"output-noise: protects the whole model's answer, not a record; noise {private.sigma:g}"
    if isinstance(private, SumNoise):
        whose = "all of it this site's" if private.honest == 1 else f"if {private.honest} of the sites are honest"
        return f"sum-noise: protects the whole model's answer, not a record; noise {private.sigma:g} in sums, {whose}"
    return ""
