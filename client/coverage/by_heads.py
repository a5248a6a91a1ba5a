"""Coverage by heads on the vectors that the site's teacher gives: families `features` and `outputs`.

Lives here: which images' vectors are read, which scores prior and calibration may use, and a new image's score. Does
not live here: the heads (head), vectors (vectors), what is written (learning).

A teacher is surer of images that it was trained on, so their scores are higher than those of new images. The heads
learn from them all the same: what tells the site's classes from others is there too. But prior and calibration are
fitted to the scores of private images that are new to the teacher as well as to their head: of a trained teacher, those
that `teacher.holdout` kept out of its training. Of a hosted one it is not known, and all private images count as new.

Time: one pass of private and pool images through the teacher; then the heads, `EPOCHS` and a third more passes of their
vectors, seconds on one core for ten thousand images. Memory: the vectors as float32, at most `MOST_CELLS` numbers of
either sample, up to three times; of the images a batch. What is interrupted begins anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from consilience.client.coverage.found import Floats, Found
from consilience.client.coverage.head import EPOCHS, Heads, parts_of, train_heads
from consilience.client.coverage.prior import FIRST_PRIOR, auroc, estimate_prior
from consilience.client.coverage.samples import (
    MOST_POOL,
    AbstainError,
    class_weights,
    digests,
    refuse_copies,
    shape_of,
    some,
)
from consilience.client.coverage.vectors import Vectors
from consilience.client.teacher.private_samples import held_out, held_out_multi
from consilience.common.data import ImageData
from consilience.common.errors import CoverageError
from consilience.common.pool import Pool
from consilience.common.preprocessing import Images, fit_shape
from consilience.common.seeds import derive
from consilience.common.settings import SiteSettings

LEAST_NEW = 40
"""Private images that are new to the teacher, below which there are too few to calibrate on."""
MOST_CELLS = 50_000_000
"""Numbers in the vectors of private images, and of the pool's: of more images a part, drawn by the seed, is enough."""
_SAME = 1e-6
"""Vectors that differ by less than this are the same."""


def learn_heads(
    settings: SiteSettings,
    data: ImageData,
    digest: str,
    private: tuple[NDArray[np.int64], NDArray[np.int64], int],
    pool: Pool,
    vectors: Vectors,
    on_images: Callable[[int, int], None] | None = None,
) -> Found:
    """Return heads, scores (n,) of private images that are new to the teacher and (m,) of the pool's, and the prior.

    `digest` is that of `data`; `private` are ids, labels and the number of classes, as samples.mine gives them.
    `on_images` is told how many images of how many the teacher has seen just now. Raises `AbstainError` when too few
    private images are new to the teacher or its vectors are all the same, `CoverageError` when too many private images
    are in the pool, `TeacherError`, `DataError`, `PoolError`.
    """
    seed = derive(settings.seed, "coverage heads")
    most = max(1, MOST_CELLS // vectors.size)
    chosen = some(len(private[0]), most, derive(seed, "private"))
    ids, labels = private[0][chosen], private[1][chosen]
    new = np.ones(len(ids), np.bool_)
    if settings.teacher.kind == "train":
        unseen = held_out_multi if settings.teacher.labels == "multi" else held_out
        new = np.isin(ids, unseen(settings, data, digest)[0])
    if new.sum() < LEAST_NEW:
        raise AbstainError(
            f"{new.sum()} private images that the teacher was not trained on are too few: {LEAST_NEW} are needed, so "
            "raise teacher.holdout, or take coverage.family: network"
        )
    of_pool = some(len(pool), min(MOST_POOL, most), derive(settings.seed, "coverage pool"))
    total = len(ids) + len(of_pool)

    def shaped() -> Iterator[Images]:
        for part in _batches(ids, settings.batch_size):
            yield fit_shape(data.read(part), shape_of(pool))

    def compute(batches: Iterator[Images], count: int) -> tuple[NDArray[np.float32], list[str]]:
        found = np.empty((count, vectors.size), np.float32)
        told: list[str] = []
        for images in batches:
            found[len(told) : len(told) + len(images)] = vectors(images)
            told += digests(images)
            if on_images is not None:
                on_images(len(images), total)
        return found, told

    ours, our_digests = compute(shaped(), len(ids))
    theirs, their_digests = compute((pool.take(part) for part in _batches(of_pool, settings.batch_size)), len(of_pool))
    refuse_copies(settings, our_digests, their_digests, len(of_pool) / len(pool))
    if max(np.ptp(ours, axis=0).max(), np.ptp(theirs, axis=0).max(), np.abs(ours[0] - theirs[0]).max()) < _SAME:
        raise AbstainError(f"the teacher's {settings.coverage.family} are the same for every image")
    parts = parts_of(our_digests), parts_of(their_digests)
    by_class = class_weights(settings, labels, private[2])
    weights = None if by_class is None else by_class[labels[new]]

    def scores(prior: float, epochs: int) -> tuple[Heads, Floats, Floats]:
        heads = train_heads(ours, labels, private[2], theirs, parts, prior, seed, epochs, by_class)
        found = heads, heads.scores(ours[new], parts[0][new]), heads.scores(theirs, parts[1])
        if not (np.isfinite(found[1]).all() and np.isfinite(found[2]).all()):
            raise CoverageError(
                f"{settings.name}: heads on the teacher's {settings.coverage.family} give scores that are not finite",
                hint="Set coverage.family: network",
            )
        return found

    prior = settings.coverage.prior or estimate_prior(*scores(FIRST_PRIOR, EPOCHS // 3)[1:], weights)
    heads, held, pooled = scores(prior, EPOCHS)
    prior = settings.coverage.prior or estimate_prior(held, pooled, weights)
    return Found(heads, held, pooled, weights, prior, auroc(held, pooled, weights))


def score_by_heads(heads: Heads, vectors: Vectors, images: Images) -> Floats:
    """Return (n,) scores of (n, H, W, C) uint8: the log of the odds that an image's head gives to "one of mine".

    Raises `TeacherError`.
    """
    return heads.scores(vectors(images), parts_of(digests(images)))


def _batches(ids: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
    for first in range(0, len(ids), size):
        yield ids[first : first + size]
