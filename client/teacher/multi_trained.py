"""The multi-label teacher that Consilience trains itself, on private images with any number of labels.

Lives here: its loss, which images are held out, how it is measured, loading it. Does not live here: what it shares with
a single-label one, state/teacher among it (trained).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from consilience.client.teacher.multi import ScoringMultiTeacher
from consilience.client.teacher.trained import (
    HOLDOUT,
    RETRAIN,
    TrainedTeacher,
    parts_of,
    private_data,
    train_network,
    trained_record,
    wanted,
)
from consilience.common.data import ImageData
from consilience.common.epochs import EpochRecord
from consilience.common.errors import TeacherError
from consilience.common.label_scores import average_precisions, mean_ap
from consilience.common.nets import build, default_device, scores
from consilience.common.nets.losses import SupervisedLabels
from consilience.common.seeds import derive
from consilience.common.settings import Preprocessing, SiteSettings

Labels = NDArray[np.int8]


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


def present_labels(data: ImageData) -> tuple[Labels, tuple[str, ...]]:
    """Return (n, k) int8 of the labels that apply to at least one image, and their names, in order.

    Raises `DataError` for single-label data, `TeacherError` where no label applies to any image.
    """
    many = data.need_many("The private data of a multi-label teacher")
    present = np.flatnonzero((many > 0).any(axis=0))
    if not len(present):
        raise TeacherError("No label applies to any private image", hint="Name data with labelled images")
    return np.ascontiguousarray(many[:, present]), tuple(data.class_names[k] for k in present)


def held_out_multi(settings: SiteSettings, data: ImageData, digest: str) -> tuple[NDArray[np.int64], Labels]:
    """Return sorted ids (n,) of `data`, of digest `digest`, that the trained teacher has not learned from, and labels.

    Labels (n, k) are in the teacher's order. Raises `TeacherError` when it was trained on other data.
    """
    if trained_record(settings).data_digest != digest:
        raise TeacherError(
            f"{settings.name}: the private data are not those that the teacher was trained on", hint=RETRAIN
        )
    labels, _ = present_labels(data)
    _, ids = split_images(labels, wanted(settings).holdout, derive(settings.seed, HOLDOUT))
    return ids, labels[ids]


def split_images(labels: Labels, share: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return sorted ids to learn from and to hold out: `share` of the images (n, k), rounded.

    Of a label all of whose images would be held out, one is learned from.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    held_out = np.zeros(len(labels), np.bool_)
    held_out[order[: min(round(share * len(labels)), len(labels) - 1)]] = True
    for label in range(labels.shape[1]):
        having = np.flatnonzero(labels[:, label] > 0)
        if len(having) and held_out[having].all():
            held_out[having[0]] = False
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def _mean_ap(
    model: nn.Module, data: ImageData, labels: Labels, ids: NDArray[np.int64], used: Preprocessing
) -> float | None:
    rows = [scores(model, data.read(part), used) for part in np.array_split(ids, max(1, len(ids) // 512)) if len(part)]
    return mean_ap(average_precisions(labels[ids], np.concatenate(rows))) if rows else None
