"""The learn stage where features are learnt from: what the sites told, brought together as the job says.

Lives here: lessons for `learning.learn`, and what is written about them in RUN/student/amalgamation.json. Does not live
here: the methods themselves (server/student), and what fits a student (server/student_taps).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from consilience.common.cards import SiteCard
from consilience.common.epochs import EpochRecord, epoch_task
from consilience.common.files import write_json
from consilience.common.labels import LabelSpace
from consilience.common.nets import default_device, train
from consilience.common.nets.taps import taps
from consilience.common.pool import Pool
from consilience.common.preprocessing import ImageRows
from consilience.common.progress import Reporter
from consilience.common.settings import Fit, JobSettings, Student
from consilience.common.taps_asked import components_asked, tap_in
from consilience.server.answers import AnswerStore
from consilience.server.components import components_path, lacking_components
from consilience.server.learning import BuildStudent, FingerprintedLoss, Lesson, decoded
from consilience.server.stores import feature_stores
from consilience.server.student.common_feature import Weights
from consilience.server.student.learn_common import (
    CommonLoss,
    CommonStudent,
    Space,
    common_fingerprint,
    need_spaces,
    told_of,
)
from consilience.server.student.learn_layers import LayerLesson, LayerTaps, need_layers
from consilience.server.student.scores import SQUARED_RATE, ConcatenatedScores, ConcatenatedSoftmax
from consilience.server.student.site_taps import SiteTap, most_together
from consilience.server.student.wanted import Wanted
from consilience.server.student_taps import StudentTaps

FILE = "amalgamation.json"
"""In the student's folder: what the report tells of features."""


def site_taps(run: Path, job: JobSettings, cards: Sequence[SiteCard], pool: Pool) -> dict[str, dict[str, SiteTap]]:
    """Return site -> tap -> its features, of the sites that told any, and what their components stand for where the job
    needs that. Raises as `feature_stores`."""
    found: dict[str, dict[str, SiteTap]] = {}
    for card in cards:
        stores = feature_stores(run, job, card, pool)
        told = {} if card.features is None else {tap.name: tap for tap in card.features.taps}
        lacking, needed = lacking_components(run, job, card), {tap.name for tap in components_asked(job, card)}
        held = {
            name: SiteTap(
                card.name, told[name], store, components_path(run, card.name, told[name]) if name in needed else None
            )
            for name, store in stores.items()
            if len(store) and name not in lacking
        }
        if held:
            found[card.name] = held
    return found


def concatenated_loss(
    folder: Path,
    job: JobSettings,
    space: LabelSpace,
    stores: Sequence[AnswerStore],
    fingerprint: str,
    samples: NDArray[np.int64] | None,
    wanted: Wanted | None = None,
) -> FingerprintedLoss:
    """Return the loss of the papers: the sites' scores side by side, decoded once into files in `folder`.

    `wanted`: the student's classes, where these are not all. Raises `StudentError` where several sites know one class.
    """
    about = (decoded(folder, space, stores), space.class_sets, default_device(), fingerprint, samples, wanted)
    if job.student.learning == "layer-wise":
        return ConcatenatedScores(*about)
    return ConcatenatedSoftmax(*about, temperature=job.unify.temperature)


def joint_fit(settings: Student) -> Fit:
    """Return how the whole student is trained: by `student.fit`, scores by squared error at a part of its rate."""
    fit = settings.fit
    if settings.learning == "layer-wise" and settings.target == "concatenated":
        return fit.model_copy(update={"learning_rate": SQUARED_RATE * fit.learning_rate})
    return fit


def feature_lesson(
    run: Path,
    job: JobSettings,
    cards: Sequence[SiteCard],
    pool: Pool,
    scores: FingerprintedLoss,
    samples: NDArray[np.int64] | None,
) -> Lesson:
    """Return the lesson of a job that learns from features. `scores` is the loss of the scores.

    `samples` (m,): training's sample j is the pool's samples[j]; None: all are learnt from. Raises `StudentError` where
    what the sites told does not do.
    """
    told = site_taps(run, job, cards, pool)
    ids = np.arange(len(pool)) if samples is None else samples
    student = StudentTaps(job, pool)
    if job.student.learning == "layer-wise":
        layers, few = _layers(told, student, ids)
        need_layers(layers)
        without = _others(cards, {tap.site for tap in layers[0].taps})
        lesson = LayerLesson(
            layers,
            scores,
            scores.fingerprint,
            ids,
            job.student.layer_wise,
            job.student.preprocessing,
            architecture=job.student.architecture,
            batch=job.student.fit.batch_size,
            seed=job.seed,
        )
        return LayersThenAll(lesson, scores, job.student, job.seed, without, few)
    spaces = []
    for wanted in job.student.common_feature.spaces:
        chosen = []
        for card in cards:
            held = told.get(card.name, {})
            if (name := tap_in(wanted, card)) in held:
                chosen.append(held[name])
        own = student.tap_for(wanted, [tap.card for tap in chosen])
        spaces.append(Space(own, student.shapes[own], tuple(chosen), wanted.width, wanted.size))
    need_spaces(spaces)
    without = _others(cards, {tap.site for space in spaces for tap in space.taps})
    return TogetherInCommon(spaces, scores, job.student, job.seed, ids, without)


def _layers(
    told: dict[str, dict[str, SiteTap]], student: StudentTaps, ids: NDArray[np.int64]
) -> tuple[list[LayerTaps], dict[str, int]]:
    """Return each layer's taps, and of how many samples those sites told that told too few: site -> samples.

    Layers learn from samples of which all is told: a site that lacks a layer would leave none, and one that told little
    no more than that. Such sites are left out where the others are wide enough without them; where they do not do
    without one that lacks a layer, all are returned.
    """
    names = list(student.layouts)
    known = {
        site: np.logical_and.reduce([held[name].known[ids] for name in names])
        for site, held in told.items()
        if all(name in held for name in names)
    }
    whole = {site: held for site, held in told.items() if site in known and known[site].sum() > 1}

    def enough(sites: Collection[str]) -> bool:
        wide = [
            own.channels <= sum(told[s][name].card.channels for s in sites) for name, own in student.layouts.items()
        ]
        return len(sites) > 0 and all(wide)

    if not enough(whole):
        return [LayerTaps(name, tuple(held[name] for held in told.values() if name in held)) for name in names], {}
    kept = most_together({site: known[site] for site in whole}, enough)
    few = {site: int(known[site].sum()) for site in whole if site not in kept}
    return [LayerTaps(name, tuple(whole[site][name] for site in kept)) for name in names], few


def _others(cards: Sequence[SiteCard], sites: set[str]) -> tuple[str, ...]:
    return tuple(card.name for card in cards if card.name not in sites)


@dataclass(frozen=True)
class LayersThenAll:
    """Layer-wise amalgamation: each layer by itself, then, with `layer_wise.joint`, the whole student."""

    layers: LayerLesson
    scores: FingerprintedLoss
    settings: Student
    seed: int
    without: tuple[str, ...]
    few: Mapping[str, int]
    """Those of `without` whose features were left out because they are of too few samples, and of how many."""

    @property
    def fingerprint(self) -> str:
        """What is learnt from."""
        return self.layers.fingerprint

    def teach(
        self, build: BuildStudent, images: ImageRows, folder: Path, reporter: Reporter, name: str
    ) -> tuple[nn.Module, list[EpochRecord]]:
        """See `Lesson.teach`; the epochs are those of the joint phase. Raises `StudentError`, `StorageError`."""
        device, model = default_device(), build()
        task, lock = reporter.start(f"training layers of {name}", len(taps(model))), threading.Lock()

        def on_layer() -> None:
            with lock:
                task.advance(1)

        told = self.layers.teach(model, images, _beside(folder), device, workers=_workers(device), on_layer=on_layer)
        records: list[EpochRecord] = []
        if self.settings.layer_wise.joint:
            fit = joint_fit(self.settings)
            records = train(
                model,
                images,
                self.scores,
                fit,
                self.settings.preprocessing,
                seed=self.seed,
                folder=folder / "training",
                on_epoch=epoch_task(reporter, f"training {name}", fit.epochs),
                device=device,
            )
        picture = self.layers.picture(model, images, _beside(folder), device)
        about = {"samples": len(self.layers.places), "too_few": dict(self.few)}
        _write(folder, self, {"layers": told, **about, "picture": picture})
        return model, records


@dataclass(frozen=True)
class TogetherInCommon:
    """Common-feature learning: soft targets and common spaces in one training."""

    spaces: Sequence[Space]
    scores: FingerprintedLoss
    settings: Student
    seed: int
    samples: NDArray[np.int64]
    without: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """What is learnt from."""
        return f"{common_fingerprint(self.spaces, self._weights)} {self.scores.fingerprint}"

    @property
    def _weights(self) -> Weights:
        chosen = self.settings.common_feature
        return Weights(chosen.soft, chosen.mmd, chosen.reconstruction)

    def teach(
        self, build: BuildStudent, images: ImageRows, folder: Path, reporter: Reporter, name: str
    ) -> tuple[nn.Module, list[EpochRecord]]:
        """See `Lesson.teach`; the spaces are trained too. Raises `StudentError`, `StorageError`."""
        device, model = default_device(), build()
        whole = CommonStudent(model, self.spaces, self._weights, self.seed)
        records = train(
            whole,
            images,
            CommonLoss(whole, self.spaces, self.scores, self.scores.fingerprint, self.samples),
            self.settings.fit,
            self.settings.preprocessing,
            seed=self.seed,
            folder=_beside(folder),
            on_epoch=epoch_task(reporter, f"training {name}", self.settings.fit.epochs),
            device=device,
        )
        told = told_of(
            whole, self.spaces, images, self.samples, self.settings.preprocessing, device, self.settings.fit.batch_size
        )
        _write(folder, self, {"spaces": told, "weights": vars(self._weights)})
        return model, records


def _beside(folder: Path) -> Path:
    """Return where pieces lie that tell of teachers: not in the student's folder, which is shown to others."""
    return folder.parent / "amalgamation"


def _write(folder: Path, lesson: LayersThenAll | TogetherInCommon, told: dict[str, Any]) -> None:
    about = {"learning": lesson.settings.learning, "target": lesson.settings.target, "without": list(lesson.without)}
    write_json(folder / FILE, about | told)


def _workers(device: torch.device) -> int:
    """Return how many layers to train at a time: on a GPU decoding and steps overlap, a CPU has its threads already."""
    return 4 if device.type == "cuda" else max(1, (os.cpu_count() or 1) // torch.get_num_threads())
