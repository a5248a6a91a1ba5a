"""Shadow teachers: what the site's teacher might have been, had other halves of the private data been learned from.

Lives here: training them as the site's teacher was, behind the same mechanism, map and policy, and their scores. Does
not live here: what scores are made of (lira, losses).

A shadow is a site of its own in a folder of the audit: other seed, other noise, nothing held out. It never answers
anybody. Where an audit is interrupted, the shadows that are trained stay, and the next one goes on from there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from consilience.client.audit.answers import audit_secret, in_batches, single_teacher, under
from consilience.client.audit.lira import halves
from consilience.client.audit.losses import confidence
from consilience.client.audit.members import Known
from consilience.client.privacy import NoisyTeacher, load_private, train_private
from consilience.client.privacy.noise import Secret
from consilience.client.site import Site
from consilience.client.teacher import CalibratedTeacher, Teacher
from consilience.client.teacher.kept_training import wanted
from consilience.client.teacher.protocol import SMALLEST_LOG_PROB
from consilience.common.epochs import EpochRecord
from consilience.common.identity import write_secret
from consilience.common.preprocessing import Images
from consilience.common.seeds import derive
from consilience.common.settings import SiteSettings


@dataclass(frozen=True)
class Shadows:
    """`scores` (S, n) float64: each shadow's confidence in the true class of `Known.ids`; `inside` (S, n) bool: whether
    it learned from the image."""

    scores: NDArray[np.float64]
    inside: NDArray[np.bool_]


def train_shadows(
    site: Site, known: Known, count: int, folder: Path, on_epoch: Callable[[EpochRecord], None] | None = None
) -> Shadows:
    """Train `count` shadows of the site's teacher in `folder`, each on half of the known images, and ask them.

    Raises what `train_private` raises.
    """
    ids, inside = known.ids, halves(len(known.ids), count, site.settings.seed)
    scores = np.empty(inside.shape)
    for number in range(count):
        settings = _settings(site.settings, number, folder)
        train_private(settings, on_epoch, known.data.subset(np.sort(ids[inside[number]])))
        core = load_private(settings)
        teacher = single_teacher(site)
        whole = core if core.classes == teacher.classes else _Widened(core, teacher.classes)
        shadow = _in_place(teacher, whole, _secret(site.settings, number))
        for part, rows in in_batches(shadow, known.data, ids, site.settings):
            scores[number, part] = confidence(rows, known.labels[ids[part]])
    return Shadows(scores, inside)


def _settings(settings: SiteSettings, number: int, folder: Path) -> SiteSettings:
    """Return a shadow's settings, and give it a secret where its training needs one."""
    shadow = settings.model_copy(
        update={
            "state": folder / f"{number:03d}",
            "seed": derive(settings.seed, "shadow", number),
            "teacher": wanted(settings).model_copy(update={"holdout": 0.0}),
        }
    )
    path = shadow.state / "privacy" / "noise.key"
    if settings.privacy.mechanism != "none" and not path.exists():
        write_secret(path, _secret(settings, number).key)
    return shadow


def _secret(settings: SiteSettings, number: int) -> Secret:
    """Return a shadow's secret; without a mechanism there is none to keep and none to make."""
    if settings.privacy.mechanism == "none":
        return Secret(b"")
    return audit_secret(settings, f"shadow {number}")


def _in_place(teacher: Teacher, core: Teacher, secret: Secret) -> Teacher:
    """Return `teacher` with `core` in place of what was trained: behind the same map and the same kind of noise."""
    if isinstance(teacher, CalibratedTeacher):
        return dataclasses.replace(teacher, teacher=_in_place(teacher.teacher, core, secret))
    if isinstance(teacher, NoisyTeacher):
        return under(dataclasses.replace(teacher, teacher=_in_place(teacher.teacher, core, secret)), secret)
    return core


@dataclass(frozen=True)
class _Widened:
    """A shadow that saw no image of some of `classes`: it gives these the least probability there is."""

    teacher: Teacher
    classes: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """See `Teacher.fingerprint`."""
        return self.teacher.fingerprint

    def log_probs(self, images: Images) -> NDArray[np.float32]:
        """See `Teacher.log_probs`."""
        rows = np.full((len(images), len(self.classes)), SMALLEST_LOG_PROB, np.float32)
        rows[:, [self.classes.index(name) for name in self.teacher.classes]] = self.teacher.log_probs(images)
        return rows
