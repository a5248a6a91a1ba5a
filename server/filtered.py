"""The learn stage of filtered amalgamation: from a job and its sites to the lesson of a student of chosen tasks.

Lives here: what is asked of cards beforehand, tasks and teachers of a run, and what is written about them in
RUN/student/branches.json. Does not live here: the method (server/student/filtered), asking tails (server/tails).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from consilience.common.cards import SiteCard
from consilience.common.epochs import EpochRecord
from consilience.common.errors import SettingsError
from consilience.common.files import read_json, write_json
from consilience.common.nets import Loss, default_device
from consilience.common.nets.tail_plan import check_tail, sides, tail_demand, wanted_outputs
from consilience.common.pages.numbers import listing, size
from consilience.common.pool import Pool
from consilience.common.preprocessing import ImageRows
from consilience.common.progress import Reporter
from consilience.common.protocol import TailDemand
from consilience.common.settings import JobSettings
from consilience.server.answers import AnswerStore
from consilience.server.chosen import Chosen
from consilience.server.learning import BuildStudent, build_student, decoded
from consilience.server.student.filtered import FilteredLesson
from consilience.server.student.filtered_tasks import Matter, Task, Teacher
from consilience.server.tails import ASKED, Tails

FILE = "branches.json"
"""In the student's folder: what the report tells of branches."""


class TailNeeds:
    """What a job that learns through sites' last blocks needs of their cards."""

    def __init__(self, job: JobSettings, pool: Pool) -> None:
        """Look at the student's own blocks. Raises `StudentError` for an architecture that has none."""
        self._job, self._samples = job, len(pool)
        self.sides = sides(job, pool.shape)

    def check_all(self, cards: Sequence[SiteCard]) -> None:
        """Raise `SettingsError` where a site's tail does not do, or no site has one that is wanted."""
        for card in cards:
            check_tail(self._job, card, self.sides)

    def objection(self, card: SiteCard) -> str:
        """Say why a site's tail does not do; empty where it does, or is not wanted."""
        try:
            check_tail(self._job, card, self.sides)
        except SettingsError as error:
            return error.message
        return ""

    def tail(self, card: SiteCard) -> TailDemand | None:
        """Return what will be asked of a site's tail at most; None for nothing."""
        return tail_demand(self._job, card, self._samples, self.sides)

    def announced(self, cards: Sequence[SiteCard]) -> str:
        """Say what is about to be asked of the sites' last blocks."""
        parts = []
        for card in cards:
            demand = self.tail(card)
            if demand is not None and not demand.samples:
                parts.append(f"{size(demand.bytes)} lent by site {card.name}")
            elif demand is not None:
                told = f"{demand.rounds:,} questions to site {card.name}, {demand.samples:,} samples"
                parts.append(f"at most {told}, {size(demand.bytes)} there and back")
        return f"Teachers' last blocks: {listing(parts)}" if parts else ""


def owners(job: JobSettings, cards: Sequence[SiteCard]) -> list[SiteCard]:
    """Return the cards of the sites that know a wanted class."""
    return [card for card in cards if wanted_outputs(job, card)]


def filtered_lesson(
    folder: Path,
    job: JobSettings,
    chosen: Chosen,
    cards: Sequence[SiteCard],
    stores: Sequence[AnswerStore],
    tails: Tails,
    pool: Pool,
    scores: Loss,
    samples: np.ndarray[Any, np.dtype[np.int64]] | None,
    key: str,
) -> Filtering:
    """Return the lesson of a job; answers are decoded into files in `folder`.

    `cards` and `stores` are those of the sites of `chosen.space`, in its order; `scores` is the loss of unified labels,
    `key` names the answers. `samples` (m,): training's sample j is the pool's samples[j]; None: all are learnt from.
    Raises `StudentError`, `ProtocolError`, `StorageError`.
    """
    space, settings, shapes = chosen.space, job.student.filtered, sides(job, pool.shape)
    place = {label: at for at, label in enumerate(chosen.classes)}
    maps, teachers, tasks = decoded(folder, space, stores), list[Teacher](), list[Task]()
    for i in chosen.sites:
        store, labels = stores[i], space.class_sets[i]
        answered = None if store.complete else store.answered(0, store.about.size)
        teachers.append(Teacher(tails.tail(cards[i], shapes), maps[i], space.multi, answered))
        outputs = tuple(at for at, label in enumerate(labels) if label in place)
        parts = [(at,) for at in outputs] if settings.tasks == "label" else [outputs]
        for part in parts:
            name = space.sites[i] if settings.tasks == "site" else f"{space.names[labels[part[0]]]} of {space.sites[i]}"
            tasks.append(Task(name[:200], len(teachers) - 1, part, tuple(place[labels[at]] for at in part)))
    ids = np.arange(len(pool)) if samples is None else samples
    matter = Matter(teachers, tasks, len(chosen.classes), ids, hard=settings.hard)
    target = settings.target or ("teachers" if space.multi else "unified")
    lesson = FilteredLesson(
        matter,
        job.student.architecture,
        settings.model_copy(update={"target": target}),
        job.student.fit,
        job.student.preprocessing,
        answers=key,
        seed=job.seed,
        scores=scores,
    )
    return Filtering(lesson, chosen, tails, job)


def branches_told(run: Path, cards: Sequence[SiteCard]) -> dict[str, Any]:
    """Return what the report tells of branches, and of what the sites' last blocks were asked in the whole run."""
    told: dict[str, Any] = read_json(run / "student" / FILE)
    asked = run / "tails" / ASKED
    sites = {branch["site"] for branch in told["branches"]}
    lent = {
        card.name: card.tail.bytes
        for card in cards
        if card.name in sites and card.tail is not None and card.tail.allow == "blocks"
    }
    return {**told, "lent": lent, "asked": read_json(asked) if asked.exists() else {}}


@dataclass(frozen=True)
class Filtering:
    """The lesson of a student that is made of a trunk and branches."""

    lesson: FilteredLesson
    chosen: Chosen
    tails: Tails
    job: JobSettings

    @property
    def fingerprint(self) -> str:
        """What is learnt from."""
        return self.lesson.fingerprint

    def teach(
        self, build: BuildStudent, images: ImageRows, folder: Path, reporter: Reporter, name: str
    ) -> tuple[nn.Module, list[EpochRecord]]:
        """See `Lesson.teach`; the network is the lesson's own. Raises as `FilteredLesson.teach`."""
        settings = self.job.student
        blocks = settings.filtered.epochs * self.lesson.stages
        task = reporter.start(f"training {name}", blocks + settings.fit.epochs * settings.filtered.joint)
        try:
            student, records, told = self.lesson.teach(
                images, folder.parent / "filtered", default_device(), on_epoch=lambda record: task.advance(1)
            )
        finally:
            self.tails.save()
        shape = (int(images.shape[1]), int(images.shape[2]), int(images.shape[3]))
        plain = build_student(settings.architecture, len(self.chosen.space), shape, settings.preprocessing, seed=0)
        whole = sum(parameter.numel() for parameter in plain.parameters())
        names = [self.chosen.space.names[label] for label in self.chosen.classes]
        branches = [{**branch, "classes": [names[at] for at in branch["classes"]]} for branch in told["branches"]]
        about = {
            "architecture": settings.architecture,
            "target": self.lesson.target,
            "together": settings.filtered.joint,
            "branches": branches,
            "parameters": {**told["parameters"], "whole": whole},
        }
        write_json(folder / FILE, {**told, **about})
        return student, records
