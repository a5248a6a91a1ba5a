"""Coverage that was learned: its record, and its use.

Lives here: state/coverage/coverage.json, and whether it is of the settings at hand. Does not live here: learning
(learning), loading the model and its scores (scoring).

state/coverage/ holds coverage.json (a `CoverageRecord`), model.safetensors unless the site abstains, and, of a network,
training/.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from consilience.client.coverage.calibrate import Platt
from consilience.client.kept import read_kept
from consilience.client.teacher import AnyTeacher
from consilience.common.errors import CoverageError, TeacherError
from consilience.common.files import canonical_json, sha256, sha256_file
from consilience.common.pool import Pool
from consilience.common.preprocessing import Images
from consilience.common.settings import CoverageFamily, Preprocessing, Settings, SiteSettings

FOLDER = "coverage"
MODEL = f"{FOLDER}/model.safetensors"
MOST_TO_RANK = 0.8
"""With a higher prior the rest of the pool is too small to say from it how well it is told apart."""
AGAIN = "Run `consilience site train`"


class CoverageRecord(Settings):
    """coverage.json: what was learned, and from what; or why nothing was."""

    settings: str
    """Digest of the settings of coverage, the teacher's classes and the seed."""
    data: str
    """Digest of the private data."""
    pool: str
    """Digest of the pool."""
    family: CoverageFamily = "network"
    architecture: str = ""
    """Of the network; empty for another family."""
    teacher: str = ""
    """Fingerprint of what decides the vectors that heads are fed; empty for a network."""
    abstains: str | None = None
    """Why the site gives no coverage."""
    classes: int = Field(default=0, ge=0, le=100_000)
    preprocessing: Preprocessing = Preprocessing()
    model: str = ""
    """SHA-256 of model.safetensors."""
    calibration: Platt | None = None
    prior: float = Field(default=0.0, ge=0, le=1)
    """Share of the pool that is of the site's classes, as given or estimated."""
    held_out: int = 0
    """Private images that prior and calibration were estimated on."""
    private_over_pool: float = Field(default=0.5, ge=0, le=1)
    """Chance that a held-out private image has a higher score than one of the pool."""
    warnings: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _whole(self) -> CoverageRecord:
        if (self.abstains is None) != (self.calibration is not None):
            raise ValueError("coverage is calibrated, or the site abstains")
        return self

    @property
    def auroc(self) -> float | None:
        """Area under the ROC of "mine" over the pool, as far as it can be known without labels.

        The pool is a mixture: the chance that a private image outranks one of the pool is prior / 2 + (1 - prior) *
        AUROC. None with a prior above `MOST_TO_RANK`.
        """
        if self.abstains is not None or self.prior > MOST_TO_RANK:
            return None
        return float(np.clip((self.private_over_pool - self.prior / 2) / (1 - self.prior), 0, 1))

    @property
    def how(self) -> str:
        """What gives the scores, in few words: they go into the site card."""
        return self.architecture if self.family == "network" else f"heads on the teacher's {self.family}"

    @property
    def told(self) -> str:
        """The record in one line, for the site's own eyes. Where there is a warning, AUROC may be of something else."""
        if self.abstains is not None:
            return f"none: {self.abstains}"
        ranking = "" if self.auroc is None or self.warnings else f", AUROC about {self.auroc:.3f}"
        found = f"{self.how}: {self.prior:.3g} of the pool of the site's classes{ranking}, "
        found += f"by {self.held_out:,} held-out images"
        return "; ".join([found, *(f"Warning: {warning}" for warning in self.warnings)])


@dataclass(frozen=True)
class LearnedCoverage:
    """Scores (n,) of (n, H, W, C) uint8 images behind a calibration."""

    fingerprint: str
    description: str
    score: Callable[[Images], NDArray[np.float64]]
    calibration: Platt

    def scores(self, images: Images) -> NDArray[np.float32]:
        """Return (n,) float32 in (0, 1) for (n, H, W, C) uint8. Raises `TeacherError`."""
        try:
            found = self.score(images)
        except (RuntimeError, ValueError) as error:
            raise TeacherError(f"coverage failed on {len(images)} images of shape {images.shape[1:]}") from error
        if not np.isfinite(found).all():
            raise TeacherError(f"coverage gave scores that are not finite for {len(images)} images")
        return self.calibration(found).astype(np.float32)


def load_coverage(settings: SiteSettings, teacher: AnyTeacher | None = None) -> LearnedCoverage | None:
    """Return the coverage that the site has learned; None where it has none, abstains, or its policy says off.

    `teacher` is the site's; where it is not given, and heads need it, it is loaded. Raises `CoverageError` when it was
    learned from other settings or, of heads, for another teacher, or its files are damaged, and what `read_record`
    and, for heads, `load_any` raise.
    """
    if settings.policy.coverage == "off":
        return None
    record = read_record(settings)
    if record is None:
        return None
    folder = settings.state / FOLDER
    if record.settings != settings_digest(settings):
        raise CoverageError(
            f"{folder}: the coverage there was learned under other settings or another seed", hint=AGAIN
        )
    if settings.pools and (pool := Pool.open(settings.pools[0])).digest != record.pool:
        raise CoverageError(
            f"{folder}: the coverage there was learned on pool {record.pool[:12]}; the first of pools is "
            f"{pool.digest[:12]}",
            hint=AGAIN,
        )
    if record.calibration is None:
        return None
    if not is_model(settings, record):
        raise CoverageError(f"{settings.state / MODEL}: is not the model that coverage.json speaks of", hint=AGAIN)
    from consilience.client.coverage.scoring import load_scores  # which brings torch

    return load_scores(settings, record, record.calibration, teacher)


def read_record(settings: SiteSettings) -> CoverageRecord | None:
    """Return coverage.json, or None where there is none.

    Raises `CoverageError` when it is not as it must be, `StorageError` when it is no JSON or cannot be read.
    """
    return read_kept(settings.state / FOLDER / "coverage.json", CoverageRecord, CoverageError, AGAIN)


def is_model(settings: SiteSettings, record: CoverageRecord) -> bool:
    """Whether model.safetensors is there and the one that the record speaks of; an abstaining record needs none."""
    path = settings.state / MODEL
    return record.abstains is not None or (path.exists() and sha256_file(path) == record.model)


def settings_digest(settings: SiteSettings) -> str:
    """Return the digest of what the settings decide of coverage: how it is learned, and of which classes."""
    teacher = None if settings.teacher.kind == "train" else settings.teacher.classes
    fit = settings.coverage_fit.model_dump(mode="json") | {"pretrain": settings.coverage.fit.pretrain}
    how = settings.coverage.model_dump(mode="json") | {"fit": fit}
    return sha256(canonical_json([how, teacher, settings.seed]))
