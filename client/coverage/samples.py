"""Which images coverage is learned from.

Lives here: which private images are the site's, which are held out, which of the pool are read, its halves, and in what
shares they make an epoch. Does not live here: what is learned from them (learning).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from consilience.common.data import ImageData
from consilience.common.errors import CoverageError
from consilience.common.files import sha256
from consilience.common.pool import Pool
from consilience.common.preprocessing import Images, fit_shape
from consilience.common.seeds import derive
from consilience.common.settings import Preprocessing, SiteSettings

LEAST_PRIVATE = LEAST_POOL = 200
"""Images below which there is nothing to learn from, and too few to calibrate on."""
ONE_HELD_OUT_IN = 5
"""Of so many private images the network does not learn from one: prior and calibration come from these."""
MOST_POOL = 200_000
"""Pool images that are learned from, drawn by the seed where there are more."""
MOST_COPIES = 0.2
"""Share of the private images that may be in the pool too, byte for byte: the network is told of each copy that it is
the site's own, and that it may be anybody's."""
LEAST_SHARE = 0.25
"""Private images, or the pool's, are repeated until they are this share of an epoch: every batch needs some of both."""


class AbstainError(Exception):
    """There is too little to learn from; the text says what is missing."""


@dataclass(frozen=True)
class Samples:
    """What a training reads."""

    private: Images
    """Private images that are learned from, (n, H, W, C) uint8 in the pool's shape."""
    labels: NDArray[np.int64]
    """Theirs, (n,) in [0, classes)."""
    classes: int
    public: Images
    """The pool's images, (m, H, W, C) uint8."""
    half: NDArray[np.int64]
    """Which half of the pool each is in, (m,) 0 or 1; copies of an image are in the same."""
    held_out: Images
    """Private images that are not learned from, in the pool's shape."""
    weights: NDArray[np.float64] | None
    """As `class_weights` gives them."""
    held_out_labels: NDArray[np.int64]
    held_out_half: NDArray[np.int64]
    """As `half`, of those held out."""

    @property
    def held_out_weights(self) -> NDArray[np.float64] | None:
        """How much each held-out image counts; None: all the same."""
        return None if self.weights is None else self.weights[self.held_out_labels]

    def epoch(self, public: Images) -> tuple[Images, NDArray[np.int64]]:
        """Return private images, then these of the pool's, either repeated where it is the smaller; and labels.

        The labels (k,) are those of the first k images, the private ones.
        """
        privates, publics = repeats(len(self.private), len(public))
        return np.concatenate([self.private] * privates + [public] * publics), np.tile(self.labels, privates)


def mine(settings: SiteSettings, data: ImageData) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Return the ids (n,) of private images of the teacher's classes, their labels (n,) in [0, K), and K.

    Data without labels is one class: all of it is the site's. Of data with any number of labels an image it is the
    images to which at least one of the teacher's applies, as one class. Raises `CoverageError` when no image is of a
    class that the teacher knows.
    """
    if data.many is not None:
        return _labelled(settings, data, data.many)
    if data.labels is None:
        return np.arange(len(data)), np.zeros(len(data), np.int64), 1
    known = set(data.class_names if settings.teacher.kind == "train" else settings.teacher.classes)
    wanted = np.array([k for k in np.unique(data.labels) if data.class_names[k] in known], np.int64)
    ids = np.flatnonzero(np.isin(data.labels, wanted))
    if not len(ids):
        raise CoverageError(
            f"{settings.name}: no private image is of a class that the teacher knows; the data have: "
            f"{', '.join(data.class_names[:20])}",
            hint="Name the teacher's classes as the data do, or set policy.coverage: off",
        )
    return ids, np.searchsorted(wanted, data.labels[ids]), len(wanted)


def _labelled(
    settings: SiteSettings, data: ImageData, many: NDArray[np.int8]
) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    known = set(data.class_names if settings.teacher.kind == "train" else settings.teacher.classes)
    columns = [k for k, name in enumerate(data.class_names) if name in known]
    ids = np.flatnonzero((many[:, columns] > 0).any(axis=1))
    if not len(ids):
        raise CoverageError(
            f"{settings.name}: none of the teacher's labels applies to any private image; the data have: "
            f"{', '.join(data.class_names[:20])}",
            hint="Name the labels as the data do, or set policy.coverage: off",
        )
    return ids, np.zeros(len(ids), np.int64), 1


def gather(
    settings: SiteSettings,
    data: ImageData,
    ids: NDArray[np.int64],
    labels: NDArray[np.int64],
    classes: int,
    pool: Pool,
) -> Samples:
    """Read the private images `ids` (n,) with `labels` (n,) in [0, classes), and the pool's.

    Raises `AbstainError` where too few of the private images differ, `CoverageError` when too many of them are in the
    pool, `DataError`, `PoolError`.
    """
    shape, seed = shape_of(pool), derive(settings.seed, "coverage holdout")
    every = fit_shape(data.read(ids), shape)
    told = digests(every)
    first = {digest: at for at, digest in reversed(list(enumerate(told)))}
    # Copies of an image go the same way: what is held out must not have been learned from.
    image = np.array([first[digest] for digest in told])
    single = np.unique(image)
    if len(single) < LEAST_PRIVATE:
        raise AbstainError(
            f"{len(ids):,} private images of its classes are {len(single):,} different ones, too few: {LEAST_PRIVATE} "
            "are needed"
        )
    held_out = np.isin(image, single[hold_out(labels[single], seed)[1]])
    of_pool = some(len(pool), MOST_POOL, derive(settings.seed, "coverage pool"))
    public = pool.take(of_pool)
    of_public = digests(public)
    refuse_copies(settings, told, of_public, len(of_pool) / len(pool))
    # Of different images in the order of their digests, which says nothing about them, every other one.
    numbers = np.array([int(digest[:15], 16) for digest in told + of_public])  # a tenth of the text's memory
    halves = np.unique(numbers, return_inverse=True)[1] % 2
    return Samples(
        private=every[~held_out],
        labels=labels[~held_out],
        classes=classes,
        public=public,
        half=halves[len(told) :],
        held_out=every[held_out],
        weights=class_weights(settings, labels, classes),
        held_out_labels=labels[held_out],
        held_out_half=halves[: len(told)][held_out],
    )


def class_weights(settings: SiteSettings, labels: NDArray[np.int64], classes: int) -> NDArray[np.float64] | None:
    """Return how much a private image of each class (K,) counts, 1 on average over those of `labels` (n,) in [0, K).

    None where all count the same: `coverage.shares` is `private`, or the classes have as many images each.
    """
    counts = np.bincount(labels, minlength=classes)
    if settings.coverage.shares == "private" or (counts == counts[0]).all():
        return None
    return len(labels) / (np.count_nonzero(counts) * np.maximum(counts, 1.0))


def hold_out(labels: NDArray[np.int64], seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return sorted ids to learn from and to hold out: every fifth, classes in proportion.

    Not a share of each class, rounded: of many classes with two images each nothing would be held out.
    """
    random = np.random.default_rng(seed)
    shuffled, order = random.permutation(len(labels)), random.permutation(labels.max(initial=0) + 1)
    by_class = shuffled[np.argsort(order[labels[shuffled]], kind="stable")]
    held_out = np.zeros(len(labels), np.bool_)
    held_out[by_class[ONE_HELD_OUT_IN // 2 :: ONE_HELD_OUT_IN]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def some(count: int, most: int, seed: int) -> NDArray[np.int64]:
    """Return sorted ids of `count` samples, or of `most` of them drawn by the seed."""
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).permutation(count)[:most])


def shape_of(pool: Pool) -> Preprocessing:
    """Return the pool's size and channels, which private images are brought into."""
    return Preprocessing(size=pool.shape[:2], channels=1 if pool.shape[2] == 1 else 3)


def repeats(private: int, public: int) -> tuple[int, int]:
    """Return how often each of so many private images and pool images is in an epoch."""
    least = LEAST_SHARE / (1 - LEAST_SHARE)
    return max(1, round(least * public / max(private, 1))), max(1, round(least * private / max(public, 1)))


def digests(images: Images) -> list[str]:
    """Return the SHA-256 of each image's bytes."""
    return [sha256(image.tobytes()) for image in images]


def refuse_copies(settings: SiteSettings, private: list[str], public: list[str], drawn: float) -> None:
    """Raise `CoverageError` when too many of the private images' digests are among the pool's.

    `public` are those of a share `drawn`, in (0, 1], of the pool: of copies, so many would be among them.
    """
    copies = set(public)
    shared = min(1.0, float(np.mean([digest in copies for digest in private])) / drawn)
    if shared > MOST_COPIES:
        raise CoverageError(
            f"{settings.name}: {shared:.0%} of the private images are in the pool, byte for byte; allowed: "
            f"{MOST_COPIES:.0%}. Private data that is public says nothing about which pool images are of its classes",
            hint="Name data that is not in the pool, or set policy.coverage: off",
        )
