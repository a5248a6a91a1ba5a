"""From samples of a pool to the encoded rows of a question: what a site's teacher, coverage and taps say of them.

Lives here: which of them a question is about, in which bytes, and the batches they see. Does not live here: whether it
may leave and what left before (client/site, client/released).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import cast

import numpy as np
from numpy.typing import NDArray

from consilience.client.coverage import Coverage
from consilience.client.features import OpenTap, Together
from consilience.client.policy import RefusedError
from consilience.client.shaping import check_floor, shape, shape_odds
from consilience.client.teacher import MultiTeacher, Teacher
from consilience.common.encoding import (
    coverage_bytes,
    coverage_problem,
    encode,
    encode_coverage,
    encode_features,
    feature_bytes,
    named,
    row_bytes,
)
from consilience.common.errors import TeacherError
from consilience.common.pool import Pool
from consilience.common.preprocessing import Images
from consilience.common.protocol import LABEL_KINDS, Kind, Question
from consilience.common.settings import (
    CoverageEncoding,
    FeatureEncoding,
    SiteSettings,
)

Scores = Callable[[Images], NDArray[np.float32]]
"""(n, H, W, C) uint8 images -> (n, ...) float32. Raises `TeacherError`."""


class Encoder:
    """For one thread at a time: teachers may keep what one call leaves for the next."""

    def __init__(
        self,
        settings: SiteSettings,
        teacher: Teacher | MultiTeacher,
        coverage: Coverage | None,
        taps: tuple[OpenTap, ...],
    ) -> None:
        """`teacher` is what `settings.teacher.labels` says: a `MultiTeacher` where that is multi."""
        check_floor(settings.policy, len(teacher.classes))
        self.settings, self.teacher, self.coverage, self.taps = settings, teacher, coverage, taps
        self.kind: Kind = LABEL_KINDS[settings.teacher.labels]
        """What the teacher's answers are."""
        self.together = Together()

    def check_kind(self, kind: Kind) -> None:
        """Refuse to answer as the other kind of teacher would. Raises `RefusedError`."""
        if kind in LABEL_KINDS.values() and kind != self.kind:
            reasons: dict[Kind, str] = {
                "log-probs": "the site's teacher is multi-label: it tells log-odds of its labels",
                "log-odds": "the site's teacher has one label an image: it tells log-probabilities of its classes",
            }
            detail = f"asked for {kind}; teacher.labels is {self.settings.teacher.labels}"
            raise RefusedError("bad-question", reasons[kind], detail)

    def fingerprints(self, kind: Kind) -> tuple[str, ...]:
        """Return the fingerprints of what answers questions of a kind."""
        if kind == "features":
            return tuple(tap.card.fingerprint for tap in self.taps)
        answering = self.coverage if kind == "coverage" else self.teacher
        return () if answering is None else (answering.fingerprint,)

    def width(self, question: Question) -> int:
        """Return the bytes of one sample's answer."""
        if question.kind == "coverage":
            return coverage_bytes(cast(CoverageEncoding, question.encoding))
        if question.kind == "features":
            return feature_bytes(self._tap(question).card.values, cast(FeatureEncoding, question.encoding))
        return row_bytes(len(self.teacher.classes), question.encoding, odds=question.kind == "log-odds")

    def kept_as(self, question: Question) -> Question:
        """Return the question under the one name that its answer's bytes have: `top-K` of more classes is of all.

        By another name the same would be answered, and counted, anew: by a teacher that never says the same twice,
        with other probabilities.
        """
        return question.model_copy(update={"encoding": named(question.encoding, len(self.teacher.classes))})

    def try_teacher(self, pool: Pool, samples: int) -> None:
        """See that the teacher works on the first samples of a pool. Raises `RefusedError`."""
        for _ in self._score(pool, 0, np.ones(samples, np.bool_), self._told, "teacher"):
            pass

    def try_tap(self, pool: Pool, samples: int, tap: OpenTap) -> None:
        """See that a tap does. Raises `RefusedError`."""
        for _ in self._score(pool, 0, np.ones(samples, np.bool_), tap.values, f"tap {tap.card.name}"):
            pass

    def encoded(self, question: Question, pool: Pool, new: NDArray[np.bool_]) -> bytes:
        """Return the encoded rows of those samples of a question's range that the mask `new` chooses.

        An encoding is made of what the finest one allowed says, and tells nothing more.
        """
        policy = self.settings.policy
        if question.kind == "coverage":
            covered = self._score(pool, question.start, new, self._coverage_of, "coverage")
            wanted, most = cast(CoverageEncoding, question.encoding), policy.coverage_encodings[0]
            return b"".join(encode_coverage(rows, wanted, within=most) for rows in covered)
        if question.kind == "features":
            tap = self._tap(question)
            told = self._score(pool, question.start, new, partial(self.together.values, tap), f"tap {tap.card.name}")
            form, finest = cast(FeatureEncoding, question.encoding), policy.features.encodings[0]
            return b"".join(encode_features(rows, form, within=finest) for rows in told)
        scored = self._score(pool, question.start, new, self._told, "teacher")
        odds = question.kind == "log-odds"
        return b"".join(encode(rows, question.encoding, odds=odds, within=policy.encodings[0]) for rows in scored)

    def _score(
        self, pool: Pool, start: int, new: NDArray[np.bool_], scores: Scores, what: str
    ) -> Iterator[NDArray[np.float32]]:
        """Yield, batch by batch, what `scores`, named `what`, gives as it may leave: (b, ...) float32.

        Of the samples from `start` on, for those that the mask `new` (n,) chooses. Raises `RefusedError`.
        """
        size, stop = self.settings.batch_size, start + len(new)
        for first in range(start - start % size, stop, size):
            last = min(first + size, len(pool))
            low, high = max(start, first), min(stop, last)
            if not new[low - start : high - start].any():
                continue
            try:
                rows = scores(pool.read(first, last))
            except TeacherError as error:
                raise RefusedError("teacher-failed", f"the site's {what} gave no usable answer") from error
            yield np.asarray(rows[low - first : high - first], np.float32)[new[low - start : high - start]]

    def _told(self, images: Images) -> NDArray[np.float32]:
        """Return the teacher's (n, classes) log-probabilities, or log-odds, as the policy lets them leave.

        Raises `TeacherError`.
        """
        if self.kind == "log-odds":
            return shape_odds(cast(MultiTeacher, self.teacher).log_odds(images), self.settings.policy)
        return shape(cast(Teacher, self.teacher).log_probs(images), self.settings.policy)

    def _coverage_of(self, images: Images) -> NDArray[np.float32]:
        """Return (n,) coverage of one batch. Raises `TeacherError` when it is none."""
        assert self.coverage is not None  # the question names its fingerprint
        scores = np.asarray(self.coverage.scores(images))
        if scores.shape != (len(images),) or scores.dtype.kind != "f":
            raise TeacherError(f"Coverage of {len(images)} images has shape {scores.shape} and type {scores.dtype}")
        if problem := coverage_problem(scores):
            raise TeacherError(f"Coverage: {problem}")
        return scores.astype(np.float32)

    def _tap(self, question: Question) -> OpenTap:
        return next(tap for tap in self.taps if tap.card.fingerprint == question.teacher)
