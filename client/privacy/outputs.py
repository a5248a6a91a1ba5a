"""A teacher whose whole answers are noisy: it protects the model, and says nothing of a record.

Does not live here: mechanisms that protect a record (pate, dp_sgd).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from consilience.client.privacy.noise import Secret, on_grid
from consilience.client.teacher.protocol import Teacher
from consilience.common.preprocessing import Images
from consilience.common.settings import OutputNoise
from consilience.common.simplex import as_answer, project

STEPS = 256
"""Steps of a probability from 0 to 1. Half a step is less than the least noise there is, and thousands of times more
than what a batch of another size changes."""


@dataclass(frozen=True)
class NoisyTeacher:
    """`teacher` behind Gaussian noise on its probabilities, put back on the simplex.

    Two rows of probabilities lie sqrt(2) apart at most, whatever the models that they come from.
    """

    teacher: Teacher
    settings: OutputNoise
    secret: Secret

    @property
    def classes(self) -> tuple[str, ...]:
        """See `Teacher.classes`."""
        return self.teacher.classes

    @property
    def fingerprint(self) -> str:
        """See `Teacher.fingerprint`, but under the site's secret: a digest of the model would let a guess be tried."""
        return self.secret.digest(self._purpose)

    @property
    def _purpose(self) -> list[object]:
        return [self.settings.model_dump(mode="json", exclude={"delta"}), self.teacher.fingerprint]

    def log_probs(self, images: Images) -> NDArray[np.float32]:
        """See `Teacher.log_probs`."""
        rows = self.teacher.log_probs(images)
        if not len(rows):
            return rows
        told = in_steps(rows)
        noise = self.settings.sigma * self.secret.normal(self._purpose, beside(images, told), rows.shape[1])
        return as_answer(project(on_grid(project(told.astype(np.float64) / STEPS) + noise)))


def in_steps(rows: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return (n, K) the probabilities of log-probabilities, each rounded to a number of `STEPS`.

    Noise is put on these, and follows from these. The same model tells the same image with other last digits in a batch
    of another size; were noise to follow from them, it would be drawn twice, and averaging would gain. The rounded rows
    are put on the simplex again, so that no two of them lie further apart than sqrt(2).
    """
    probs = np.exp(rows.astype(np.float64))
    steps: NDArray[np.uint16] = np.rint(probs / probs.sum(axis=1, keepdims=True) * STEPS).astype(np.uint16)
    return steps


def beside(images: Images, answers: NDArray[np.uint16] | NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return (n, bytes): each image's bytes and those of the model's (n, K) answer to it, which noise follows from.

    A model may change behind its fingerprint, as a callable's code or the files that it reads do. Two answers under one
    noise would then tell the difference of the two models, free of any; so another answer has noise of its own.
    """
    told = np.ascontiguousarray(answers, answers.dtype.newbyteorder("<")).view(np.uint8)
    return np.concatenate([images.reshape(len(images), -1), told], axis=1)
