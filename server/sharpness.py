"""How sure the labels of a pool are to be, by what the sites claim of themselves on some of its samples.

Lives here: which samples, and what counts of their answers. Does not live here: the exponent's mathematics
(server/unify/sharpen), and making the labels (server/labelling).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from consilience.common.labels import LabelSpace
from consilience.server.answered import Block, CoverageStores, Usable, blocks
from consilience.server.answers import AnswerStore
from consilience.server.coverage_check import Claims, wrong_claims
from consilience.server.solvers import Solved
from consilience.server.unify.sharpen import Likeliest

MOST, LEAST, FEWEST = 4000, 300, 200
"""Samples looked at: fewer, the more classes there are; of a pool with fewer than `FEWEST` labels stay."""
_VALUES = 2**24
_BLOCK_VALUES = 2**20


def find_exponent(
    space: LabelSpace,
    stores: Sequence[AnswerStore],
    coverage: CoverageStores,
    solve: Callable[[Block], Solved],
    samples: Usable,
    seed: int,
    *,
    closed: bool,
) -> float | None:
    """Return the exponent of labels that are made with coverage: at temperature 1, on samples drawn by `seed`.

    1 where only sites give it that know every class of a `closed` world, and so have every sample; None where no
    exponent meets what the sites claim, or their coverage does not add up. Sites that answer on groups of classes say
    nothing here. Raises `UnifyError`, `StorageError`.
    """
    if samples.count < FEWEST or all(store is None for store in coverage):
        return 1.0
    ids = samples.draw(min(MOST, max(LEAST, _VALUES // len(space))), seed)
    seen, claims, any_told = Likeliest(closed=closed), Claims(space), False
    for block in blocks(stores, max(1, _BLOCK_VALUES // len(space)), coverage, ids):
        found = solve(block)
        sets = found.kept.class_sets(space)
        told = [
            None if closed and len(own) == len(found.kept.classes) else c
            for own, c in zip(sets, found.coverage or [], strict=False)
        ]
        if all(c is None for c in told):
            continue
        single = [not space.grouped or space.grouped[i] is None for i in found.kept.sites]
        any_told = True
        claims.add(found.coverage or [])
        answers = [rows if alone else None for rows, alone in zip(found.answers, single, strict=True)]
        seen.add(found.labels.probs, sets, answers, told, found.labels.other)
    if not any_told:
        return 1.0
    # A level that is off claims too much or too little, and the exponent would follow it.
    return None if wrong_claims(claims.sum, closed=closed) else seen.exponent
