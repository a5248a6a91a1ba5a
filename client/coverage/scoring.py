"""The scores of coverage that was learned, by a network or by heads, from state/coverage/model.safetensors.

Lives here: the network's score, and loading. Does not live here: the heads' score (by_heads), whether what is kept is
of the settings at hand (learned).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray
from torch import nn

from consilience.client.coverage.by_heads import score_by_heads
from consilience.client.coverage.calibrate import Platt
from consilience.client.coverage.head import Heads
from consilience.client.coverage.learned import AGAIN, MODEL, CoverageRecord, LearnedCoverage
from consilience.client.coverage.vectors import vectors_of
from consilience.client.teacher import AnyTeacher, load_any
from consilience.client.teacher.protocol import fingerprint_of
from consilience.common.errors import CoverageError, StudentError
from consilience.common.nets import build, load_model, scores
from consilience.common.nets.own_networks import code_of
from consilience.common.preprocessing import Images
from consilience.common.settings import Preprocessing, SiteSettings


def score_of(model: nn.Module, images: Images, preprocessing: Preprocessing) -> NDArray[np.float64]:
    """Return (n,) scores of (n, H, W, C) uint8: the log of the odds that the network gives to "one of mine"."""
    logits = scores(model, images, preprocessing).astype(np.float64)
    mine: NDArray[np.float64] = np.logaddexp.reduce(logits[:, :-1], axis=1)
    return mine - logits[:, -1]


def load_scores(
    settings: SiteSettings, record: CoverageRecord, calibration: Platt, teacher: AnyTeacher | None
) -> LearnedCoverage:
    """Load what `record` speaks of, behind its `calibration`; without `teacher` it is loaded, where heads need it.

    Raises `CoverageError` for heads that were learned for another teacher, and for a file that does not fit the record,
    `SettingsError` for an unknown architecture, and what `load_any` raises.
    """
    path = settings.state / MODEL
    model: nn.Module
    score: Callable[[Images], NDArray[np.float64]]
    if record.family == "network":
        channels = record.preprocessing.channels or 1
        model = build(record.architecture, classes=record.classes + 1, channels=channels, seed=0)
        score = partial(score_of, model, preprocessing=record.preprocessing)
        decides = {"architecture", "preprocessing", "calibration"}
    else:
        vectors = vectors_of(settings, teacher or load_any(settings))
        if vectors.teacher != record.teacher:
            raise CoverageError(f"{path.parent}: the coverage there was learned for another teacher", hint=AGAIN)
        model = heads = Heads(vectors.size, record.classes)
        score = partial(score_by_heads, heads, vectors)
        decides = {"family", "teacher", "calibration"}
    try:
        load_model(path, model)
    except StudentError as error:
        raise CoverageError(error.message, hint=AGAIN) from error
    parts = record.model_dump(mode="json", include=decides)
    if record.family == "network":
        parts |= code_of(record.architecture)
    return LearnedCoverage(
        fingerprint=fingerprint_of({"kind": "coverage", **parts}, record.model),
        description=f"private data against the pool, {record.how}"[:500],
        score=score,
        calibration=calibration,
    )
