"""Learning a site's coverage: private data against a pool.

Lives here: the choice of the family, when the site had better abstain, what is written to state/coverage, what the site
is warned of. Does not live here: the families (by_network, by_heads), which images are learned from (samples), the
share of the pool that is the site's (prior), the map from scores to coverage (calibrate), use (learned).

Private data of site i follows p(x | Y in L_i), the pool p(x). By Bayes their ratio is P(Y in L_i | x) / P(Y in L_i):
coverage, up to one constant that class-prior estimation gives (methods of positive and unlabelled learning).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from consilience.client.coverage.by_heads import learn_heads
from consilience.client.coverage.by_network import learn_network
from consilience.client.coverage.calibrate import at_level, fit_platt
from consilience.client.coverage.found import Found
from consilience.client.coverage.learned import (
    FOLDER,
    MODEL,
    CoverageRecord,
    is_model,
    read_record,
    settings_digest,
)
from consilience.client.coverage.samples import LEAST_POOL, LEAST_PRIVATE, AbstainError, mine
from consilience.client.coverage.vectors import vectors_of
from consilience.client.teacher import load_any
from consilience.client.teacher.private_samples import digest_of
from consilience.common.data import ImageData, open_data
from consilience.common.epochs import EpochRecord
from consilience.common.errors import CoverageError
from consilience.common.files import lock, make_private, sha256_file, write_json
from consilience.common.nets import save_model
from consilience.common.pool import Pool
from consilience.common.settings import SiteSettings

STYLE = 0.98
"""With a higher chance than this that a private image has a higher score than one of the pool, the network has not
seen classes but where the images come from, or none of the pool is of the site's classes."""
BLIND = 0.6
"""With a lower AUROC of "mine", as far as it can be known, coverage tells classes apart hardly better than a coin."""


def learn_coverage(
    settings: SiteSettings,
    on_epoch: Callable[[EpochRecord], None] | None = None,
    on_images: Callable[[int, int], None] | None = None,
    on_pretraining: Callable[[EpochRecord], None] | None = None,
) -> CoverageRecord:
    """Learn the site's coverage of its first pool; resumes, and returns at once when it is learned.

    `on_epoch` is told of every epoch of a network, `on_pretraining` of those before, in which it learns the site's
    classes, and `on_images`, for heads, how many images of how many the teacher has seen just now. A site with too
    little to learn from abstains: the record says why. Raises `CoverageError` without private data or a pool, when the
    private data is the pool, when training fails, and for features of a teacher that has none; `DataError`,
    `PoolError`, `SettingsError`, `MissingExtraError`, `StorageError`, `RunError` when another process is at it, and,
    where heads need the teacher, `TeacherError`.
    """
    if settings.data is None or not settings.pools:
        field = "data" if settings.data is None else "pools"
        raise CoverageError(
            f"{settings.name}: field {field!r} is not given, and coverage is learned from private data and a pool",
            hint=f"Set {field} in the site's settings, or policy.coverage: off",
        )
    data, pool = open_data(settings.data), Pool.open(settings.pools[0])
    digest = digest_of(data)
    folder = settings.state / FOLDER
    make_private(settings.state)
    with lock(folder):
        done = read_record(settings)
        family = settings.coverage.family
        vectors = None if family == "network" else vectors_of(settings, load_any(settings))
        about: dict[str, Any] = {"settings": settings_digest(settings), "data": digest, "pool": pool.digest}
        about |= {"family": family, "architecture": settings.coverage.architecture if vectors is None else ""}
        about |= {"teacher": "" if vectors is None else vectors.teacher}
        if done is not None and about.items() <= vars(done).items() and is_model(settings, done):
            return done
        pool.verify()
        try:
            private = _enough(settings, data, pool)
            about |= {"classes": private[2]}
            if vectors is None:
                found, used = learn_network(settings, data, private, pool, on_epoch, on_pretraining)
                about |= {"preprocessing": used}
            else:
                found = learn_heads(settings, data, digest, private, pool, vectors, on_images)
            record = _record(settings, about, found)
        except AbstainError as reason:
            record = CoverageRecord(**about, abstains=str(reason))
        write_json(folder / "coverage.json", record.model_dump(mode="json"))  # last: it speaks of the model
        return record


def _enough(settings: SiteSettings, data: ImageData, pool: Pool) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Return what `mine` returns. Raises `AbstainError` when there is too little to learn from."""
    ids, labels, classes = mine(settings, data)
    if len(ids) < LEAST_PRIVATE or len(pool) < LEAST_POOL:
        raise AbstainError(
            f"{len(ids):,} private images of its classes and {len(pool):,} of the pool are too few: "
            f"{LEAST_PRIVATE} and {LEAST_POOL} are needed"
        )
    return ids, labels, classes


def _record(settings: SiteSettings, about: dict[str, Any], found: Found) -> CoverageRecord:
    """Write the model, calibrate, and say all."""
    path = settings.state / MODEL
    save_model(path, found.model)
    fitted = fit_platt(found.held, found.of_pool, found.prior, found.weights)
    record = CoverageRecord(
        **about,
        model=sha256_file(path),
        calibration=at_level(fitted, found.of_pool, found.prior),
        prior=found.prior,
        held_out=len(found.held),
        private_over_pool=found.private_over_pool,
    )
    return record.model_copy(update={"warnings": _warnings(record)})


def _warnings(record: CoverageRecord) -> tuple[str, ...]:
    """Return what the site should know of coverage that was learned; empty where nothing is odd."""
    found = []
    if record.private_over_pool > STYLE:
        found.append(
            "private and pool images can be told apart nearly always: the pool has hardly any image of the site's "
            "classes, or the two differ in how the images were made, and coverage then speaks of that"
        )
    if record.auroc is not None and record.auroc < BLIND:
        found.append("private images and the rest of the pool cannot be told apart: coverage says little")
    return tuple(found)
