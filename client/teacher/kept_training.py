"""What a site keeps of a training: teacher.json, read without the network that it speaks of.

Lives here: the record, and whether it is of the settings and data at hand. Does not live here: training, and loading
the network (trained, multi_trained).
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from consilience.client.kept import read_kept
from consilience.common.epochs import EpochRecord
from consilience.common.errors import TeacherError
from consilience.common.files import canonical_json, sha256, sha256_file
from consilience.common.settings import Preprocessing, Settings, SiteSettings, TrainTeacher

MODEL, RECORD = "model.safetensors", "teacher.json"
"""Files in the folder of a trained teacher."""
RETRAIN = "Run `consilience site train`"


class TrainedTeacher(Settings):
    """teacher.json: what was trained, from what, and how well it does."""

    classes: tuple[str, ...]
    architecture: str
    preprocessing: Preprocessing
    """As used: with the size and the channels that the network was trained at."""
    holdout_accuracy: float | None
    """Accuracy on the samples held out; None where there are none, and of a multi-label teacher."""
    holdout_ap: float | None = None
    """Of a multi-label teacher: the mean over its labels of the average precision on the samples held out."""
    holdout_count: int
    train_count: int
    learning_curve: tuple[EpochRecord, ...]
    settings_digest: str
    """Of the teacher's settings and the seed."""
    data_digest: str
    """Of the labels and of some images, evenly spread."""
    model_digest: str
    """SHA-256 of model.safetensors."""


Trained = TypeVar("Trained", bound=TrainedTeacher)


def trained_record(settings: SiteSettings) -> TrainedTeacher:
    """Return teacher.json. Raises `TeacherError` when it is not there or of other settings."""
    return record_in(settings.state / "teacher", wanted(settings), settings.seed)


def record_in(folder: Path, teacher: TrainTeacher, seed: int) -> TrainedTeacher:
    """Return teacher.json of `folder`. Raises `TeacherError` when it is not there or of other settings."""
    return trained_in(folder, TrainedTeacher, settings_digest(teacher, seed))


def trained_in(folder: Path, kind: type[Trained], settings: str) -> Trained:
    """Return teacher.json of `folder`. Raises `TeacherError` when it is not there or of settings of another digest."""
    record = read_kept(folder / RECORD, kind, TeacherError, RETRAIN)
    if record is None:
        raise TeacherError(f"{folder}: holds no trained teacher", hint=RETRAIN)
    if record.settings_digest != settings:
        raise TeacherError(f"{folder}: the teacher there was trained from other settings or another seed", hint=RETRAIN)
    return record


def done_in(folder: Path, kind: type[Trained], settings: str, data: str) -> Trained | None:
    """Return teacher.json of `folder` where it is of settings and data of these digests, and its model is there.

    Raises `TeacherError` when it is not as it must be, `StorageError`.
    """
    record, path = read_kept(folder / RECORD, kind, TeacherError, RETRAIN), folder / MODEL
    if record is None or (record.settings_digest, record.data_digest) != (settings, data):
        return None
    return record if path.exists() and sha256_file(path) == record.model_digest else None


def wanted(settings: SiteSettings) -> TrainTeacher:
    """Return the settings of the teacher to be trained. Raises `TeacherError` for a hosted one."""
    if settings.teacher.kind != "train":
        raise TeacherError(
            f"{settings.name}: teacher.kind is {settings.teacher.kind!r}; only 'train' is trained here",
            hint="A hosted teacher needs no training",
        )
    return settings.teacher


def settings_digest(teacher: TrainTeacher, seed: int) -> str:
    """Return what tells one training's settings from another's."""
    return sha256(canonical_json({"teacher": teacher.identity(), "seed": seed}))
