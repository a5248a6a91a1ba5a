"""The site card: what a site says of itself first, as far as its policy allows.

Does not live here: the record (common/cards.SiteCard), what is told beside it to the site's own eyes (client/cli).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from consilience.client.coverage import Coverage
from consilience.client.features import OpenTap
from consilience.client.summing import noise_card
from consilience.client.tails import OpenTail
from consilience.client.teacher import (
    CalibratedMulti,
    CalibratedTeacher,
    MultiTeacher,
    Teacher,
    describe_teacher,
    holdout_ap,
)
from consilience.common.cards import PRIVATE, CalibrationCard, CoverageCard, FeaturesCard, SiteCard
from consilience.common.data import open_data
from consilience.common.errors import DataError
from consilience.common.identity import key_fingerprint, key_line
from consilience.common.settings import Policy, SiteSettings
from consilience.common.vouching import Signer


def card_of(
    settings: SiteSettings,
    teacher: Teacher | MultiTeacher,
    coverage: Coverage | None,
    taps: Sequence[OpenTap],
    tail: OpenTail | None,
    signer: Signer | None,
) -> SiteCard:
    """Return the card of a site with this teacher, coverage, taps, tail and key.

    Raises `TeacherError` when the teacher is still to be trained, and `DataError` when the policy tells shares of
    classes and the private data do not have them.
    """
    description, accuracy = describe_teacher(settings)
    policy = settings.policy
    precision = holdout_ap(settings) if policy.holdout_accuracy else None
    return SiteCard(
        labels=settings.teacher.labels,
        name=settings.name,
        classes=teacher.classes,
        encodings=policy.encodings,
        teacher=teacher.fingerprint,
        description=description,
        policy=policy.version,
        holdout_accuracy=accuracy if policy.holdout_accuracy else None,
        holdout_ap=None if precision is None else _few_digits(precision),
        calibration=_calibration(teacher) if policy.holdout_accuracy else None,
        class_priors=_class_priors(settings, teacher) if policy.class_priors else None,
        coverage=_coverage(policy, coverage),
        features=_features(policy, taps),
        tail=None if tail is None else tail.card,
        sums_only=policy.sums_only,
        sum_noise=noise_card(settings),
        sealed_only=policy.sealed_only,
        identity=None if signer is None else key_fingerprint(signer.key.public_key()),
        public_key=None if signer is None else key_line(signer.key.public_key()),
    )


def private_figures(card: SiteCard) -> dict[str, Any]:
    """Return what of a card was counted on private data, by the names of its fields; empty where nothing was."""
    return card.model_dump(mode="json", include=set(PRIVATE), exclude_none=True)


def _coverage(policy: Policy, coverage: Coverage | None) -> CoverageCard | None:
    allowed = policy.coverage_encodings
    if coverage is None or not allowed:
        return None
    return CoverageCard(fingerprint=coverage.fingerprint, encodings=allowed, description=coverage.description)


def _features(policy: Policy, taps: Sequence[OpenTap]) -> FeaturesCard | None:
    if not taps:
        return None
    return FeaturesCard(taps=tuple(tap.card for tap in taps), encodings=policy.features.encodings)


def _calibration(teacher: Teacher | MultiTeacher) -> CalibrationCard | None:
    record = teacher.record if isinstance(teacher, CalibratedTeacher | CalibratedMulti) else None
    if record is None or record.before is None or record.after is None:
        return None
    return CalibrationCard(
        method=record.method,
        samples=record.samples,
        ece_before=_few_digits(record.before.ece),
        ece_after=_few_digits(record.after.ece),
        nll_before=_few_digits(record.before.nll),
        nll_after=_few_digits(record.after.nll),
    )


def _few_digits(mean: float) -> float:
    """Return a mean over private images in thousandths: all its digits would tell what it is a mean of."""
    return round(mean, 3)


def _class_priors(settings: SiteSettings, teacher: Teacher | MultiTeacher) -> tuple[float, ...] | None:
    if settings.data is None:
        return None
    data = open_data(settings.data)
    labels = data.need_labels("The site's private data")
    missing = [name for name in teacher.classes if name not in data.class_names]
    if missing:
        raise DataError(
            f"The private data have no class {missing[0]!r}; they have: {', '.join(data.class_names[:20])}",
            hint="Name the teacher's classes as the data do, or set policy.class_priors: false",
        )
    counts = np.array([np.sum(labels == data.class_names.index(name)) for name in teacher.classes])
    if not counts.all():
        return None
    # In hundredths: exact shares would tell every count, and one that changed by an image the image's class.
    told = np.maximum(np.round(counts / counts.sum(), 2), 0.01)
    return tuple((told / told.sum()).tolist())
