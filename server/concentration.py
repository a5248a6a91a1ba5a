"""The learn stage of knowledge concentration: answers to sparse targets, and the lesson of a student with verticals.

Lives here: streaming answers into targets on disk, what is asked of a job and its contract beforehand, and what is
written about it in RUN/student/concentration.json. Does not live here: verticals, routing, head and losses
(server/student).
Nothing of size samples x classes is held in memory or written here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from consilience.common.cards import SiteCard
from consilience.common.epochs import EpochRecord
from consilience.common.errors import SettingsError
from consilience.common.files import canonical_json, create_array, sha256, write_json
from consilience.common.labels import LabelSpace
from consilience.common.nets import default_device
from consilience.common.pages.numbers import listing
from consilience.common.preprocessing import ImageRows
from consilience.common.progress import Reporter
from consilience.common.settings import JobSettings, largest_sent
from consilience.server.answered import Block, CoverageStores, block_size, blocks
from consilience.server.answers import AnswerStore
from consilience.server.chosen import Chosen
from consilience.server.labelling_solved import SolvedRows
from consilience.server.labelling_top import Labels, TopRows
from consilience.server.learning import BuildStudent, ByLoss
from consilience.server.student.concentrated_head import HeadPlan, head_of
from consilience.server.student.routing import (
    highest,
    route_by_coverage,
    route_by_labels,
    specialist_targets,
    specialists_for,
)
from consilience.server.student.sparse_loss import SparseSigmoid, SparseSoftmax, SparseTargets
from consilience.server.student.verticals import Verticals, kept, verticals_of
from consilience.server.student.wanted import Wanted

FILE = "concentration.json"
"""In the student's folder: what the report tells of verticals."""
_BY = ("coverage", "unified labels")


def check_concentration(job: JobSettings, space: LabelSpace, cards: Sequence[SiteCard]) -> None:
    """Find out before anything is asked whether the sites' classes and coverage are what a job wants.

    Raises `SettingsError`. Of a job that learns otherwise nothing is asked.
    """
    settings = job.student.concentration
    if job.student.learning != "concentration":
        return
    verticals = verticals_of(space, settings, job.labels.synonyms).among(Chosen.of(job, space).classes)
    alone = [name for name, classes in verticals.table.items() if len(classes) == 1]
    if settings.head.scaling != "none" and alone:
        raise SettingsError(
            f"job.yaml: field 'student.concentration.head.scaling' is {settings.head.scaling!r}, which teaches a "
            f"vertical of one wanted class nothing, for its one score is brought to length 1: {listing(alone, 10)}",
            hint="Set scaling to none, or name verticals with two wanted classes or more",
        )
    silent = [card.name for card in cards if card.coverage is None]
    if settings.routing == "coverage" and settings.target == "specialist" and silent:
        raise SettingsError(
            "job.yaml: field 'student.concentration.routing' is 'coverage'; these sites do not tell theirs: "
            f"{', '.join(silent[:10])}",
            hint="Ask those sites for policy.coverage, or set routing to unified or leave it out",
        )


def head_plan(job: JobSettings, chosen: Chosen) -> HeadPlan | None:
    """Return the plan of the student's head; None where it has none of verticals. Raises `SettingsError`."""
    if job.student.learning != "concentration":
        return None
    settings = job.student.concentration
    verticals = verticals_of(chosen.space, settings, job.labels.synonyms).among(chosen.classes)
    return HeadPlan(head=settings.head, verticals=verticals.table)


def concentration_lesson(
    folder: Path,
    job: JobSettings,
    chosen: Chosen,
    wanted: Wanted | None,
    stores: Sequence[AnswerStore],
    coverage: CoverageStores,
    labels: Labels,
    fingerprint: str,
    samples: NDArray[np.int64] | None = None,
    other: NDArray[np.float32] | None = None,
) -> Concentrating:
    """Return the lesson of a job; the targets are written to `folder`, a few numbers a sample.

    `wanted` cuts to the student's classes, None where it has all: a specialist's target is what it was, without the
    classes that nobody wants, for a sigmoid each asks nothing of the others; unified labels are cut as any loss of the
    scores cuts them. Which specialist teaches a sample is decided over all classes.
    `labels` (n, L) unified soft labels, memory-mapped, or those of which `keep` classes were kept.
    `other` (n,): how likely each sample is outside the label space.
    Raises `SettingsError`, `StorageError`.
    """
    settings, device, space = job.student.concentration, default_device(), chosen.space
    verticals = verticals_of(space, settings, job.labels.synonyms)
    taught = verticals.among(chosen.classes)
    most = max(taught.sizes) if settings.target == "specialist" else len(chosen.classes)
    keep = min(kept(verticals, settings), most)
    sent = largest_sent(job.ask.encoding)
    if sent is not None and settings.target == "specialist":
        keep = min(keep, sent)
    total = stores[0].about.size
    if isinstance(labels, TopRows):
        assert labels.classes.shape[1] == keep
        targets = SparseTargets(labels.classes, labels.values)
    else:
        targets = SparseTargets(
            create_array(folder / "target-classes.npy", np.int32, (total, keep)),
            create_array(folder / "target-values.npy", np.float32, (total, keep)),
        )
    count = total if samples is None else len(samples)
    told: dict[str, Any] = {
        "target": settings.target,
        "keep": keep,
        "head": settings.head.model_dump(mode="json"),
        "verticals": [
            {
                "name": name,
                "classes": [space.names[chosen.classes[output]] for output in classes],
                "specialists": [space.sites[i] for i in sites],
                "kept": min(keep, len(classes)),
            }
            for name, classes, sites in zip(taught.names, taught.classes, taught.specialists, strict=True)
        ],
        "samples": count,
    }
    cut = None if wanted is None else wanted.fingerprint
    key = sha256(canonical_json([fingerprint, settings.model_dump(mode="json"), verticals.table, keep, cut]))
    if settings.target == "unified":
        weights = None if wanted is None and other is None else np.ones(total, np.float32)
        for block in () if isinstance(labels, TopRows) else blocks(stores, block_size(space)):
            ids = block.ids
            rows, counts = _cut(labels[ids], None if other is None else np.asarray(other[ids], np.float32), wanted)
            targets.labels[ids], targets.values[ids] = highest(rows, keep)
            if weights is not None:
                weights[ids] = counts
        softmax = SparseSoftmax(targets, device, job.unify.temperature, key, samples, weights)
        return Concentrating(softmax, job.student, job.seed, told)
    assert not isinstance(labels, TopRows)  # those are for unified targets alone
    usable = np.ones(total, np.bool_) if samples is None else np.isin(np.arange(total), samples)
    routed = np.zeros((len(_BY), len(verticals)), np.int64)
    learnt, output = np.zeros(len(space), np.bool_), np.zeros(len(space), np.int32)
    learnt[list(chosen.classes)], output[list(chosen.classes)] = True, np.arange(len(chosen.classes))
    for block in blocks(stores, block_size(space), coverage):
        use = usable[block.ids]
        if not use.any():
            continue
        by, vertical, sites = _route(block, labels, space, verticals, settings.routing)
        routed[by] += np.bincount(vertical[use], minlength=len(verticals))
        found, targets.values[block.ids] = specialist_targets(
            block.answers, space.class_sets, verticals, vertical, sites, keep, job.unify.temperature, learnt
        )
        targets.labels[block.ids] = output[found]
    counts = dict(zip(verticals.names, (int(count) for count in routed.sum(axis=0)), strict=True))
    for held in told["verticals"]:
        held["samples"] = counts.pop(held["name"])
    told["samples_elsewhere"] = sum(counts.values())
    told["routed_by"] = {by: int(count.sum()) for by, count in zip(_BY, routed, strict=True)}
    key = sha256(canonical_json([key, job.unify.temperature, [c is not None for c in coverage]]))
    loss = SparseSigmoid(targets, taught.classes, device, key, samples, settings.drawn, job.seed)
    return Concentrating(loss, job.student, job.seed, told)


def _cut(
    rows: NDArray[np.float32], outside: NDArray[np.float32] | None, wanted: Wanted | None
) -> tuple[NDArray[np.floating], Any]:
    """Return unified labels (b, L) of the wanted classes, and how much each sample counts.

    `outside` (b,): how likely each sample is outside the label space.
    """
    if wanted is None:
        return rows, 1 if outside is None else 1 - outside
    told = torch.from_numpy(rows[:, list(wanted.classes)])
    cut, counts = wanted.labels(told, None if outside is None else torch.from_numpy(outside))
    return cut.numpy(), counts


def _route(
    block: Block, labels: NDArray[np.float32] | SolvedRows, space: LabelSpace, verticals: Verticals, routing: str | None
) -> tuple[int, NDArray[np.int64], NDArray[np.int64]]:
    """Return by what a block is routed, as a place in `_BY`, and its verticals and sites."""
    answered = [rows is not None for rows in block.answers]
    given = [block.coverage[i] is not None for i in block.sites]
    if routing != "unified" and given and all(given):
        return 0, *route_by_coverage(block.coverage, block.answers, space.class_sets, verticals)
    able = [any(answered[i] for i in sites) for sites in verticals.specialists]
    vertical = route_by_labels(labels[block.ids], verticals, able)
    return 1, vertical, specialists_for(vertical, verticals, answered, block.coverage)


@dataclass(frozen=True)
class Concentrating(ByLoss):
    """The lesson of sparse targets: a student with a head of verticals."""

    told: Mapping[str, Any]

    def teach(
        self, build: BuildStudent, images: ImageRows, folder: Path, reporter: Reporter, name: str
    ) -> tuple[nn.Module, list[EpochRecord]]:
        """See `Lesson.teach`; what `build` makes has such a head. Raises `StudentError`, `StorageError`."""
        model = build()
        head = head_of(model)
        assert head is not None
        head.in_parts = isinstance(self.loss, SparseSigmoid)
        try:
            _, records = super().teach(lambda: model, images, folder, reporter, name)
        finally:
            head.in_parts = False
        about = {"weights": head.weights, "gammas": [held.detach().tolist() for held in head.gammas]}
        if self.settings.concentration.head.scaling == "class":
            about.pop("gammas")  # one a class: as many as the classes are
        write_json(folder / FILE, {**self.told, **about})
        return model, records
