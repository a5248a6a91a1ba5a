"""Learning a site's coverage: private data against a pool.

Lives here: the choice of the family, the order of what is done, when the site had better abstain, what is written to
state/coverage, what the site is warned of; the family `network`. Does not live here: the other families (by_heads),
which images are learned from (samples), the loss (risk), the share of the pool that is the site's (prior), the map from
scores to coverage (calibrate), use (learned).

Private data of site i follows p(x | Y in L_i), the pool p(x). By Bayes their ratio is P(Y in L_i | x) / P(Y in L_i):
coverage, up to one constant that class-prior estimation gives (methods of positive and unlabelled learning). The scores
that it is estimated from are, of a network, those of private images held out, and of the very pool images that the
network learned from: these are what is asked about. A network that learns the pool by heart makes the estimate too low.

Time of a network: `epochs` and a third more passes of the images that are learned from, forwards and back, and two
forwards of the pool's. Memory: these images as uint8, up to three times, and the network with its gradients a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from consilience.client.coverage.by_heads import learn_heads
from consilience.client.coverage.calibrate import fit_platt
from consilience.client.coverage.learned import (
    FOLDER,
    MODEL,
    CoverageRecord,
    is_model,
    read_record,
    settings_digest,
)
from consilience.client.coverage.prior import FIRST_PRIOR, auroc, estimate_prior
from consilience.client.coverage.risk import PositiveUnlabelled
from consilience.client.coverage.samples import LEAST_POOL, LEAST_PRIVATE, AbstainError, Samples, gather, mine
from consilience.client.coverage.scoring import score_of
from consilience.client.coverage.vectors import Vectors, vectors_of
from consilience.client.teacher import load_any
from consilience.client.teacher.private_samples import digest_of
from consilience.common.data import ImageData, open_data
from consilience.common.epochs import EpochRecord
from consilience.common.errors import CoverageError, StudentError
from consilience.common.files import lock, make_private, sha256, sha256_file, write_json
from consilience.common.nets import build, default_device, save_model, train
from consilience.common.pool import Pool
from consilience.common.seeds import derive
from consilience.common.settings import Fit, Preprocessing, SiteSettings

STYLE = 0.98
"""With a higher chance than this that a private image has a higher score than one of the pool, the network has not
seen classes but where the images come from, or none of the pool is of the site's classes."""
BLIND = 0.6
"""With a lower AUROC of "mine", as far as it can be known, coverage tells classes apart hardly better than a coin."""
_BLOCK = 4096
"""Pool images read and scored at once."""


def learn_coverage(
    settings: SiteSettings,
    on_epoch: Callable[[EpochRecord], None] | None = None,
    on_images: Callable[[int, int], None] | None = None,
) -> CoverageRecord:
    """Learn the site's coverage of its first pool; resumes, and returns at once when it is learned.

    `on_epoch` is told of every epoch of a network, `on_images`, for heads, how many images of how many the teacher has
    seen just now. A site with too little to learn from abstains: the record says why. Raises `CoverageError` without
    private data or a pool, when the private data is the pool, when training fails, and for features of a teacher that
    has none; `DataError`, `PoolError`, `SettingsError`, `MissingExtraError`, `StorageError`, `RunError` when another
    process is at it, and, where heads need the teacher, `TeacherError`.
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
            if vectors is None:
                record = _learn(settings, data, pool, about, on_epoch)
            else:
                record = _learn_heads(settings, data, pool, about, vectors, on_images)
        except AbstainError as reason:
            record = CoverageRecord(**about, abstains=str(reason))
        write_json(folder / "coverage.json", record.model_dump(mode="json"))  # last: it speaks of the model
        return record


def _learn(
    settings: SiteSettings,
    data: ImageData,
    pool: Pool,
    about: dict[str, Any],
    on_epoch: Callable[[EpochRecord], None] | None,
) -> CoverageRecord:
    """Learn, whatever was learned before; writes the model. `about` is what the record says it was learned from."""
    chosen = settings.coverage
    ids, labels, classes = _enough(settings, data, pool)
    preprocessing = _as_used(settings, pool)
    samples = gather(settings, data, ids, labels, classes, pool)
    prior, fit = chosen.prior, settings.coverage_fit
    if prior is None:
        short = _train(settings, samples, preprocessing, _short(fit), FIRST_PRIOR, "first prior", on_epoch)
        prior = estimate_prior(*_scores(settings, short, samples, pool, preprocessing), samples.held_out_weights)
    model = _train(settings, samples, preprocessing, fit, prior, "coverage", on_epoch)
    held, of_pool = _scores(settings, model, samples, pool, preprocessing)
    weights = samples.held_out_weights
    prior = chosen.prior or estimate_prior(held, of_pool, weights)
    about = {**about, "classes": classes, "preprocessing": preprocessing}
    return _record(settings, about, model, held, of_pool, prior, weights)


def _learn_heads(
    settings: SiteSettings,
    data: ImageData,
    pool: Pool,
    about: dict[str, Any],
    vectors: Vectors,
    on_images: Callable[[int, int], None] | None,
) -> CoverageRecord:
    """Do as `_learn` by heads on the teacher's vectors."""
    private = _enough(settings, data, pool)
    found = learn_heads(settings, data, about["data"], private, pool, vectors, on_images)
    return _record(settings, {**about, "classes": private[2]}, *found)


def _enough(settings: SiteSettings, data: ImageData, pool: Pool) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Return what `mine` returns. Raises `AbstainError` when there is too little to learn from."""
    ids, labels, classes = mine(settings, data)
    if len(ids) < LEAST_PRIVATE or len(pool) < LEAST_POOL:
        raise AbstainError(
            f"{len(ids):,} private images of its classes and {len(pool):,} of the pool are too few: "
            f"{LEAST_PRIVATE} and {LEAST_POOL} are needed"
        )
    return ids, labels, classes


def _record(
    settings: SiteSettings,
    about: dict[str, Any],
    model: nn.Module,
    held: NDArray[np.float64],
    of_pool: NDArray[np.float64],
    prior: float,
    weights: NDArray[np.float64] | None,
) -> CoverageRecord:
    """Write the model, calibrate on the scores (n,) of held-out private images and (m,) of the pool's, and say all.

    `weights` (n,): how much each of the former counts; None: all the same.
    """
    path = settings.state / MODEL
    save_model(path, model)
    record = CoverageRecord(
        **about,
        model=sha256_file(path),
        calibration=fit_platt(held, of_pool, prior, weights),
        prior=prior,
        held_out=len(held),
        private_over_pool=auroc(held, of_pool, weights),
    )
    return record.model_copy(update={"warnings": _warnings(record)})


def _as_used(settings: SiteSettings, pool: Pool) -> Preprocessing:
    """Return the preprocessing with the pool's size and channels. Raises `CoverageError` when they do not fit."""
    held, channels = settings.coverage.preprocessing, pool.shape[2]
    if len(held.mean) not in (1, channels):
        raise CoverageError(
            f"{settings.name}: coverage.preprocessing.mean has {len(held.mean)} values; the pool's images have "
            f"{channels} channels",
            hint="Give one value for all channels or one each",
        )
    return held.model_copy(update={"size": pool.shape[:2], "channels": channels})


def _scores(
    settings: SiteSettings, model: nn.Module, samples: Samples, pool: Pool, preprocessing: Preprocessing
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the scores (n,) of the held-out private images and (m,) of the pool's that were learned from."""
    held = score_of(model, samples.held_out, preprocessing)
    parts = [samples.pool[first : first + _BLOCK] for first in range(0, len(samples.pool), _BLOCK)]
    of_pool = np.concatenate([score_of(model, pool.take(part), preprocessing) for part in parts])
    if not (np.isfinite(held).all() and np.isfinite(of_pool).all()):
        raise CoverageError(
            f"{settings.name}: the network that was trained gives scores that are not finite",
            hint=f"Lower coverage.fit.learning_rate, for example to {settings.coverage.fit.learning_rate / 4:.2g}",
        )
    return held, of_pool


def _train(
    settings: SiteSettings,
    samples: Samples,
    preprocessing: Preprocessing,
    fit: Fit,
    prior: float,
    purpose: str,
    on_epoch: Callable[[EpochRecord], None] | None,
) -> nn.Module:
    """Return a trained network of K + 1 outputs; goes on where an earlier call of the same purpose stopped."""
    model = build(
        settings.coverage.architecture,
        classes=samples.classes + 1,
        channels=preprocessing.channels or 1,
        seed=derive(settings.seed, "coverage weights"),
    )
    labels = torch.from_numpy(samples.labels).to(default_device())
    weights = None if samples.weights is None else torch.tensor(samples.weights, dtype=torch.float32).to(labels.device)
    loss = PositiveUnlabelled(labels, samples.classes, prior, sha256(samples.labels.tobytes()), weights)
    try:
        train(
            model,
            samples.images,
            loss,
            fit,
            preprocessing,
            seed=derive(settings.seed, purpose),
            folder=settings.state / FOLDER / "training" / purpose.replace(" ", "-"),
            on_epoch=on_epoch,
        )
    except StudentError as error:  # the loop's word for any network
        raise CoverageError(f"{settings.name}: {error.message}", hint=error.hint) from error
    return model


def _short(fit: Fit) -> Fit:
    """A third of the epochs: enough for a first look at the prior."""
    return fit.model_copy(update={"epochs": -(-fit.epochs // 3)})


def epochs_of(fit: Fit, prior: float | None) -> int:
    """Return how many epochs `learn_coverage` trains in all."""
    return fit.epochs + (0 if prior else _short(fit).epochs)


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
