"""Whether a site's coverage can be believed: what the others say of the same samples, who is left out or mended.

Lives here: the choice of samples, the others' opinion, streamed, and the verdicts. Does not live here: how the two are
compared (server/unify/recalibrate), and how coverage is used (server/labelling).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from consilience.common.labels import LabelSpace
from consilience.server.answered import CoverageStores, Usable, block_size, blocks
from consilience.server.answers import AnswerStore
from consilience.server.grouped import AnyUnifier
from consilience.server.levels import MovedCoverage
from consilience.server.unify import recalibrate

MOST = 4000
"""Samples looked at: enough to know the agreement to about 0.01."""
CLEARLY = 3.0
"""How many standard errors a difference, or an offset, must be to be no chance."""
LEVEL = 2.0
"""A level is mended that is off by more than this, in logits: odds seven times too high or too low. Honest coverage of
pools without strangers is off by less (docs/unify.md) and stays as it came: to mend it helps and harms alike."""
CLAIMED = 0.2
"""The coverage of sites that share out all classes adds up to 1; no honest sites seen are off by more."""
FEWEST = 200
"""With fewer samples no verdict is given: by chance alone, the agreement of good coverage may then be low."""

Solvers = Callable[[tuple[int, ...], bool], AnyUnifier]
"""A unifier for the answers of certain sites, with coverage or without; of a closed world, at temperature 1."""


class Verdict(BaseModel):
    """What the other sites say about one site's coverage.

    `agreement`: how often a sample that the others take for one of the site's classes has more coverage than one that
    they do not, on `samples` samples; 0.5 is chance. `reason`: why it is left out of unification; empty if it is not.
    `offset`: what its logits are moved by because its level is wrong; 0 where it is used as it came.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    agreement: float
    samples: int
    reason: str = ""
    offset: float = 0.0


class _Seen(NamedTuple):
    """A verdict, whether no rule has a part in it, and the offset where the level is wrong and the answers show it."""

    verdict: Verdict
    firm: bool
    offset: float | None


def check_coverage(
    space: LabelSpace,
    stores: Sequence[AnswerStore],
    coverage: CoverageStores,
    solvers: Solvers,
    samples: Usable,
    seed: int,
    *,
    mend: bool = True,
) -> dict[str, Verdict]:
    """Return site -> verdict, for the sites of whose coverage the others can say something.

    Each site's coverage is compared with q(L_i), unified without it, on at most 4,000 of the usable samples drawn by
    `seed`. One bad site spoils what is said of the others: so the worst is left out first and the rest looked at
    again, until there is no bad one. Where the others' coverage says how likely a sample is of several sites' classes
    together, and a rule shares that out, this may clear a site that was bad before, but not make one bad; a site that
    nobody can judge any more keeps the verdict it had. Where sites share no class, what the others leave over counts as
    a site's own, images of no known class among it, which an honest site ranks lowest: no site is bad whose coverage is
    clearly higher on average where the others see its classes.

    With `mend`, for a world without an outside, a level that is far off is mended where classes overlap, so that the
    others' answers determine it: the worst first, as one wrong level makes the others look wrong. Where class sets do
    not overlap the levels of all sites are tied together by coverage alone, and which is wrong cannot be told.
    Raises `UnifyError`, `StorageError`.
    """
    left = [i for i, store in enumerate(coverage) if store is not None]
    if not left or samples.count < FEWEST:
        return {}
    ids = samples.draw(MOST, seed)
    found: dict[int, Verdict] = {}
    offsets: dict[int, float] = {}
    while left:
        kept = [_mended(store, offsets.get(i, 0.0)) if i in left else None for i, store in enumerate(coverage)]
        seen = _verdicts(space, stores, kept, solvers, ids)
        for i, (verdict, firm, _) in seen.items():
            if firm or (i in found and not verdict.reason):
                found[i] = verdict
        bad = [i for i in left if i in found and found[i].reason]
        if bad:
            left.remove(min(bad, key=lambda i: (found[i].agreement, space.sites[i])))
            continue
        # Each once: what is left after the others are mended, too, is small.
        wrong = {i: told.offset for i, told in seen.items() if told.offset is not None and i not in offsets}
        if not wrong or not mend:
            break
        worst = min(wrong, key=lambda i: (-abs(wrong[i]), space.sites[i]))
        offsets[worst] = wrong[worst]
    for i in set(offsets).intersection(left):
        found[i] = found[i].model_copy(update={"offset": offsets[i]})
    return {space.sites[i]: found[i] for i in sorted(found)}


class Claims:
    """The sum over sites of their mean coverage, added up block by block: 1 if every sample is of one site."""

    def __init__(self, space: LabelSpace) -> None:
        self._sites = len(space.sites)
        self._partition = self._sites > 1 and sum(map(len, space.class_sets)) == len(space)
        self._total, self._count = 0.0, 0

    def add(self, coverage: Sequence[NDArray[np.float32] | None]) -> None:
        """Count a block's coverage, (b,) a site or None; samples of which a site gave none do not count."""
        told = [values for values in coverage if values is not None]
        if self._partition and len(told) == self._sites:
            self._total += float(np.sum(told, dtype=np.float64))
            self._count += len(told[0])

    @property
    def sum(self) -> float | None:
        """None where the class sets are not a partition of the label space, or too few samples count."""
        return self._total / self._count if self._count >= FEWEST else None


def wrong_claims(claimed: float | None, *, closed: bool) -> str | None:
    """Return what is wrong with a sum of mean coverage, as `Claims` has it; None where it is near 1, or not known.

    `closed`: every sample is held to be of a known class; otherwise less than 1 is to be expected.
    """
    if claimed is None or not (claimed > 1 + CLAIMED or (closed and claimed < 1 - CLAIMED)):
        return None
    text = (
        f"No two sites share a class, and their mean coverage adds up to {claimed:.2f} where 1 is right: the level of "
        f"some site's coverage is too {'high, or it is inverted' if claimed > 1 else 'low'}"
    )
    if claimed < 1:
        text += ", or the pool has images of no known class (then set unify.other above 0)"
    return (
        f"{text}. Nothing else decides between their classes, so labels may be wrong. Look for the site whose mean "
        "coverage is not its share of the pool and have it learn coverage again, or set ask.coverage to false."
    )


def believed(space: LabelSpace, coverage: CoverageStores, verdicts: Mapping[str, Verdict]) -> list[AnswerStore | None]:
    """Return the stores of coverage with None for the sites that the verdicts leave out, and wrong levels mended."""
    told = [verdicts.get(site) for site in space.sites]
    return [
        store if verdict is None else None if verdict.reason else _mended(store, verdict.offset)
        for verdict, store in zip(told, coverage, strict=True)
    ]


def _mended(store: AnswerStore | None, offset: float) -> AnswerStore | None:
    """Return a store with its logits moved; the store itself where there is nothing to move."""
    return MovedCoverage(store, offset) if store is not None and offset else store


def _verdicts(
    space: LabelSpace,
    stores: Sequence[AnswerStore],
    coverage: CoverageStores,
    solvers: Solvers,
    ids: NDArray[np.int64],
) -> dict[int, _Seen]:
    """Return site -> what is seen of it with the coverage of just these sites."""
    told: dict[int, list[NDArray[np.float32]]] = {i: [] for i, store in enumerate(coverage) if store is not None}
    masses: dict[int, list[NDArray[np.float64]]] = {i: [] for i in told}
    firmness: dict[int, list[NDArray[np.int64]]] = {i: [] for i in told}
    for block in blocks(stores, block_size(space), coverage, ids):
        answers = [rows for rows in block.answers if rows is not None]
        linked = not solvers(block.sites, False).components.any()
        for i in told:
            own = block.coverage[i]
            if own is None:
                continue
            others = [None if j == i else block.coverage[j] for j in block.sites]
            given = others if any(values is not None for values in others) else None
            unified = solvers(block.sites, given is not None)(answers, coverage=given)
            determined = _determined(space.class_sets[i], unified.components)
            if determined or given is not None:
                told[i].append(own)
                masses[i].append(unified.probs[:, list(space.class_sets[i])].sum(axis=1, dtype=np.float64))
                firmness[i].append(np.full(len(own), int(determined) + int(determined and linked)))
    found = {}
    for i in told:
        if sum(map(len, told[i])) < FEWEST:
            continue
        values, mass, firm = np.concatenate(told[i]), np.concatenate(masses[i]), np.concatenate(firmness[i])
        # The firmest that are enough: 2 where answers alone determine the mass, 1 where coverage helps, 0 where a rule.
        least = next(least for least in (2, 1, 0) if least == 0 or (firm >= least).sum() >= FEWEST)
        values, mass = values[firm >= least], mass[firm >= least]
        (fit,) = recalibrate([values], partial(_sole, mass))
        if fit is not None and np.isfinite(fit.agreement):
            reason = "" if _clearly_higher(values, mass) else fit.reason
            verdict = Verdict(agreement=fit.agreement, samples=len(values), reason=reason)
            wrong = least == 2 and abs(fit.offset) > max(LEVEL, CLEARLY * fit.error)
            found[i] = _Seen(verdict, least > 0, fit.offset if wrong else None)
    return found


def _sole(masses: NDArray[np.float64], _: int) -> NDArray[np.float64]:
    """Return the masses of the only site there is."""
    return masses


def _clearly_higher(values: NDArray[np.float32], mass: NDArray[np.float64]) -> bool:
    """Whether coverage (n,) is higher on average where the others leave `mass` (n,) in [0, 1] over, by no chance."""
    inside, outside = mass.sum(), (1 - mass).sum()
    if min(inside, outside) <= 0:
        return False
    difference = mass @ values / inside - (1 - mass) @ values / outside
    return bool(difference > CLEARLY * values.std(dtype=np.float64) * np.sqrt(1 / inside + 1 / outside))


def _determined(classes: Sequence[int], components: NDArray[np.int64]) -> bool:
    """Whether answers and coverage determine the mass of `classes` against the others, and no rule."""
    own = np.isin(np.arange(len(components)), np.asarray(classes))
    return bool(np.isin(components[~own], components[own]).any())
