"""The multi-label teacher that Consilience trains itself, on private images with any number of labels.

Lives here: its loss, how it is measured, loading it. Does not live here: which images are held out (private_samples),
what it shares with a single-label one, state/teacher among it (trained).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from consilience.client.teacher.kept_training import TrainedTeacher, trained_record, wanted
from consilience.client.teacher.multi import ScoringMultiTeacher
from consilience.client.teacher.private_samples import HOLDOUT, Labels, present_labels, private_data, split_images
from consilience.client.teacher.trained import parts_of, train_network
from consilience.common.data import ImageData
from consilience.common.epochs import EpochRecord
from consilience.common.label_scores import average_precisions, mean_ap
from consilience.common.nets import build, default_device, scores
from consilience.common.nets.losses import SupervisedLabels
from consilience.common.seeds import derive
from consilience.common.settings import Preprocessing, SiteSettings


def train_multi(
    settings: SiteSettings, on_epoch: Callable[[EpochRecord], None] | None = None, data: ImageData | None = None
) -> TrainedTeacher:
    """Train the site's multi-label teacher; resumes, returns at once when done, and raises, as `train_teacher`.

    Its labels are those of the data that apply to at least one image, in the data's order. `teacher.holdout` of the
    images, rounded, are not learned from but measure the mean average precision; each label keeps an image to learn
    from.
    """
    teacher, held = wanted(settings), private_data(settings) if data is None else data
    labels, classes = present_labels(held)
    learned, held_out = split_images(labels, teacher.holdout, derive(settings.seed, HOLDOUT))

    def judged(model: nn.Module, used: Preprocessing) -> dict[str, Any]:
        return {"holdout_ap": _mean_ap(model, held, labels, held_out, used)}

    return train_network(
        settings.state / "teacher",
        settings.name,
        held,
        classes,
        teacher,
        settings.seed,
        on_epoch,
        places=(learned, held_out),
        loss=lambda: SupervisedLabels(labels[learned], default_device()),
        judged=judged,
    )


def load_multi(settings: SiteSettings) -> ScoringMultiTeacher:
    """Load what `train_multi` wrote. Raises `TeacherError` when it is not there or of other settings."""
    record = trained_record(settings)
    module = build(
        record.architecture, classes=len(record.classes), channels=record.preprocessing.channels or 1, seed=0
    )
    return ScoringMultiTeacher(**parts_of(settings.state / "teacher", record, module, "train multi-label"))


def _mean_ap(
    model: nn.Module, data: ImageData, labels: Labels, ids: NDArray[np.int64], used: Preprocessing
) -> float | None:
    rows = [scores(model, data.read(part), used) for part in np.array_split(ids, max(1, len(ids) // 512)) if len(part)]
    return mean_ap(average_precisions(labels[ids], np.concatenate(rows))) if rows else None
