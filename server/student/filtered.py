"""Filtered amalgamation from end to end (Ye et al., IJCAI 2019; methods.md section 3).

Lives here: the order of its steps, the samples that are held out of them, what of them is kept on disk, what the
report tells. Does not live here: the steps themselves (filtered_blocks, filtered_branches), how much of
a teacher that stays at its site is asked (common/nets/tail_plan).

Samples held out, drawn by the seed, choose the branches; after that there is no choice left to make, and all samples
are learnt from together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from consilience.common.epochs import EpochRecord
from consilience.common.errors import StudentError
from consilience.common.files import canonical_json, sha256
from consilience.common.nets import Loss, build
from consilience.common.nets.seeding import generator
from consilience.common.preprocessing import ImageRows, Images
from consilience.common.seeds import derive
from consilience.common.settings import Fit, Preprocessing
from consilience.common.settings.filtered import Filtered
from consilience.server.student.filtered_blocks import FilteredTrunk, agreement, train_blocks
from consilience.server.student.filtered_branches import BranchLoss, ScoresLoss, assemble, choose, train_together
from consilience.server.student.filtered_student import (
    FilteredStudent,
    finished,
    parameters,
    read_about,
    rebuild,
    trimmed,
)
from consilience.server.student.filtered_tasks import Matter
from consilience.server.student.kept import keep, kept
from consilience.server.student.remote_tail import RemoteTail

OnEpoch = Callable[[EpochRecord], None]


class Rows:
    """Some of a training's images, (m, H, W, C) uint8, read when they are indexed."""

    ndim, dtype = 4, np.dtype(np.uint8)

    def __init__(self, images: ImageRows, places: NDArray[np.int64]) -> None:
        self._images, self._places = images, places

    @property
    def shape(self) -> tuple[int, ...]:
        """(m, H, W, C)."""
        return len(self), *self._images.shape[1:]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, at: slice | NDArray[np.int64]) -> Images:
        """Return the images at these places."""
        return self._images[self._places[at]]


class FilteredLesson:
    """All that a student of chosen tasks learns from.

    `matter` says what of whom, `architecture` is the student's, `fit` that of the whole student; blocks are trained by
    it too, with epochs and rate of `settings`. `scores` is the loss of the scores, of which nothing is asked unless
    `settings.target` is `unified`. `answers` names what the answers are.
    """

    def __init__(
        self,
        matter: Matter,
        architecture: str,
        settings: Filtered,
        fit: Fit,
        preprocessing: Preprocessing,
        *,
        answers: str,
        seed: int,
        scores: Loss | None = None,
    ) -> None:
        """Raises `StudentError` for fewer than two samples to learn from or none to hold out, and without `scores`."""
        self._matter, self._architecture, self._settings, self._fit = matter, architecture, settings, fit
        self._preprocessing, self._seed, self._scores = preprocessing, seed, scores
        self.kept, self.held = held_out(len(matter.samples), settings.held_out, seed)
        if settings.target == "unified" and settings.joint and scores is None:
            raise StudentError("There is no loss for unified labels", hint="Set student.filtered.target to teachers")
        about = {
            "architecture": architecture,
            "settings": settings.model_dump(mode="json"),
            "fit": fit.model_dump(mode="json"),
            "preprocessing": preprocessing.model_dump(mode="json"),
            "tails": [[teacher.tail.site, teacher.tail.fingerprint, teacher.multi] for teacher in matter.teachers],
            "tasks": [asdict(task) for task in matter.tasks],
            "samples": sha256(np.ascontiguousarray(matter.samples).data),
            "seed": seed,
        }
        self.fingerprint = f"filtered {sha256(canonical_json(about))} {answers} {getattr(scores, 'fingerprint', '')}"

    @property
    def stages(self) -> int:
        """How many blocks are trained by themselves."""
        tails = [teacher.tail for teacher in self._matter.teachers]
        return max(len(tail.taps) for tail in tails) - min(tail.first for tail in tails)

    @property
    def target(self) -> str:
        """What all together learn."""
        return self._settings.target or "teachers"

    def teach(
        self,
        images: ImageRows,
        folder: Path,
        device: torch.device,
        *,
        on_epoch: OnEpoch | None = None,
    ) -> tuple[FilteredStudent, list[EpochRecord], dict[str, Any]]:
        """Return the student, the epochs of training all together, and what the report tells.

        `images` (m, H, W, C) are those learnt from. What is done is kept in `folder`, so that a second call goes on.
        The student is left on `device` in evaluation mode. Raises `StudentError`, `StorageError`, and `ProtocolError`
        where a remote tail answers what it must not.
        """
        path = folder / "filtered.safetensors"
        if (found := kept(path, self.fingerprint)) is not None:
            student = rebuild(read_about(found[1]["about"]))
            student.load_state_dict(found[0])
            return student.to(device).eval(), [EpochRecord(**each) for each in found[1]["epochs"]], found[1]["told"]
        student, told = self._branched(images, folder, device, on_epoch)
        records: list[EpochRecord] = []
        if self._settings.joint:
            records = train_together(
                student,
                self._loss(),
                images,
                self._fit,
                self._preprocessing,
                seed=derive(self._seed, "together"),
                folder=folder / "together",
                on_epoch=on_epoch,
                device=device,
            )
        student = finished(student).to(device)
        about = student.about.model_dump(mode="json")
        epochs = [asdict(record) for record in records]
        keep(path, self.fingerprint, student.state_dict(), {"about": about, "epochs": epochs, "told": told})
        return student, records, told

    def _loss(self) -> BranchLoss | ScoresLoss:
        if self._settings.target == "unified":
            assert self._scores is not None
            return ScoresLoss(self._scores, self.fingerprint)
        return BranchLoss(self._matter, self.fingerprint)

    def _branched(
        self, images: ImageRows, folder: Path, device: torch.device, on_epoch: OnEpoch | None
    ) -> tuple[FilteredStudent, dict[str, Any]]:
        """Train the blocks, choose the branches, and return the student that begins with them."""
        settings, matter, channels = self._settings, self._matter, self._preprocessing.channels or images.shape[3]
        network = build(self._architecture, classes=1, channels=channels, seed=self._seed)
        trunk = FilteredTrunk(network, self._architecture, matter, settings.filters, self._seed)
        fit = self._fit.model_copy(update={"epochs": settings.epochs, "learning_rate": settings.learning_rate})
        records = train_blocks(
            trunk,
            matter.with_samples(matter.samples[self.kept]),
            Rows(images, self.kept),
            fit,
            self._preprocessing,
            seed=self._seed,
            fingerprint=self.fingerprint,
            folder=folder,
            sampled=settings.order == "sampled",
            device=device,
            on_epoch=on_epoch,
        )
        found = self._agreement(trunk, images, folder, device)
        blocks = choose(found, trunk.stages, matter)
        student = assemble(trunk, matter, blocks, channels, branches=settings.branches, seed=self._seed)
        parts = parameters(trimmed(student.about))
        told = {
            "blocks": {name: [record.loss for record in each] for name, each in records.items()},
            "held_out": len(self.held),
            "branches": [
                {
                    "task": task.name,
                    "site": matter.teachers[task.teacher].tail.site,
                    "block": block,
                    "begins": self._begins(task.teacher),
                    "classes": list(task.classes),
                    "agreement": {
                        str(stage): None if np.isnan(each) else float(each)
                        for stage, each in zip(trunk.stages, found[:, at], strict=True)
                    },
                    "parameters": parts.branches[at],
                }
                for at, (task, block) in enumerate(zip(matter.tasks, blocks, strict=True))
            ],
            "parameters": {
                "trunk": parts.trunk,
                "filters": parts.filters,
                "branches": sum(parts.branches),
                "total": parts.total,
                "learning": parameters(student.about).total,
            },
            "asked": {
                tail.site: asdict(tail.spent)
                for tail in (teacher.tail for teacher in matter.teachers)
                if isinstance(tail, RemoteTail)
            },
        }
        return student, told

    def _begins(self, teacher: int) -> str:
        if self._matter.teachers[teacher].tail.lent is None:
            return "fresh"
        return self._settings.branches

    def _agreement(
        self, trunk: FilteredTrunk, images: ImageRows, folder: Path, device: torch.device
    ) -> NDArray[np.float64]:
        """Return what branches are chosen by, unless it lies in `folder`."""
        path, key = folder / "agreement.safetensors", self.fingerprint
        if (found := kept(path, key)) is not None:
            return np.asarray(found[0]["agreement"].numpy())
        measured = agreement(
            trunk,
            self._matter.with_samples(self._matter.samples[self.held]),
            Rows(images, self.held),
            self._preprocessing,
            device,
            self._fit.batch_size,
        )
        keep(path, key, {"agreement": torch.from_numpy(measured)})
        return measured


def held_out(samples: int, share: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the places of training's `samples` that are learnt from, and those held out, each in order.

    `share` of all is held out, one at least. Raises `StudentError` unless two are left.
    """
    count = max(1, round(share * samples))
    if samples - count < 2:
        raise StudentError(
            f"There are {samples} samples to learn from; filtered amalgamation holds {share:.0%} of them out and needs "
            "two more at least",
            hint="Take a larger pool, or lower student.filtered.held_out",
        )
    order = torch.randperm(samples, generator=generator(seed, "held out")).numpy()
    return np.sort(order[count:]), np.sort(order[:count])
