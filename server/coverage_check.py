"""Whether a site's coverage can be believed: what the other sites say of the same samples, and who is left out.

Lives here: the choice of samples, the others' opinion, streamed, and the verdicts. Does not live here: the map that
compares the two (server/unify/recalibrate), and how coverage is used (server/labelling).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from consilience.common.labels import LabelSpace
from consilience.server.answered import CoverageStores, Usable, block_size, blocks
from consilience.server.answers import AnswerStore
from consilience.server.grouped import AnyUnifier
from consilience.server.unify import recalibrate

MOST = 4000
"""Samples looked at: enough to know the agreement to about 0.01."""
CLEARLY = 3.0
"""How many standard errors coverage must be higher by to be clearly higher."""
FEWEST = 200
"""With fewer samples no verdict is given: by chance alone, the agreement of good coverage may then be low."""

Solvers = Callable[[tuple[int, ...], bool], AnyUnifier]
"""A unifier for the answers of certain sites, with coverage or without; of a closed world, at temperature 1."""


class Verdict(BaseModel):
    """What the other sites say about one site's coverage.

    `agreement`: how often a sample that the others take for one of the site's classes has more coverage than one that
    they do not, on `samples` samples; 0.5 is chance. `reason`: why it is left out of unification; empty if it is not.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    agreement: float
    samples: int
    reason: str = ""


def check_coverage(
    space: LabelSpace,
    stores: Sequence[AnswerStore],
    coverage: CoverageStores,
    solvers: Solvers,
    samples: Usable,
    seed: int,
) -> dict[str, Verdict]:
    """Return site -> verdict, for the sites of whose coverage the others can say something.

    Each site's coverage is compared with q(L_i), unified without it, on at most 4,000 of the usable samples drawn by
    `seed`. One bad site spoils what is said of the others: so the worst is left out first and the rest looked at
    again, until there is no bad one. Where the others' coverage says how likely a sample is of several sites' classes
    together, and a rule shares that out, this may clear a site that was bad before, but not make one bad; a site that
    nobody can judge any more keeps the verdict it had. Where sites share no class, what the others leave over counts as
    a site's own, images of no known class among it, which an honest site ranks lowest: no site is bad whose coverage is
    clearly higher on average where the others see its classes. Raises `UnifyError`, `StorageError`.
    """
    left = [i for i, store in enumerate(coverage) if store is not None]
    if not left or samples.count < FEWEST:
        return {}
    ids = _draw(samples, seed)
    found: dict[int, Verdict] = {}
    while left:
        kept = [store if i in left else None for i, store in enumerate(coverage)]
        for i, (verdict, firm) in _verdicts(space, stores, kept, solvers, ids).items():
            if firm or (i in found and not verdict.reason):
                found[i] = verdict
        bad = [i for i in left if i in found and found[i].reason]
        if not bad:
            break
        left.remove(min(bad, key=lambda i: (found[i].agreement, space.sites[i])))
    return {space.sites[i]: found[i] for i in sorted(found)}


def believed(space: LabelSpace, coverage: CoverageStores, verdicts: Mapping[str, Verdict]) -> list[AnswerStore | None]:
    """Return the stores of coverage with None for the sites that the verdicts leave out."""
    out = {site for site, verdict in verdicts.items() if verdict.reason}
    return [None if site in out else store for site, store in zip(space.sites, coverage, strict=True)]


def _draw(samples: Usable, seed: int) -> NDArray[np.int64]:
    """Return the numbers of at most `MOST` usable samples, ascending."""
    chosen = np.arange(samples.count)
    if samples.count > MOST:
        chosen = np.sort(np.random.default_rng(seed).choice(samples.count, MOST, replace=False))
    return chosen if samples.ids is None else samples.ids[chosen]


def _verdicts(
    space: LabelSpace,
    stores: Sequence[AnswerStore],
    coverage: CoverageStores,
    solvers: Solvers,
    ids: NDArray[np.int64],
) -> dict[int, tuple[Verdict, bool]]:
    """Return site -> verdict with the coverage of just these sites, and whether no rule has a part in it."""
    told: dict[int, list[NDArray[np.float32]]] = {i: [] for i, store in enumerate(coverage) if store is not None}
    masses: dict[int, list[NDArray[np.float64]]] = {i: [] for i in told}
    firm: dict[int, list[NDArray[np.bool_]]] = {i: [] for i in told}
    for block in blocks(stores, block_size(space), coverage, ids):
        answers = [rows for rows in block.answers if rows is not None]
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
                firm[i].append(np.full(len(own), determined))
    found = {}
    for i in told:
        if sum(map(len, told[i])) < FEWEST:
            continue
        values, mass, sure = np.concatenate(told[i]), np.concatenate(masses[i]), np.concatenate(firm[i])
        if enough := bool(sure.sum() >= FEWEST):
            values, mass = values[sure], mass[sure]
        (fit,) = recalibrate([values], partial(_sole, mass))
        if fit is not None and np.isfinite(fit.agreement):
            reason = "" if _clearly_higher(values, mass) else fit.reason
            found[i] = Verdict(agreement=fit.agreement, samples=len(values), reason=reason), enough
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
