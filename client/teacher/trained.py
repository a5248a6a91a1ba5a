"""The teacher that Consilience trains itself, on the site's private data.

Lives here: which samples are learned from and which are held out, what is written to state/teacher, and loading it.
Does not live here: the training loop and the architectures (common/nets).

state/teacher/ holds model.safetensors, teacher.json (a `TrainedTeacher`) and training/ (the loop's checkpoint).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import nn

from consilience.client.kept import read_kept
from consilience.client.teacher.protocol import ScoringTeacher, fingerprint_of, read_model
from consilience.client.teacher.state_dict import network_scores, read_weights
from consilience.common.data import ImageData, open_data
from consilience.common.epochs import EpochRecord
from consilience.common.errors import StudentError, TeacherError
from consilience.common.files import canonical_json, lock, sha256, sha256_file, write_json
from consilience.common.nets import Supervised, build, default_device, save_model, scores, train
from consilience.common.nets.losses import Loss
from consilience.common.nets.own_networks import check_own, code_of
from consilience.common.seeds import derive
from consilience.common.settings import Preprocessing, Settings, SiteSettings, TrainTeacher

HOLDOUT = "holdout"
"""Purpose of the seed that decides which samples are held out."""
MODEL, RECORD = "model.safetensors", "teacher.json"
"""Files in the folder of a trained teacher."""
RETRAIN = "Run `consilience site train`"
_SAMPLED = 256
"""Images, spread evenly, whose bytes tell one state of the private data from another."""


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


def trained_record(settings: SiteSettings) -> TrainedTeacher:
    """Return teacher.json. Raises `TeacherError` when it is not there or of other settings."""
    return record_in(settings.state / "teacher", wanted(settings), settings.seed)


def record_in(folder: Path, teacher: TrainTeacher, seed: int) -> TrainedTeacher:
    """Return teacher.json of `folder`. Raises `TeacherError` when it is not there or of other settings."""
    return trained_in(folder, TrainedTeacher, settings_digest(teacher, seed))


def present_classes(data: ImageData) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Return (n,) int64 labels numbered by the classes that have a sample, and the names of these, in order.

    Raises `DataError` without labels, `TeacherError` without samples.
    """
    labels = data.need_labels("The site's private data")
    present = np.unique(labels)
    if not len(present):
        raise TeacherError("The site's private data holds no sample", hint="Name data with at least one image")
    return np.searchsorted(present, labels), tuple(data.class_names[k] for k in present)


def held_out(settings: SiteSettings, data: ImageData, digest: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return sorted ids (n,) of `data`, of digest `digest`, that the trained teacher has not learned from, and labels.

    Labels (n,) are numbered as the teacher's classes. Raises `TeacherError` when it was trained on other data.
    """
    if trained_record(settings).data_digest != digest:
        raise TeacherError(
            f"{settings.name}: the private data are not those that the teacher was trained on", hint=RETRAIN
        )
    labels, _ = present_classes(data)
    _, ids = split(labels, wanted(settings).holdout, derive(settings.seed, HOLDOUT))
    return ids, labels[ids]


def split(labels: NDArray[np.int64], share: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return sorted ids to learn from and to hold out: `share` of each class, rounded, but never the whole class."""
    random = np.random.default_rng(seed)
    held_out = np.zeros(len(labels), np.bool_)
    for label in np.unique(labels):
        ids = random.permutation(np.flatnonzero(labels == label))
        held_out[ids[: min(round(share * len(ids)), len(ids) - 1)]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def digest_of(data: ImageData) -> str:
    """Return what tells data from others: labels (without any, how many images) and some images. Raises `DataError`."""
    labels = data.many if data.labels is None else data.labels
    told = len(data) if labels is None else sha256(labels.tobytes())
    some = np.unique(np.linspace(0, len(data) - 1, _SAMPLED if len(data) else 0).astype(np.int64))
    images = sha256(np.ascontiguousarray(data.read(some)).tobytes())
    return sha256(canonical_json([data.shape, data.class_names, told, images]))


def wanted(settings: SiteSettings) -> TrainTeacher:
    """Return the settings of the teacher to be trained. Raises `TeacherError` for a hosted one."""
    if settings.teacher.kind != "train":
        raise TeacherError(
            f"{settings.name}: teacher.kind is {settings.teacher.kind!r}; only 'train' is trained here",
            hint="A hosted teacher needs no training",
        )
    return settings.teacher


def private_data(settings: SiteSettings) -> ImageData:
    """Open the site's private data. Raises `TeacherError` where the settings name none, `DataError`."""
    if settings.data is None:
        raise TeacherError("The site has no private data to train on", hint="Set data in the site's settings")
    return open_data(settings.data)


def as_used(preprocessing: Preprocessing, shape: tuple[int, int, int]) -> Preprocessing:
    """Return the preprocessing with the data's size and channels where it leaves them open."""
    channels = preprocessing.channels or shape[2]
    if len(preprocessing.mean) not in (1, channels):
        raise TeacherError(
            f"teacher.preprocessing.mean has {len(preprocessing.mean)} values; the images have {channels} channels",
            hint="Give one value for all channels or one each",
        )
    return preprocessing.model_copy(update={"size": preprocessing.size or shape[:2], "channels": channels})


def settings_digest(teacher: TrainTeacher, seed: int) -> str:
    """Return what tells one training's settings from another's."""
    return sha256(canonical_json({"teacher": teacher.identity(), "seed": seed}))


def done_in(folder: Path, kind: type[Trained], settings: str, data: str) -> Trained | None:
    """Return teacher.json of `folder` where it is of settings and data of these digests, and its model is there.

    Raises `TeacherError` when it is not as it must be, `StorageError`.
    """
    record, path = read_kept(folder / RECORD, kind, TeacherError, RETRAIN), folder / MODEL
    if record is None or (record.settings_digest, record.data_digest) != (settings, data):
        return None
    return record if path.exists() and sha256_file(path) == record.model_digest else None


def trained_in(folder: Path, kind: type[Trained], settings: str) -> Trained:
    """Return teacher.json of `folder`. Raises `TeacherError` when it is not there or of settings of another digest."""
    record = read_kept(folder / RECORD, kind, TeacherError, RETRAIN)
    if record is None:
        raise TeacherError(f"{folder}: holds no trained teacher", hint=RETRAIN)
    if record.settings_digest != settings:
        raise TeacherError(f"{folder}: the teacher there was trained from other settings or another seed", hint=RETRAIN)
    return record
