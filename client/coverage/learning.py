"""Learning a site's coverage: private data against a pool.

Lives here: which samples are learned from and which are held out, when the site had better abstain, what is written to
state/coverage. Does not live here: the network's loss (risk), the share of the pool that is the site's (prior), the map
from scores to coverage (calibrate), use (learned).

Private data of site i follows p(x | Y in L_i), the pool p(x). By Bayes their ratio is P(Y in L_i | x) / P(Y in L_i):
coverage, up to one constant that class-prior estimation gives (methods of positive and unlabelled learning).

Time: `epochs` and a third more passes of the images that are learned from, forwards and back, then one forwards of the
pool's. Memory: these images as uint8, and the network with its gradients for one batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from consilience.client.coverage.calibrate import fit_platt
from consilience.client.coverage.learned import FOLDER, CoverageRecord, read_record, score_of, settings_digest
from consilience.client.coverage.prior import auroc, estimate_prior
from consilience.client.coverage.risk import PositiveUnlabelled
from consilience.client.teacher.trained import digest_of, split
from consilience.common.data import ImageData, open_data
from consilience.common.errors import CoverageError, StudentError
from consilience.common.files import canonical_json, lock, sha256, sha256_file, write_json
from consilience.common.nets import EpochRecord, build, default_device, save_model, train
from consilience.common.nets.seeding import derive
from consilience.common.pool import Pool
from consilience.common.preprocessing import Images, fit_shape
from consilience.common.settings import Fit, Preprocessing, SiteSettings

HOLDOUT = 0.2
"""Share of each class's private images that the network does not learn from: prior and calibration come from them."""
LEAST_PRIVATE = LEAST_POOL = 200
"""Images below which there is nothing to learn from, and too few to calibrate on."""
MOST_POOL = 200_000
"""Pool images that are learned from, drawn by the seed where there are more."""
MOST_COPIES = 0.2
"""Share of the private images that may be in the pool too, byte for byte: the network is told of each copy that it is
the site's own, and that it may be anybody's."""
SHARE_OF_PRIVATE = 0.25
"""Private images are repeated until they are this share of an epoch, so that every batch has some."""
FIRST_PRIOR = 0.3
"""What the first, short training takes for the prior. Too low a prior costs little, too high a one much."""
STYLE = 0.98
"""With a higher chance than this that a private image has a higher score than one of the pool, the network has not
seen classes but where the images come from, or none of the pool is of the site's classes."""
BLIND = 0.55
"""With a lower one, private images and the pool's look alike."""


def learn_coverage(settings: SiteSettings, on_epoch: Callable[[EpochRecord], None] | None = None) -> CoverageRecord:
    """Learn the site's coverage of its first pool; resumes, and returns at once when it is learned.

    A site with too little to learn from abstains: the record says why. Raises `CoverageError` without private data or
    a pool, when the private data is the pool, and when training fails; `DataError`, `PoolError`, `SettingsError`,
    `MissingExtraError`, `StorageError`, and `RunError` when another process is at it.
    """
    if settings.data is None or not settings.pools:
        field = "data" if settings.data is None else "pools"
        raise CoverageError(
            f"{settings.name}: field {field!r} is not given, and coverage is learned from private data and a pool",
            hint=f"Set {field} in the site's settings, or policy.coverage: off",
        )
    data, pool = open_data(settings.data), Pool.open(settings.pools[0])
    digest = digest_of(data) if data.labels is not None else _digest_without_labels(data)
    folder = settings.state / FOLDER
    with lock(folder):
        done = read_record(settings)
        if done is not None and (done.settings, done.data, done.pool) == (
            settings_digest(settings),
            digest,
            pool.digest,
        ):
            return done
        pool.verify()
        record = _learn(settings, data, pool, digest, on_epoch)
        write_json(folder / "coverage.json", record.model_dump(mode="json"))  # last: it speaks of the model
        return record


@dataclass(frozen=True)
class _Samples:
    """What a training reads: private images first, then the pool's, (n, H, W, C) uint8."""

    images: Images
    labels: NDArray[np.int64]
    classes: int
    held_out: Images
    pool: NDArray[np.int64]
    """Ids of the pool's images."""


def _learn(
    settings: SiteSettings,
    data: ImageData,
    pool: Pool,
    digest: str,
    on_epoch: Callable[[EpochRecord], None] | None,
) -> CoverageRecord:
    chosen = settings.coverage
    about = {
        "settings": settings_digest(settings),
        "data": digest,
        "pool": pool.digest,
        "architecture": chosen.architecture,
    }
    ids, labels, classes = mine(settings, data)
    if min(len(ids) / LEAST_PRIVATE, len(pool) / LEAST_POOL) < 1:
        why = f"{len(ids):,} private images of its classes and {len(pool):,} of the pool are too few: "
        return CoverageRecord(**about, abstains=why + f"{LEAST_PRIVATE} and {LEAST_POOL} are needed")
    samples = _gather(settings, data, ids, labels, classes, pool)
    held = pool_scores = np.empty(0)
    prior = chosen.prior or FIRST_PRIOR
    folder = settings.state / FOLDER
    preprocessing = chosen.preprocessing.model_copy(update={"size": pool.shape[:2], "channels": pool.shape[2]})
    model = _network(settings, samples, preprocessing)
    rounds = ["coverage"] if chosen.prior else ["first prior", "coverage"]
    for purpose in rounds:
        model = _network(settings, samples, preprocessing)
        fit = chosen.fit if purpose == "coverage" else _short(chosen.fit)
        _train(settings, samples, model, preprocessing, fit, prior, purpose, on_epoch)
        held = score_of(model, samples.held_out, preprocessing)
        pool_scores = np.concatenate(
            [score_of(model, pool.take(part), preprocessing) for part in np.array_split(samples.pool, _parts(samples))]
        )
        prior = chosen.prior or estimate_prior(held, pool_scores)
    save_model(folder / "model.safetensors", model)
    ranks = auroc(held, pool_scores)
    return CoverageRecord(
        **about,
        classes=classes,
        preprocessing=preprocessing,
        model=sha256_file(folder / "model.safetensors"),
        calibration=fit_platt(held, pool_scores, prior),
        prior=prior,
        held_out=len(held),
        private_over_pool=ranks,
        warnings=_warnings(ranks, prior),
    )


def mine(settings: SiteSettings, data: ImageData) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Return the ids (n,) of private images of the teacher's classes, their labels (n,) in [0, K), and K.

    Data without labels is one class: all of it is the site's. Raises `CoverageError` when no image is of a class that
    the teacher knows.
    """
    if data.labels is None:
        return np.arange(len(data)), np.zeros(len(data), np.int64), 1
    known = data.class_names if settings.teacher.kind == "train" else settings.teacher.classes
    wanted = [k for k, name in enumerate(data.class_names) if name in known and np.any(data.labels == k)]
    ids = np.flatnonzero(np.isin(data.labels, wanted))
    if not len(ids):
        raise CoverageError(
            f"{settings.name}: no private image is of a class that the teacher knows; the data have: "
            f"{', '.join(data.class_names[:20])}",
            hint="Name the teacher's classes as the data do, or set policy.coverage: off",
        )
    return ids, np.searchsorted(wanted, data.labels[ids]), len(wanted)


def _gather(
    settings: SiteSettings,
    data: ImageData,
    ids: NDArray[np.int64],
    labels: NDArray[np.int64],
    classes: int,
    pool: Pool,
) -> _Samples:
    shape = Preprocessing(size=pool.shape[:2], channels=1 if pool.shape[2] == 1 else 3)
    learned, held_out = split(labels, HOLDOUT, derive(settings.seed, "coverage holdout"))
    private = fit_shape(data.read(ids[learned]), shape)
    of_pool = np.arange(len(pool))
    if len(pool) > MOST_POOL:
        random = np.random.default_rng(derive(settings.seed, "coverage pool"))
        of_pool = np.sort(random.permutation(len(pool))[:MOST_POOL])
    public = pool.take(of_pool)
    copies = {sha256(image.tobytes()) for image in public}
    shared = np.mean([sha256(image.tobytes()) in copies for image in private])
    if shared > MOST_COPIES:
        raise CoverageError(
            f"{settings.name}: {shared:.0%} of the private images are in the pool, byte for byte; allowed: "
            f"{MOST_COPIES:.0%}. Private data that is public says nothing about which pool images are of its classes",
            hint="Name data that is not in the pool, or set policy.coverage: off",
        )
    times = max(1, round(SHARE_OF_PRIVATE / (1 - SHARE_OF_PRIVATE) * len(public) / len(private)))
    return _Samples(
        images=np.concatenate([*[private] * times, public]),
        labels=np.tile(labels[learned], times),
        classes=classes,
        held_out=fit_shape(data.read(ids[held_out]), shape),
        pool=of_pool,
    )


def _network(settings: SiteSettings, samples: _Samples, preprocessing: Preprocessing) -> nn.Module:
    return build(
        settings.coverage.architecture,
        classes=samples.classes + 1,
        channels=preprocessing.channels or 1,
        seed=derive(settings.seed, "coverage weights"),
    )


def _train(
    settings: SiteSettings,
    samples: _Samples,
    model: nn.Module,
    preprocessing: Preprocessing,
    fit: Fit,
    prior: float,
    purpose: str,
    on_epoch: Callable[[EpochRecord], None] | None,
) -> None:
    labels = torch.from_numpy(samples.labels).to(default_device())
    loss = PositiveUnlabelled(labels, samples.classes, prior, sha256(samples.labels.tobytes()))
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


def _short(fit: Fit) -> Fit:
    """A third of the epochs: enough for a first look at the prior."""
    return fit.model_copy(update={"epochs": -(-fit.epochs // 3)})


def epochs_of(fit: Fit, prior: float | None) -> int:
    """Return how many epochs `learn_coverage` trains in all."""
    return fit.epochs + (0 if prior else _short(fit).epochs)


def _parts(samples: _Samples) -> int:
    return max(1, len(samples.pool) // 4096)


def _warnings(ranks: float, prior: float) -> tuple[str, ...]:
    found = []
    if ranks > STYLE:
        found.append(
            "private and pool images can be told apart nearly always: the pool has hardly any image of the site's "
            "classes, or the two differ in how the images were made, and coverage then speaks of that"
        )
    if ranks < BLIND and prior < 1 - 2 * (1 - BLIND) / 3:
        found.append("private and pool images cannot be told apart: coverage says little")
    return tuple(found)


def _digest_without_labels(data: ImageData) -> str:
    some = np.unique(np.linspace(0, len(data) - 1, 256 if len(data) else 0).astype(np.int64))
    return sha256(canonical_json([data.shape, len(data), sha256(np.ascontiguousarray(data.read(some)).tobytes())]))
