"""What a head is fed: one vector an image, from the site's own teacher.

Lives here: the teacher's features and its outputs as vectors, and when it gives none. Does not live here: what is
learned from vectors (head, by_heads) and how a network comes by its features (client/teacher/torch_modules).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from consilience.client.teacher import AnyTeacher, CalibratedMulti
from consilience.client.teacher.protocol import Scoring
from consilience.client.teacher.torch_modules import NetworkScores
from consilience.common.errors import CoverageError, TeacherError
from consilience.common.preprocessing import Images
from consilience.common.settings import SiteSettings

LEAST_LOG_PROB = -30.0
"""What a smaller log-probability of a teacher counts as, about 1e-13: one that says 0 would outweigh all others."""


@dataclass(frozen=True)
class Vectors:
    """Vectors of a teacher: `teacher` is the fingerprint of all that decides one, `size` how many numbers it has."""

    teacher: str
    size: int
    compute: Callable[[Images], NDArray[np.float32]]

    def __call__(self, images: Images) -> NDArray[np.float32]:
        """Return (n, size) finite float32 for (n, H, W, C) uint8. Raises `TeacherError`."""
        if not len(images):
            return np.empty((0, self.size), np.float32)
        try:
            found = self.compute(images)
        except (RuntimeError, ValueError) as error:
            raise TeacherError(
                f"the teacher gives no features of {len(images)} images of shape {images.shape[1:]}",
                hint="Set coverage.family: outputs",
            ) from error
        if not np.isfinite(found).all():
            raise TeacherError(
                f"the teacher gives features that are not finite for {len(images)} images",
                hint="Set coverage.family: outputs",
            )
        return found


def vectors_of(settings: SiteSettings, teacher: AnyTeacher) -> Vectors:
    """Return the vectors that `settings.coverage.family` names, `features` or `outputs`, of the site's `teacher`.

    Features do not go through the calibration map, outputs do: another map is another teacher for these alone. Raises
    `CoverageError` for features of a teacher that has none.
    """
    if settings.coverage.family == "outputs":
        return Vectors(teacher.fingerprint, len(teacher.classes), lambda images: _outputs(teacher, images))
    behind = teacher.teacher
    scores = behind.scores if isinstance(behind, Scoring) else None
    size = scores.feature_size if isinstance(scores, NetworkScores) else None
    if not isinstance(scores, NetworkScores) or size is None:
        raise CoverageError(
            f"{settings.name}: coverage.family is 'features', and no linear layer gives the teacher's scores",
            hint="Set coverage.family: outputs, which works with any teacher",
        )
    return Vectors(behind.fingerprint, size, scores.features)


def _outputs(teacher: AnyTeacher, images: Images) -> NDArray[np.float32]:
    if isinstance(teacher, CalibratedMulti):
        return np.clip(teacher.log_odds(images), np.float32(LEAST_LOG_PROB), np.float32(-LEAST_LOG_PROB))
    found: NDArray[np.float32] = np.maximum(teacher.log_probs(images), np.float32(LEAST_LOG_PROB))
    return found
