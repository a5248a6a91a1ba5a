"""Coverage by a network of its own: family `network`.

Lives here: what the network learns, in which order, from which images, and its scores. Does not live here: which images
these are (samples), the losses (risk), a score (scoring), what is written (learning).

First the network learns to tell the site's own classes apart: what it sees in them tells others' classes apart, too,
and private images against a pool alone would teach it little of that. Then it learns private images against the pool's.

The scores that coverage is calibrated on are those of private images held out, and of the very pool images that the
network learned from: these are what is asked about. Their level is the share of the pool that is of the site's classes,
which is estimated by networks to which the images are new.

Time: `pretrain` passes of the private images, `epochs` passes of these and the pool's, and as many of these and half of
the pool's, forwards and back; two and a half passes of the pool's forwards. Memory: these images as uint8, up to four
times, and the network with its gradients a batch. What is interrupted goes on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from consilience.client.coverage.found import Found
from consilience.client.coverage.learned import FOLDER
from consilience.client.coverage.prior import FIRST_PRIOR, auroc, estimate_prior
from consilience.client.coverage.risk import OwnClasses, PositiveUnlabelled
from consilience.client.coverage.samples import Samples, gather
from consilience.client.coverage.scoring import score_of
from consilience.common.data import ImageData
from consilience.common.epochs import EpochRecord
from consilience.common.errors import CoverageError, StudentError
from consilience.common.files import sha256
from consilience.common.nets import Loss, build, default_device, train
from consilience.common.pool import Pool
from consilience.common.preprocessing import Images
from consilience.common.seeds import derive
from consilience.common.settings import Fit, Preprocessing, SiteSettings

OnEpoch = Callable[[EpochRecord], None] | None

TURNS = (0, 1, 0)
"""Halves of the pool, as they are scored for its share that is of the site's classes; the first one twice."""


def learn_network(
    settings: SiteSettings,
    data: ImageData,
    private: tuple[NDArray[np.int64], NDArray[np.int64], int],
    pool: Pool,
    on_epoch: OnEpoch = None,
    on_pretraining: OnEpoch = None,
) -> tuple[Found, Preprocessing]:
    """Return the network, scores (n,) of held-out private images and (m,) of the pool's, and the prior; what it is fed.

    `private` are ids, labels and the number of classes, as samples.mine gives them. Raises `AbstainError` when too few
    private images differ, `CoverageError` when too many are in the pool, when training fails and when preprocessing
    does not fit the pool; `DataError`, `PoolError`, `SettingsError`, `StorageError`.
    """
    preprocessing = _as_used(settings, pool)
    learner = _Learner(settings, gather(settings, data, *private, pool), preprocessing, on_epoch)
    learner.pretrain(on_pretraining)
    samples, prior, ranking = learner.samples, settings.coverage.prior, None
    if prior is None:
        prior, ranking = _estimate(learner)
    model = learner.learn(samples.epoch(samples.public), settings.coverage_fit, prior, "coverage")
    held, of_pool = learner.scores(model, samples.held_out), learner.scores(model, samples.public)
    weights = samples.held_out_weights
    if ranking is None:
        ranking = auroc(held, of_pool, weights)
    return Found(model, held, of_pool, weights, prior, ranking), preprocessing


def _estimate(learner: _Learner) -> tuple[float, float]:
    """Return the share of the pool that is of the site's classes, and how often a private image outranks one of it.

    Both are of networks that learn from one half of the pool and score the other: a network takes pool images that it
    learned from for others' the more the longer it learns, so by its scores of these the share would come out too low.
    The share that a network learns with draws its scores along: each takes the one found before it.
    """
    samples, fit = learner.samples, _short(learner.settings.coverage_fit)
    prior, found, weights = FIRST_PRIOR, dict[int, tuple[float, float]](), samples.held_out_weights
    for turn, half in enumerate(TURNS):
        new_held, new = samples.held_out_half == half, samples.half == half
        if not (new_held.any() and new.any()):
            learner.told += fit.epochs
            continue  # of copies of one image, one half has none
        model = learner.learn(samples.epoch(samples.public[~new]), fit, prior, f"prior {turn}")
        held = learner.scores(model, samples.held_out[new_held])
        of_pool = learner.scores(model, samples.public[new])
        counts = None if weights is None else weights[new_held]
        prior = estimate_prior(held, of_pool, counts)
        found[half] = prior, auroc(held, of_pool, counts)
    # Each by itself: two networks' scores are not on one scale.
    shares = [np.count_nonzero(samples.half == half) for half in found]
    share, ranking = np.average(list(found.values()), axis=0, weights=shares)
    return float(share), float(ranking)


class _Learner:
    """One site's trainings, one after another: what all of them share, and how many epochs were told of."""

    def __init__(
        self, settings: SiteSettings, samples: Samples, preprocessing: Preprocessing, on_epoch: OnEpoch
    ) -> None:
        self.settings, self.samples, self.preprocessing = settings, samples, preprocessing
        self.told, self._on_epoch = 0, on_epoch
        self._begun = build(
            settings.coverage.architecture,
            classes=samples.classes + 1,
            channels=preprocessing.channels or 1,
            seed=derive(settings.seed, "coverage weights"),
        )

    def pretrain(self, on_epoch: OnEpoch) -> None:
        """Teach the network that all begin as to tell the site's classes apart: it tells others' apart, too, then.

        Of one class there is nothing to tell apart, and `coverage.fit.pretrain` may be 0: then it learns nothing.
        """
        fit, samples = self.settings.coverage_pretraining, self.samples
        if fit is not None and samples.classes > 1:
            labels = torch.from_numpy(samples.labels).to(default_device())
            loss = OwnClasses(labels, samples.classes, sha256(samples.labels.tobytes()))
            self._fit(self._begun, samples.private, loss, fit, "own classes", on_epoch)

    def learn(self, epoch: tuple[Images, NDArray[np.int64]], fit: Fit, prior: float, purpose: str) -> nn.Module:
        """Return a network that learned from `epoch`, as `Samples.epoch` gives it; goes on where `purpose` stopped."""
        model, (images, of_images), samples = copy.deepcopy(self._begun), epoch, self.samples
        labels = torch.from_numpy(of_images).to(default_device())
        weights = None
        if samples.weights is not None:
            weights = torch.tensor(samples.weights, dtype=torch.float32).to(labels.device)
        loss = PositiveUnlabelled(labels, samples.classes, prior, sha256(of_images.tobytes()), weights)
        self._fit(model, images, loss, fit, purpose, self._tell)
        self.told += fit.epochs
        return model

    def scores(self, model: nn.Module, images: Images) -> NDArray[np.float64]:
        """Return scores (n,) of images (n, H, W, C). Raises `CoverageError` where they are not finite."""
        found, settings = score_of(model, images, self.preprocessing), self.settings
        if not np.isfinite(found).all():
            raise CoverageError(
                f"{settings.name}: the network that was trained gives scores that are not finite",
                hint=f"Lower coverage.fit.learning_rate, for example to {settings.coverage.fit.learning_rate / 4:.2g}",
            )
        return found

    def _tell(self, record: EpochRecord) -> None:
        """Tell of an epoch as one of all that are trained."""
        if self._on_epoch is not None:
            self._on_epoch(replace(record, epoch=self.told + record.epoch))

    def _fit(self, model: nn.Module, images: Images, loss: Loss, fit: Fit, purpose: str, on_epoch: OnEpoch) -> None:
        settings = self.settings
        try:
            train(
                model,
                images,
                loss,
                fit,
                self.preprocessing,
                seed=derive(settings.seed, purpose),
                folder=settings.state / FOLDER / "training" / purpose.replace(" ", "-"),
                on_epoch=on_epoch,
            )
        except StudentError as error:  # the loop's word for any network
            hint = (error.hint or "").replace("fit.", "coverage.fit.")
            raise CoverageError(f"{settings.name}, coverage ({purpose}): {error.message}", hint=hint) from error


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


def _short(fit: Fit) -> Fit:
    """A third of the epochs: enough for the prior."""
    return fit.model_copy(update={"epochs": -(-fit.epochs // 3)})


def epochs_of(fit: Fit, prior: float | None) -> int:
    """Return how many epochs `learn_coverage` trains in all, after pretraining."""
    return fit.epochs + (0 if prior else len(TURNS) * _short(fit).epochs)
