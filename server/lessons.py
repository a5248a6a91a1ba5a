"""From a job's way of learning to its lesson.

Lives here: the choice. Does not live here: the lessons (server/learning, feature_learning, concentration, filtered),
and when they are given (server/job).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from consilience.common.cards import SiteCard
from consilience.common.pool import Pool
from consilience.common.settings import JobSettings
from consilience.server.answered import CoverageStores
from consilience.server.answers import AnswerStore
from consilience.server.chosen import Chosen
from consilience.server.concentration import concentration_lesson
from consilience.server.enrolment import StudentNeeds
from consilience.server.feature_learning import concatenated_loss, feature_lesson, joint_fit
from consilience.server.filtered import TailNeeds, filtered_lesson
from consilience.server.labelling import load_other
from consilience.server.labelling_top import Labels
from consilience.server.learning import (
    ByLoss,
    FingerprintedLoss,
    Lesson,
    direct_loss,
    soft_label_loss,
    soft_multi_loss,
)
from consilience.server.student.wanted import Wanted
from consilience.server.student_taps import StudentTaps
from consilience.server.tails import Tails


@dataclass(frozen=True)
class Learnt:
    """What a run has to learn from: `cards`, `stores` and `coverage` of the sites of `chosen.space`, in its order.

    `share` of the mass of unified `labels` (n, L) is on the student's classes; `key` names them. `samples` (m,):
    training's sample j is the pool's samples[j]; None: all are learnt from.
    """

    run: Path
    job: JobSettings
    pool: Pool
    chosen: Chosen
    share: float
    cards: Sequence[SiteCard]
    stores: Sequence[AnswerStore]
    coverage: CoverageStores
    labels: Labels
    key: str
    samples: NDArray[np.int64] | None


def student_needs(job: JobSettings, pool: Pool) -> StudentNeeds | None:
    """Return what the student needs of sites beside answers; None for nothing. Raises as what it makes."""
    if job.student.learning == "filtered":
        return TailNeeds(job, pool)
    return StudentTaps(job, pool) if job.asks_features else None


def lesson_of(learnt: Learnt, tails: Callable[[], Tails]) -> Lesson:
    """Return the lesson of a job. `tails`: the sites' last blocks, where they are learnt from.

    Raises what the lesson does that the settings name.
    """
    job, files = learnt.job, learnt.run / "labels"
    settings, stores, key, samples = job.student, learnt.stores, learnt.key, learnt.samples
    if settings.learning == "concentration":
        other = load_other(files)
        rest = (learnt.coverage, learnt.labels, key, samples, other)
        return concentration_lesson(files, job, learnt.chosen, _wanted(learnt), stores, *rest)
    loss = _loss(learnt)
    if settings.learning == "filtered":
        about = (learnt.chosen, learnt.cards, stores, tails(), learnt.pool, loss, samples, key)
        return filtered_lesson(files, job, *about)
    if job.asks_features:
        return feature_lesson(learnt.run, job, learnt.cards, learnt.pool, loss, samples)
    return ByLoss(loss, settings.model_copy(update={"fit": joint_fit(settings)}), job.seed)


def _wanted(learnt: Learnt) -> Wanted | None:
    return learnt.chosen.wanted(learnt.share, learnt.job.student.fit.batch_size)


def _loss(learnt: Learnt) -> FingerprintedLoss:
    """Return the loss of the scores. A student of branches has that of unified labels, if it has one at all."""
    job, space, files = learnt.job, learnt.chosen.space, learnt.run / "labels"
    settings, unify, stores, key, samples = job.student, job.unify, learnt.stores, learnt.key, learnt.samples
    wanted = _wanted(learnt)
    labels = learnt.labels
    assert isinstance(labels, np.ndarray)  # others are made for concentration alone
    if space.multi:
        return soft_multi_loss(labels, unify.temperature, key, samples, wanted)
    if settings.learns_labels or settings.learning == "filtered":
        return soft_label_loss(labels, unify.temperature, key, samples, load_other(files), wanted)
    if settings.target == "concatenated":
        return concatenated_loss(files, job, space, stores, key, samples, wanted)
    return direct_loss(
        files,
        settings.learning,
        space,
        stores,
        [unify.weights.get(site, 1.0) for site in space.sites],
        unify.temperature,
        key,
        samples,
        learnt.coverage,
        [unify.strength_of(site) for site in space.sites],
        wanted,
    )
