"""The learn stage: the student from soft labels or answers, and the oracle from true labels.

Lives here: which loss a job wants and what is written beside the student. Does not live here: the training loop
and the architectures (common/nets), the losses (server/student).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from consilience.common.epochs import EpochRecord, epoch_task
from consilience.common.errors import SettingsError, StudentError
from consilience.common.files import canonical_json, create_array, read_json, sha256, write_json
from consilience.common.labels import LabelSpace
from consilience.common.nets import Supervised, build, default_device, load_model, save_model, scores, train
from consilience.common.nets.losses import SupervisedLabels
from consilience.common.nets.own_networks import check_own
from consilience.common.preprocessing import ImageRows, Images
from consilience.common.progress import Reporter
from consilience.common.settings import Preprocessing, Student
from consilience.server.answered import CoverageStores, block_size, blocks
from consilience.server.answers import AnswerStore
from consilience.server.student.concentrated_head import HeadPlan, place, verticals_in
from consilience.server.student.direct import DirectCE, DirectMFLF
from consilience.server.student.filtered_student import FilteredStudent, read_about, rebuild
from consilience.server.student.own_taps import own_taps
from consilience.server.student.soft_labels import SoftLabels
from consilience.server.student.soft_multi import SoftMultiLabels
from consilience.server.student.wanted import Wanted


class FingerprintedLoss(Protocol):
    """A loss of common/nets that says what it learns from."""

    fingerprint: str

    def __call__(self, logits: Tensor, ids: Tensor) -> Tensor:
        """Return the scalar loss of (b, L) logits for the samples `ids` (b,)."""


BuildStudent = Callable[[], nn.Module]
"""Makes the student that the settings name, freshly initialised."""


class Lesson(Protocol):
    """What a student learns from, and how."""

    @property
    def fingerprint(self) -> str:
        """What tells it from other lessons."""

    def teach(
        self, build: BuildStudent, images: ImageRows, folder: Path, reporter: Reporter, name: str
    ) -> tuple[nn.Module, list[EpochRecord]]:
        """Return a student trained on `images` (m, H, W, C), and its epochs; what is kept goes into `folder`.

        It is the network of `build`, or one that the lesson makes. Goes on where it was interrupted. `name` says in
        progress what is trained.
        """


@dataclass(frozen=True)
class ByLoss:
    """The lesson of one loss of the scores."""

    loss: FingerprintedLoss
    settings: Student
    seed: int

    @property
    def fingerprint(self) -> str:
        """The loss's."""
        return self.loss.fingerprint

    def teach(
        self, build: BuildStudent, images: ImageRows, folder: Path, reporter: Reporter, name: str
    ) -> tuple[nn.Module, list[EpochRecord]]:
        """See `Lesson.teach`. Raises `StudentError`, `StorageError`."""
        model = build()
        return model, train(
            model,
            images,
            self.loss,
            self.settings.fit,
            self.settings.preprocessing,
            seed=self.seed,
            folder=folder / "training",
            on_epoch=epoch_task(reporter, f"training {name}", self.settings.fit.epochs),
        )


FILTERED = "filtered"
"""The architecture, in preprocessing.json, of a student that its folder's filtered.json describes."""
FILTERED_FILE = "filtered.json"


class StudentModel:
    """A trained student in its folder: model.safetensors, labels.json, preprocessing.json; filtered.json where it is
    made of a trunk and branches."""

    def __init__(self, folder: Path) -> None:
        """Load it. Raises `StudentError` when the folder lacks a file or they do not fit together."""
        self.folder = folder
        for name in ("model.safetensors", "labels.json", "preprocessing.json"):
            if not (folder / name).exists():
                raise StudentError(f"{folder} holds no student: {name} is missing", hint="Name a run's student folder")
        labels = read_json(folder / "labels.json")
        self.other: bool | None = labels.get("other")
        """Of a student of chosen classes: whether its last output is all that is none of them. None: it has all."""
        about = read_json(folder / "preprocessing.json")
        self.labels: tuple[str, ...] = tuple(labels["labels"])
        self.multi: bool = labels.get("kind") == "multi"
        """Whether the labels do not exclude one another."""
        self.architecture: str = about["architecture"]
        self.shape: tuple[int, int, int] = tuple(about["shape"])
        self.preprocessing = Preprocessing.model_validate(about["preprocessing"])
        self.head = None if about.get("head") is None else HeadPlan.model_validate(about["head"])
        self.filtered = self.architecture == FILTERED
        """Whether it is made of a trunk and branches (server/student/filtered_student)."""
        self.model = self._filtered() if self.filtered else self._whole()
        load_model(folder / "model.safetensors", self.model)

    def _whole(self) -> nn.Module:
        about = (self.architecture, len(self.labels), self.shape, self.preprocessing)
        return build_student(*about, seed=0, head=self.head)

    def _filtered(self) -> nn.Module:
        about = read_about(read_json(self.folder / FILTERED_FILE))
        channels = self.preprocessing.channels or self.shape[2]
        if (about.classes, about.channels) != (len(self.labels), channels):
            raise StudentError(
                f"{self.folder / FILTERED_FILE} tells of {about.classes} classes and {about.channels} channels; the "
                f"student's labels are {len(self.labels)}, its images have {channels}",
                hint="Restore the student's files, or train again",
            )
        return rebuild(about)

    def log_probs(self, images: Images) -> NDArray[np.float32]:
        """Return (n, L) float32 log-probabilities of (n, H, W, C) uint8 images; of each label by itself if `multi`."""
        if images.shape[1:] != self.shape:
            raise StudentError(
                f"Images have shape {images.shape[1:]}; the student was trained on {self.shape}",
                hint="Bring the images to that shape",
            )
        logits = torch.from_numpy(scores(self.model, images, self.preprocessing))
        return log_probs_of(logits, multi=self.multi).numpy()


def log_probs_of(logits: Tensor, *, multi: bool) -> Tensor:
    """Return the log-probabilities of a student's logits (n, L): of classes, or of each label by itself."""
    return nn.functional.logsigmoid(logits) if multi else torch.log_softmax(logits, dim=1)


def learn(
    folder: Path,
    images: ImageRows,
    space: LabelSpace,
    lesson: Lesson,
    settings: Student,
    seed: int,
    reporter: Reporter,
    name: str,
    other: bool | None = None,
    head: HeadPlan | None = None,
) -> list[dict[str, Any]]:
    """Train a student in `folder` from `images` (n, H, W, C) by `lesson`; resumes, and returns at once when done.

    `space` are its outputs. `other`, of a student of chosen classes: whether the last is all that is none of them.
    `head`: what takes the place of its last layer, where something does. Returns the learning curve, one dict an epoch.
    Raises `StudentError`, `StorageError`.
    """
    shape = (int(images.shape[1]), int(images.shape[2]), int(images.shape[3]))
    about = {"settings": settings.model_dump(mode="json"), "labels": space.names, "shape": shape, "seed": seed}
    placed = {} if head is None else {"head": head.model_dump(mode="json")}
    key = sha256(canonical_json({**about, **placed, "loss": lesson.fingerprint, "samples": len(images)}))
    done = folder / "learning_curve.json"
    if done.exists():
        held = read_json(done)
        if held["key"] == key and (folder / "model.safetensors").exists():
            epochs: list[dict[str, Any]] = held["epochs"]
            return epochs

    def build() -> nn.Module:
        return build_student(settings.architecture, len(space), shape, settings.preprocessing, seed, head)

    model, records = lesson.teach(build, images, folder, reporter, name)
    filtered = isinstance(model, FilteredStudent)
    if isinstance(model, FilteredStudent):
        write_json(folder / FILTERED_FILE, model.about.model_dump(mode="json"))
    epochs = [asdict(record) for record in records]
    save_model(folder / "model.safetensors", model)
    kind = {"kind": "multi"} if space.multi else {}
    write_json(folder / "labels.json", {"labels": space.names} | ({} if other is None else {"other": other}) | kind)
    write_json(
        folder / "preprocessing.json",
        {
            "architecture": FILTERED if filtered else settings.architecture,
            "shape": shape,
            "preprocessing": settings.preprocessing.model_dump(mode="json"),
            **placed,
        },
    )
    write_json(done, {"key": key, "epochs": epochs})
    return epochs


def build_student(
    architecture: str,
    classes: int,
    shape: tuple[int, int, int],
    preprocessing: Preprocessing,
    seed: int,
    head: HeadPlan | None = None,
) -> nn.Module:
    """Return an untrained student for images of `shape` (H, W, C); a user's own network is tried on two.

    `head`: a head of verticals over the same classes, which takes the place of the architecture's last layer.
    Raises `SettingsError`, `MissingExtraError`.
    """
    channels = preprocessing.channels or shape[2]
    network = build(architecture, classes=classes, channels=channels, seed=seed)
    fed = (channels, *(preprocessing.size or shape[:2]))
    check_own(architecture, network, fed, classes)
    if head is not None:
        place(network, head, fed, seed, architecture)
    return network


def check_student(settings: Student, shape: tuple[int, int, int]) -> None:
    """Find out before anything is asked whether the student can be built for images of `shape` (H, W, C).

    Raises `SettingsError`, `MissingExtraError`.
    """
    channels = settings.preprocessing.channels or shape[2]
    if len(settings.preprocessing.mean) not in (1, channels):
        raise SettingsError(
            f"job.yaml: field 'student.preprocessing.mean' has {len(settings.preprocessing.mean)} values; the images "
            f"have {channels} channels",
            hint="Give one value for all channels or one each, or set preprocessing.channels",
        )
    head = None
    if settings.learning == "concentration":
        head = HeadPlan(head=settings.concentration.head, verticals=verticals_in([1, 1]))
    network = build_student(settings.architecture, 2, shape, settings.preprocessing, seed=0, head=head)
    if settings.learns_features:
        own_taps(network, settings, shape)


def soft_label_loss(
    labels: NDArray[np.float32],
    temperature: float,
    fingerprint: str,
    samples: NDArray[np.int64] | None = None,
    other: NDArray[np.float32] | None = None,
    wanted: Wanted | None = None,
) -> FingerprintedLoss:
    """Return the loss of the -X route, for all of `labels` or the rows `samples`.

    `other` (n,): how likely each sample is outside the label space, where that is known. `wanted`: the student's
    classes, where these are not all.
    """
    return SoftLabels(labels, default_device(), temperature, fingerprint, samples, other, wanted)


def soft_multi_loss(
    labels: NDArray[np.float32],
    temperature: float,
    fingerprint: str,
    samples: NDArray[np.int64] | None = None,
    wanted: Wanted | None = None,
) -> FingerprintedLoss:
    """Return the loss of unified labels that do not exclude one another, for all of `labels` or the rows `samples`.

    `wanted`: the student's labels, where these are not all.
    """
    classes = None if wanted is None else wanted.classes
    return SoftMultiLabels(labels, default_device(), temperature, fingerprint, samples, classes)


def direct_loss(
    folder: Path,
    kind: str,
    space: LabelSpace,
    stores: Sequence[AnswerStore],
    weights: Sequence[float],
    temperature: float,
    fingerprint: str,
    samples: NDArray[np.int64] | None = None,
    coverage: CoverageStores | None = None,
    strength: Sequence[float] = (1.0,),
    wanted: Wanted | None = None,
) -> FingerprintedLoss:
    """Return the loss of a -BP route, for all samples or `samples`.

    The answers are decoded once into memory-mapped files in `folder`. Sites that did not answer a sample have no
    part in its loss. `coverage`: one store a site, None for a site that was not asked; `direct-ce` makes use of it,
    by `strength`: one number a site, or one for all. `wanted`: the student's classes, where these are not all.
    """
    total = stores[0].about.size
    maps = _answer_files(folder, space, total)
    told = None
    if kind == "direct-ce" and any(store is not None for store in coverage or []):
        told = create_array(folder / "coverage.npy", np.float32, (total, len(stores)))
    for block in blocks(stores, block_size(space), coverage):
        for held, rows in zip(maps, block.answers, strict=True):
            if rows is not None:
                held[block.ids] = rows
        if told is not None:
            for i, values in enumerate(block.coverage):
                told[block.ids, i] = np.nan if values is None else values
    answered = None
    if not all(store.complete for store in stores):
        answered = np.stack([store.answered(0, total) for store in stores], axis=1)
    about = (maps, space.class_sets, weights, default_device(), temperature, fingerprint, answered, samples, wanted)
    return DirectCE(*about, coverage=told, strength=strength) if kind == "direct-ce" else DirectMFLF(*about)


def decoded(folder: Path, space: LabelSpace, stores: Sequence[AnswerStore]) -> list[NDArray[np.float32]]:
    """Return the sites' log-probabilities as memory-mapped files in `folder`, (size, k_i), zeros where none are."""
    maps = _answer_files(folder, space, stores[0].about.size)
    for block in blocks(stores, block_size(space)):
        for held, rows in zip(maps, block.answers, strict=True):
            if rows is not None:
                held[block.ids] = rows
    return maps


def _answer_files(folder: Path, space: LabelSpace, total: int) -> list[NDArray[np.float32]]:
    return [
        create_array(folder / f"answers-{site}.npy", np.float32, (total, len(classes)))
        for site, classes in zip(space.sites, space.class_sets, strict=True)
    ]


def oracle_loss(labels: NDArray[np.int64]) -> FingerprintedLoss:
    """Return the supervised loss of the oracle, (n,) labels in the label space."""
    return Supervised(labels, default_device())


def oracle_labels_loss(labels: NDArray[np.int8]) -> FingerprintedLoss:
    """Return the supervised loss of the oracle, (n, L) labels in the label space: 1, 0, or -1 for not known."""
    return SupervisedLabels(labels, default_device())
