"""How much filtered amalgamation asks of a site's tail: one rule, for the server that asks and the site that explains.

Lives here: which outputs of a site a job wants, and questions, samples and bytes for them. Does not live here: asking
(server/tails), what a policy allows (client/tails).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from consilience.common.cards import SiteCard, TailCard
from consilience.common.errors import SettingsError, StudentError
from consilience.common.labels import LabelSpace
from consilience.common.nets.blocks import skeleton
from consilience.common.nets.taps import Tap, one_layout
from consilience.common.protocol import TailDemand
from consilience.common.settings import JobSettings
from consilience.common.tails import PIECE_BYTES, QUESTION_BYTES


def wanted_outputs(job: JobSettings, card: SiteCard) -> tuple[int, ...]:
    """Return which of a site's outputs `student.classes` names, in the site's order; all where it is not given.

    Raises `LabelError` for names that cannot be aligned.
    """
    names = job.student.classes
    if names is None:
        return tuple(range(len(card.classes)))
    own = LabelSpace.build({card.name: card.classes}, job.labels.synonyms)
    found = set(own.align(names, job.labels.synonyms, who="job.yaml: field 'student.classes'"))
    return tuple(at for at, label in enumerate(own.class_sets[0]) if label in found)


def sides(job: JobSettings, shape: tuple[int, int, int]) -> tuple[tuple[int, int], ...]:
    """Return rows and columns of the student's features at each block, 1 first, for images of `shape` (H, W, C).

    Raises `StudentError` for an architecture that cannot be cut into blocks, `SettingsError` for one of no such name.
    """
    used = job.student.preprocessing
    channels = used.channels or shape[2]
    blocks = skeleton(job.student.architecture, 1, channels=channels).eval()
    features, found = torch.empty((1, channels, *(used.size or shape[:2])), device="meta"), []
    for block in range(1, blocks.count + 1):
        features = blocks.run(features, block - 1, block)
        found.append((int(features.shape[2]), int(features.shape[3])))
    return tuple(found)


def values(tail: TailCard, block: int, sides: Sequence[tuple[int, int]]) -> int:
    """Return how many numbers a sample's features at a block are, in the teacher's channels."""
    return tail.blocks[block - 1].channels * math.prod(sides[block - 1])


def most_samples(tail: TailCard, sides: Sequence[tuple[int, int]]) -> int:
    """Return how many samples a question holds at most, at whatever block; 0 where not even one has room."""
    widest = max(values(tail, block, sides) for block in range(tail.first, len(tail.blocks)))
    return QUESTION_BYTES // (4 * (widest + tail.blocks[-1].channels))


def check_tail(job: JobSettings, card: SiteCard, sides: Sequence[tuple[int, int]]) -> None:
    """Raise `SettingsError` where a site knows what a job that learns so wants, and its tail does not do for it.

    `sides` as `sides` gives them for the pool's images. Of a job that learns otherwise nothing is asked.
    """
    if job.student.learning != "filtered" or not wanted_outputs(job, card):
        return
    tail, architecture = card.tail, job.student.architecture
    if tail is None:
        raise SettingsError(
            f"job.yaml: field 'student.learning' is 'filtered'; site {card.name} knows wanted classes, and neither "
            "lends its teacher's last blocks nor answers questions about them",
            hint="Ask that site to set policy.tail.allow, which takes a teacher of kind train or state_dict; or leave "
            "it out with ask.min_sites, want only classes of others in student.classes, or set student.learning to "
            "soft-labels",
        )
    own = [(tap.name, tap.unit) for tap in skeleton(architecture, 1).taps]
    try:
        layouts = {f"the student ({architecture})": [Tap(*each, 1) for each in own]}
        one_layout(layouts | {f"site {card.name} ({tail.architecture})": taps_told(tail)})
    except StudentError as error:
        raise SettingsError(
            f"job.yaml: field 'student.architecture' is {architecture!r}: {error.message}",
            hint="Choose that site's architecture, in any width (NAME@TIMES), leave the site out, or set "
            "student.learning to common-feature",
        ) from error
    if card.labels == "single" and (len(card.classes) == 1 or job.student.filtered.tasks == "label"):
        alone = len(card.classes) == 1
        raise SettingsError(
            f"job.yaml: field 'student.learning' is 'filtered'; site {card.name} knows one class alone, so that its "
            "blocks tell nothing"
            if alone
            else f"job.yaml: field 'student.filtered.tasks' is 'label'; the classes of site {card.name} exclude one "
            "another, and are one task",
            hint="Leave that site out" if alone else "Set it to site",
        )
    if card.labels == "single" and job.student.filtered.hard:
        raise SettingsError(
            f"job.yaml: field 'student.filtered.hard' is True; the classes of site {card.name} exclude one another, "
            "and are learnt as likely as it holds them",
            hint="Set it to false",
        )
    if tail.allow == "questions" and not job.student.filtered.joint:
        raise SettingsError(
            f"job.yaml: field 'student.filtered.joint' is False; the blocks of site {card.name} stay there, so that "
            "its branch begins at random, and nothing would teach it",
            hint="Set it to true, or ask that site to lend its blocks (policy.tail.allow: blocks)",
        )
    if tail.allow == "questions" and not most_samples(tail, sides):
        raise SettingsError(
            f"job.yaml: field 'student.learning' is 'filtered'; one sample's features for site {card.name} are more "
            f"than the {QUESTION_BYTES:,} bytes that a question holds",
            hint="Set student.preprocessing.size to a smaller one, or ask that site for a later policy.tail.first",
        )
    if tail.allow == "blocks" and tail.bytes > job.ask.tail_bytes:
        raise SettingsError(
            f"job.yaml: field 'ask.tail_bytes' is {job.ask.tail_bytes:,}; site {card.name} lends {tail.bytes:,} bytes "
            "of blocks",
            hint="Raise it, or leave that site out with ask.min_sites",
        )


def taps_told(tail: TailCard) -> tuple[Tap, ...]:
    """Return the taps of a whole teacher, as its card tells them."""
    return tuple(Tap(block.name, block.layout, block.channels) for block in tail.blocks)


@dataclass(frozen=True)
class _Asked:
    """One tail's questions at one block, of which a batch holds `samples`, over `streams` streams."""

    tail: TailCard
    sides: Sequence[tuple[int, int]]
    streams: int
    most: int

    def times(self, block: int, batches: int, samples: int, *, gradient: bool) -> tuple[int, int, int]:
        """Return questions, samples and bytes of so many batches of `samples`."""
        numbers, outputs = values(self.tail, block, self.sides), self.tail.blocks[-1].channels
        each = 4 * (3 * numbers + 2 * outputs if gradient else numbers + outputs)
        rounds = -(-samples * self.streams // self.most) * (2 if gradient else 1)
        asked = samples * self.streams * batches
        return rounds * batches, asked * (2 if gradient else 1), asked * each


def tail_demand(job: JobSettings, card: SiteCard, samples: int, sides: Sequence[tuple[int, int]]) -> TailDemand | None:
    """Return what a job that learns from `samples` asks of a site's tail at most; None where it wants nothing of it.

    Of a site that lends its blocks: the blocks. `sides` as `sides` gives them for the pool's images, and as many as the
    teacher has blocks before its head. Drawing blocks (`order: sampled`) may ask less, as does a pool that is not all
    learnt from; a run that is interrupted may ask for an epoch twice.
    """
    tail, settings = card.tail, job.student.filtered
    wanted = wanted_outputs(job, card)
    if job.student.learning != "filtered" or tail is None or not wanted:
        return None
    if tail.allow == "blocks":
        return TailDemand(rounds=-(-tail.bytes // PIECE_BYTES), samples=0, bytes=tail.bytes)
    tasks = len(wanted) if settings.tasks == "label" else 1
    held = max(1, round(settings.held_out * samples))
    kept = max(samples - held, 2)
    batch = min(max(job.student.fit.batch_size, 2), kept)
    steps = settings.epochs * max(kept // batch, 1)
    streams = tasks if settings.filters == "task" else 1
    asked = _Asked(tail, sides, streams, max(most_samples(tail, sides), 1))
    taken = range(tail.first, len(tail.blocks))
    whole, rest = divmod(held, job.student.fit.batch_size)
    parts = [asked.times(block, whole, job.student.fit.batch_size, gradient=False) for block in taken if whole]
    parts += [asked.times(block, 1, rest, gradient=False) for block in taken if rest]
    if settings.order == "sampled":
        every = len(tail.blocks) - 1
        widest = max(taken, key=lambda block: values(tail, block, sides))
        parts.append(asked.times(widest, steps * every, batch, gradient=True))
    else:
        parts += [asked.times(block, steps, batch, gradient=True) for block in taken]
    rounds, count, size = (sum(numbers) for numbers in zip(*parts, strict=True))
    return TailDemand(rounds=rounds, samples=count, bytes=size)
