"""The teacher that is a vote of many, each of which learned from a part of the private data.

Lives here: training and loading the parts' teachers, and the teacher that they are together. Does not live here: which
record is in which part (records), the noisy vote (votes), one network's training (client/teacher/trained).

state/privacy/pate/NNNN/ holds each part's model and teacher.json, as state/teacher does for a teacher without parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from consilience.client.privacy import votes
from consilience.client.privacy.noise import Secret, load_secret
from consilience.client.privacy.records import Places, places
from consilience.client.teacher.kept_training import RETRAIN, record_in, wanted
from consilience.client.teacher.private_samples import digest_of, present_classes, private_data
from consilience.client.teacher.protocol import Teacher
from consilience.common.data import ImageData
from consilience.common.epochs import EpochRecord
from consilience.common.errors import TeacherError
from consilience.common.preprocessing import Images
from consilience.common.seeds import derive
from consilience.common.settings import Pate, SiteSettings, TrainTeacher
from consilience.common.simplex import as_answer


@dataclass(frozen=True)
class PateTeacher:
    """The parts' teachers behind a noisy vote. `fingerprint` is under the site's secret, since it stands for weights
    that are not noisy: a digest of them would let a guess at the data be tried."""

    parts: tuple[Teacher, ...]
    settings: Pate
    secret: Secret
    fingerprint: str

    @property
    def classes(self) -> tuple[str, ...]:
        """See `Teacher.classes`."""
        return self.parts[0].classes

    def log_probs(self, images: Images) -> NDArray[np.float32]:
        """See `Teacher.log_probs`."""
        if not len(images):
            return self.parts[0].log_probs(images)
        total = self.sums(images)
        normal = self.secret.normal(self.fingerprint, images, votes.draws(self.settings, len(self.classes)))
        return as_answer(votes.answers(self.settings, total, normal))

    def sums(self, images: Images) -> NDArray[np.float64]:
        """Return (n, K) float64 votes or sums of probabilities, without noise: for the site's own eyes alone."""
        return votes.sums(self.settings, (part.log_probs(images) for part in self.parts))


def train_parts(
    settings: SiteSettings,
    pate: Pate,
    on_epoch: Callable[[EpochRecord], None] | None = None,
    data: ImageData | None = None,
) -> None:
    """Train a teacher on each part of the private data, or of `data`, one after the other; the trained ones stay.

    `teacher.holdout` of the records is in no part: with it the vote is judged. Raises what `train_teacher` raises, and
    `TeacherError` when a part has no image.
    """
    from consilience.client.teacher.trained import train_in  # which brings torch

    data = private_data(settings) if data is None else data
    labels, classes = present_classes(data)
    found = places(data, pate.parts, wanted(settings).holdout, settings.seed)
    for part in range(pate.parts):
        ids = found.ids(part)
        if not len(ids):
            raise TeacherError(
                f"{settings.name}: part {part} of {pate.parts} has no image, of {len(data)} in all",
                hint="Lower privacy.parts",
            )
        train_in(
            _folder(settings, part),
            f"{settings.name}, part {part}",
            data.subset(ids),
            labels[ids],
            classes,
            _each(settings),
            _seed(settings, pate, part),
            on_epoch,
        )


def load_pate(settings: SiteSettings, pate: Pate) -> PateTeacher:
    """Load what `train_parts` wrote.

    Raises `TeacherError` when a part's teacher is missing or of other settings, `IdentityError` when others may read
    the site's secret.
    """
    from consilience.client.teacher.trained import load_in  # which brings torch

    each = _each(settings)
    parts = tuple(load_in(_folder(settings, part), each, _seed(settings, pate, part)) for part in range(pate.parts))
    if any(part.classes != parts[0].classes for part in parts):
        raise TeacherError(
            f"{settings.state / 'privacy' / 'pate'}: the parts' teachers know different classes",
            hint=RETRAIN,
        )
    secret = load_secret(settings)
    held = [pate.model_dump(mode="json", exclude={"delta"}), [part.fingerprint for part in parts]]
    return PateTeacher(parts, pate, secret, secret.digest(held))


def learned_places(settings: SiteSettings, pate: Pate, data: ImageData) -> Places:
    """Return the part of each of the private `data`, -1 for those held out.

    Raises `TeacherError` when a part's teacher is missing, of other settings, or was trained on other data.
    """
    each, found = _each(settings), places(data, pate.parts, wanted(settings).holdout, settings.seed)
    for part in range(pate.parts):
        record = record_in(_folder(settings, part), each, _seed(settings, pate, part))
        if record.data_digest != digest_of(data.subset(found.ids(part))):
            raise TeacherError(
                f"{settings.name}: the private data are not those that part {part} was trained on",
                hint=RETRAIN,
            )
    return found


def _each(settings: SiteSettings) -> TrainTeacher:
    """What is trained on every part: the site's teacher, which holds out nothing of its part."""
    return wanted(settings).model_copy(update={"holdout": 0.0})


def _seed(settings: SiteSettings, pate: Pate, part: int) -> int:
    """The seed of a part's training, which other parts or another holdout change: a teacher is never taken for one of
    another division of the data."""
    return derive(settings.seed, f"pate of {pate.parts}, {wanted(settings).holdout} held out", part)


def _folder(settings: SiteSettings, part: int) -> Path:
    return settings.state / "privacy" / "pate" / f"{part:04d}"
