"""The teacher that Consilience trains itself, on the site's private data.

Lives here: what is written to state/teacher, and loading it. Does not live here: which samples are learned from and
which are held out (private_samples), the record alone (kept_training), the training loop and the architectures
(common/nets).

state/teacher/ holds model.safetensors, teacher.json (a `TrainedTeacher`) and training/ (the loop's checkpoint).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from consilience.client.teacher.kept_training import (
    MODEL,
    RECORD,
    RETRAIN,
    TrainedTeacher,
    done_in,
    record_in,
    settings_digest,
    wanted,
)
from consilience.client.teacher.private_samples import HOLDOUT, digest_of, present_classes, private_data, split
from consilience.client.teacher.protocol import ScoringTeacher, fingerprint_of, read_model
from consilience.client.teacher.state_dict import network_scores, read_weights
from consilience.common.data import ImageData
from consilience.common.epochs import EpochRecord
from consilience.common.errors import StudentError, TeacherError
from consilience.common.files import lock, sha256, sha256_file, write_json
from consilience.common.nets import Supervised, build, default_device, save_model, scores, train
from consilience.common.nets.losses import Loss
from consilience.common.nets.own_networks import check_own, code_of
from consilience.common.seeds import derive
from consilience.common.settings import Preprocessing, SiteSettings, TrainTeacher


def train_teacher(
    settings: SiteSettings, on_epoch: Callable[[EpochRecord], None] | None = None, data: ImageData | None = None
) -> TrainedTeacher:
    """Train the site's teacher on its private data, or on `data`; resumes, and returns at once when it is trained.

    The classes are those of the data with at least one sample, in the data's order. `teacher.holdout` of every
    class's samples, rounded, are not learned from but measure the accuracy; one sample at least is learned from.
    Raises `TeacherError`, `DataError`, `SettingsError`, `MissingExtraError`, `StorageError`, and `RunError` when
    another process is training it.
    """
    teacher, held = wanted(settings), private_data(settings) if data is None else data
    labels, classes = present_classes(held)
    return train_in(settings.state / "teacher", settings.name, held, labels, classes, teacher, settings.seed, on_epoch)


def train_in(
    folder: Path,
    name: str,
    data: ImageData,
    labels: NDArray[np.int64],
    classes: tuple[str, ...],
    teacher: TrainTeacher,
    seed: int,
    on_epoch: Callable[[EpochRecord], None] | None,
) -> TrainedTeacher:
    """Train a teacher of `classes` in `folder` on `data`, labelled (n,) int64 in [0, len(classes)).

    Not every class needs a sample. Resumes, and raises, as `train_teacher`; `name` names the teacher in errors.
    """
    learned, held_out = split(labels, teacher.holdout, derive(seed, HOLDOUT))
    return train_network(
        folder,
        name,
        data,
        classes,
        teacher,
        seed,
        on_epoch,
        places=(learned, held_out),
        loss=lambda: Supervised(labels[learned], default_device()),
        judged=lambda model, used: {"holdout_accuracy": accuracy(model, data, labels, held_out, used)},
    )


def train_network(
    folder: Path,
    name: str,
    data: ImageData,
    classes: tuple[str, ...],
    teacher: TrainTeacher,
    seed: int,
    on_epoch: Callable[[EpochRecord], None] | None,
    *,
    places: tuple[NDArray[np.int64], NDArray[np.int64]],
    loss: Callable[[], Loss],
    judged: Callable[[nn.Module, Preprocessing], dict[str, Any]],
) -> TrainedTeacher:
    """Train a teacher of `classes` in `folder` under `loss`; resumes, and raises, as `train_teacher`.

    `places`: ids of `data` to learn from, which `loss` counts from 0, and held out. `judged` gives the fields of the
    record that say how good it is.
    """
    data_digest = digest_of(data)
    learned, held_out = places
    with lock(folder):
        if (done := done_in(folder, TrainedTeacher, settings_digest(teacher, seed), data_digest)) is not None:
            return done
        used = as_used(teacher.preprocessing, data.shape)
        model = build(
            teacher.architecture,
            classes=len(classes),
            channels=used.channels or data.shape[2],
            seed=derive(seed, "teacher weights"),
        )
        check_own(teacher.architecture, model, (used.channels or 1, *(used.size or data.shape[:2])), len(classes))
        try:
            curve = train(
                model,
                data.read(learned),
                loss(),
                teacher.fit,
                used,
                seed=derive(seed, "teacher training"),
                folder=folder / "training",
                on_epoch=on_epoch,
            )
        except StudentError as error:  # the loop's word for any network; at a site the network is a teacher
            raise TeacherError(f"{name}: {error.message}", hint=error.hint) from error
        save_model(folder / MODEL, model)
        record = TrainedTeacher(
            classes=classes,
            architecture=teacher.architecture,
            preprocessing=used,
            **{"holdout_accuracy": None, **judged(model, used)},
            holdout_count=len(held_out),
            train_count=len(learned),
            learning_curve=tuple(curve),
            settings_digest=settings_digest(teacher, seed),
            data_digest=data_digest,
            model_digest=sha256_file(folder / MODEL),
        )
        # Last: whoever finds teacher.json finds the model that it speaks of.
        write_json(folder / RECORD, record.model_dump(mode="json"))
        return record


def load_trained(settings: SiteSettings) -> ScoringTeacher:
    """Load what `train_teacher` wrote. Raises `TeacherError` when it is not there or of other settings."""
    return load_in(settings.state / "teacher", wanted(settings), settings.seed)


def load_in(folder: Path, teacher: TrainTeacher, seed: int) -> ScoringTeacher:
    """Load what `train_in` wrote. Raises `TeacherError` when it is not there or of other settings."""
    record = record_in(folder, teacher, seed)
    channels = record.preprocessing.channels or 1
    module = build(record.architecture, classes=len(record.classes), channels=channels, seed=0)
    return teacher_of(folder, record, module, "train")


def teacher_of(folder: Path, record: TrainedTeacher, module: nn.Module, kind: str) -> ScoringTeacher:
    """Return the teacher whose weights lie in `folder`, for the network `module` that `record` speaks of.

    Raises `TeacherError` when the weights are others than the record's.
    """
    return ScoringTeacher(**parts_of(folder, record, module, kind))


def parts_of(folder: Path, record: TrainedTeacher, module: nn.Module, kind: str) -> dict[str, Any]:
    """Return the fields of the `Scoring` whose weights lie in `folder`. Raises as `teacher_of`."""
    path = folder / MODEL
    data = read_model(path)
    if sha256(data) != record.model_digest:
        raise TeacherError(f"{path}: is not the model that teacher.json speaks of", hint=RETRAIN)
    parts = record.model_dump(mode="json", include={"classes", "architecture", "preprocessing"})
    parts |= {"kind": kind} | code_of(record.architecture)
    return {
        "classes": record.classes,
        "fingerprint": fingerprint_of(parts, record.model_digest),
        "outputs": "logits",
        "where": str(path),
        "scores": network_scores(
            path, record.architecture, module, read_weights(path, data), record.preprocessing, len(record.classes)
        ),
    }


def accuracy(
    model: nn.Module, data: ImageData, labels: NDArray[np.int64], ids: NDArray[np.int64], used: Preprocessing
) -> float | None:
    """Return the share of the samples `ids` that the network names as their labels do; None where there are none."""
    right = 0
    for part in np.array_split(ids, max(1, len(ids) // 512)):
        right += int(np.sum(scores(model, data.read(part), used).argmax(axis=1) == labels[part]))
    return right / len(ids) if len(ids) else None


def as_used(preprocessing: Preprocessing, shape: tuple[int, int, int]) -> Preprocessing:
    """Return the preprocessing with the data's size and channels where it leaves them open."""
    channels = preprocessing.channels or shape[2]
    if len(preprocessing.mean) not in (1, channels):
        raise TeacherError(
            f"teacher.preprocessing.mean has {len(preprocessing.mean)} values; the images have {channels} channels",
            hint="Give one value for all channels or one each",
        )
    return preprocessing.model_copy(update={"size": preprocessing.size or shape[:2], "channels": channels})
