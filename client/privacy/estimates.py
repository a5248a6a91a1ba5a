"""How often the labels that a mechanism lets out would be right, before any leaves.

Lives here: what there is to measure on, and the measurement, or the assumption that stands for it. Does not live here:
the noise that epsilon needs (plan). Accuracies here are not private: they are for the site's own eyes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from consilience.client.privacy import votes
from consilience.client.privacy.pate import PateTeacher, load_pate
from consilience.client.privacy.records import places
from consilience.client.teacher.kept_training import wanted
from consilience.client.teacher.private_samples import HOLDOUT, present_classes, private_data, split
from consilience.client.teacher.protocol import Teacher
from consilience.common.data import ImageData
from consilience.common.errors import TeacherError
from consilience.common.seeds import derive
from consilience.common.settings import DpSgd, OutputNoise, Pate, SiteSettings

MOST = 2_000
"""Held-out samples that are scored; more would say little more."""
REPEATS = 10
"""Draws of noise for each."""
ASSUMED = 0.7
"""How often a teacher is taken to be right where none was measured."""
ASSUMED_SAMPLES = 2_000


@dataclass(frozen=True)
class Value:
    """What labels are worth: `accuracy` of those that say something, the share `answered` that does, and `basis`."""

    accuracy: float | None
    answered: float | None
    basis: str


@dataclass(frozen=True)
class Held:
    """What a site has to measure on.

    `records` that a teacher learns from, about; `votes` and `probs` of the parts, (m, K) sums, with `truth` (m,); the
    whole teacher's probabilities `whole` (w, K) with `whole_truth` (w,). None where there are none.
    """

    classes: int
    records: int | None
    votes: NDArray[np.float64] | None = None
    probs: NDArray[np.float64] | None = None
    truth: NDArray[np.int64] | None = None
    whole: NDArray[np.float64] | None = None
    whole_truth: NDArray[np.int64] | None = None
    trained: float | None = None
    """Accuracy of the teacher that dp-sgd trained."""

    @property
    def whole_accuracy(self) -> float | None:
        """How often the teacher of all the data is right on its own held-out samples."""
        if self.whole is None or self.whole_truth is None:
            return None
        return float(np.mean(self.whole.argmax(axis=1) == self.whole_truth))


def look(settings: SiteSettings) -> Held:
    """Return what the site has. Raises `DataError`, and `TeacherError` without data that can be trained on."""
    if settings.teacher.kind != "train":
        return Held(len(settings.teacher.classes), None)
    data = private_data(settings)
    labels, classes = present_classes(data)
    holdout = wanted(settings).holdout
    found = Held(len(classes), max(1, round(len(data) * (1 - holdout))))
    if isinstance(settings.privacy, Pate):
        return _with_parts(settings, settings.privacy, data, labels, found)
    if isinstance(settings.privacy, DpSgd):
        return _with_trained(settings, settings.privacy, found)
    from consilience.client.teacher.trained import load_trained  # which brings torch

    try:
        teacher = load_trained(settings)
    except TeacherError:
        return found
    ids = split(labels, holdout, derive(settings.seed, HOLDOUT))[1][:MOST]
    if not len(ids):
        return found
    whole = np.exp(_rows(teacher, data, ids, settings.batch_size))
    return Held(found.classes, found.records, whole=whole, whole_truth=labels[ids])


def estimate_votes(settings: Pate, held: Held) -> Value:
    """Return what labels of a vote are worth: simulated with the parts' own votes, where there are any."""
    sums = held.probs if settings.answer == "average" else held.votes
    if sums is not None and held.truth is not None:
        truth, basis = held.truth, f"the parts' votes on {len(sums):,} held-out private images"
    else:
        right = held.whole_accuracy
        sums = _assumed_votes(settings.parts, held.classes, ASSUMED if right is None else right)
        truth = np.zeros(len(sums), np.int64)
        basis = (
            f"assumed: every part is right {ASSUMED if right is None else right:.0%} of the time"
            + ("" if right is None else ", as the teacher of all the data is")
            + ", independently of the others; parts know less and err together, so expect less"
        )
    random = np.random.default_rng(0)
    right_ones, told = 0, 0
    for _ in range(REPEATS):
        normal = random.standard_normal((len(sums), votes.draws(settings, held.classes)))
        probs = votes.answers(settings, sums, normal)
        # The uniform distribution says nothing; with one class alone it says all there is.
        says = np.ones(len(probs), np.bool_) if settings.threshold is None else probs.max(axis=1) == 1
        right_ones += int(np.sum((probs.argmax(axis=1) == truth) & says))
        told += int(np.sum(says))
    return Value(right_ones / told if told else None, told / (REPEATS * len(sums)), basis)


def estimate_outputs(settings: OutputNoise | None, held: Held) -> Value:
    """Return what labels of the whole teacher are worth, behind noise or, for None, without."""
    random = np.random.default_rng(0)
    if held.whole is not None and held.whole_truth is not None:
        probs, truth = held.whole, held.whole_truth
        basis = f"the teacher's answers on {len(probs):,} held-out private images"
    elif settings is None:
        return Value(None, None, "known once the teacher is trained or judged")
    else:
        truth = np.zeros(ASSUMED_SAMPLES, np.int64)
        wrong = np.minimum(random.integers(1, max(2, held.classes), ASSUMED_SAMPLES), held.classes - 1)
        probs = np.eye(held.classes)[np.where(random.random(ASSUMED_SAMPLES) < ASSUMED, 0, wrong)]
        basis = f"assumed: the teacher is certain, and right {ASSUMED:.0%} of the time; a real one is less certain"
    sigma = 0.0 if settings is None else settings.sigma
    right = [
        float(np.mean((probs + sigma * random.standard_normal(probs.shape)).argmax(axis=1) == truth))
        for _ in range(REPEATS)
    ]
    return Value(float(np.mean(right)), 1.0, basis)


def _assumed_votes(parts: int, classes: int, right: float) -> NDArray[np.float64]:
    """Return (n, K) votes of parts that are `right` so often, independently; class 0 is the true one."""
    chances = np.full(classes, (1 - right) / max(1, classes - 1))
    chances[0] = right if classes > 1 else 1.0
    return np.random.default_rng(1).multinomial(parts, chances, ASSUMED_SAMPLES).astype(np.float64)


def _with_parts(settings: SiteSettings, pate: Pate, data: ImageData, labels: NDArray[np.int64], found: Held) -> Held:
    try:
        teacher = load_pate(settings, pate)
    except TeacherError:
        return found
    ids = places(data, pate.parts, wanted(settings).holdout, settings.seed).ids(-1)[:MOST]
    if not len(ids):
        return found
    sums = {form: _sums(teacher, pate, form, data, ids, settings.batch_size) for form in ("arg-max", "average")}
    return Held(found.classes, found.records, votes=sums["arg-max"], probs=sums["average"], truth=labels[ids])


def _sums(
    teacher: PateTeacher, pate: Pate, form: str, data: ImageData, ids: NDArray[np.int64], batch: int
) -> NDArray[np.float64]:
    one = pate.model_copy(update={"answer": form})
    return np.concatenate(
        [
            votes.sums(one, (part.log_probs(images) for part in teacher.parts))
            for images in (data.read(ids[first : first + batch]) for first in range(0, len(ids), batch))
        ]
    )


def _with_trained(settings: SiteSettings, private: DpSgd, found: Held) -> Held:
    from consilience.client.privacy.dp_sgd import dp_record  # which brings torch

    try:
        return Held(found.classes, found.records, trained=dp_record(settings, private).holdout_accuracy)
    except TeacherError:
        return found


def _rows(teacher: Teacher, data: ImageData, ids: NDArray[np.int64], batch: int) -> NDArray[np.float64]:
    parts = [teacher.log_probs(data.read(ids[first : first + batch])) for first in range(0, len(ids), batch)]
    return np.concatenate(parts).astype(np.float64)
