"""The estimate of the student's quality, gathered from a run: a few thousand samples of the pool, drawn by the seed.

Lives here: which samples, and when nothing can be known. Does not live here: the estimate (server/quality).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from consilience.common.cards import SiteCard
from consilience.common.labels import LabelSpace
from consilience.common.pool import Pool
from consilience.server.answered import Usable, blocks
from consilience.server.answers import AnswerStore
from consilience.server.labelling_top import Labels
from consilience.server.learning import StudentModel
from consilience.server.quality import FEWEST, HeldOut, Quality, Rows, estimate
from consilience.server.robust import Trust, kept

MOST, LEAST = 4000, 300
"""Samples looked at: fewer of them, the more classes there are."""
_VALUES = 2**24
_BLOCK, _BLOCK_VALUES = 256, 2**22


def pool_quality(
    pool: Pool,
    space: LabelSpace,
    stores: Sequence[AnswerStore],
    cards: Sequence[SiteCard],
    labels: Labels,
    student: StudentModel,
    samples: Usable,
    seed: int,
    trust: Trust | None = None,
    *,
    apart: int,
    joined: bool,
) -> Quality:
    """Estimate the quality of a student of every class of `space`, by the unified `labels` (n, L) and the answers.

    Sites of whose answers `trust` leaves any out, or lets them count less, say nothing of the labels. `apart`: labelled
    samples for which the answers that count hang together less than all sites do. `joined`: coverage decides the odds
    between components. Raises `StorageError`, `PoolError`, `StudentError`.
    """
    keep = kept(space, trust, range(len(space.sites)))
    if (max(keep.components(space)) > 0 or 2 * apart > samples.count) and not joined:
        return Quality(reason="the sites' classes fall apart into components, whose odds no answer tells")
    ids = samples.draw(min(MOST, max(LEAST, _VALUES // len(space))), seed)
    held = [_held_out(card) for card in cards]
    out = frozenset[str]() if trust is None else trust.doubted

    def rows() -> Iterator[Rows]:
        for block in blocks(stores, max(1, min(_BLOCK, _BLOCK_VALUES // len(space))), None, ids):
            scores = student.log_probs(pool.take(block.ids))
            answers = [None if site in out else rows for site, rows in zip(space.sites, block.answers, strict=True)]
            yield Rows(labels[block.ids], scores.argmax(axis=1), answers)

    if len(ids) < FEWEST:
        return Quality(reason=f"the pool has {len(ids)} samples with labels; below {FEWEST} nothing is estimated")
    return estimate(space, rows(), held, {site for site, name in enumerate(space.sites) if name in out})


def _held_out(card: SiteCard) -> HeldOut | None:
    """Return what a site tells of its teacher's accuracy; None where it does not, or not on how many images."""
    if card.holdout_accuracy is None or card.calibration is None:
        return None
    return HeldOut(card.holdout_accuracy, card.calibration.samples)
