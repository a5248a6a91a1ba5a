"""Which sites' answers count about which classes: trust from agreement over the pool, and answers cut accordingly.

Lives here: the streaming pass, verdicts in words and names, and what is left of a block's answers. Does not live here:
the verdicts' mathematics (server/unify/trust), unification itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from consilience.common.labels import LabelSpace
from consilience.server.answered import Block, Usable, block_size, blocks
from consilience.server.answers import AnswerStore
from consilience.server.unify.trust import Comparisons, outvoted

HELD = 1e-3
"""Weight of a site that is outvoted but alone knows some class: its odds of that class to others are all there is."""


class SiteTrust(BaseModel):
    """What the others' answers say of one site's.

    `agreement`: the median correlation of its answers with those of the `sites` that it can be compared with, None
    without any; each comparison rests on `samples` or more. `trust`: 0 for a site that is outvoted, else 1.
    `left_out`: the classes about which its answers do not count.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    agreement: float | None
    sites: int
    samples: float
    trust: float = 1.0
    left_out: tuple[str, ...] = ()


class Trust(BaseModel):
    """What is known of all sites: `sites` by name, in the label space's order.

    `unjudged`: classes of which nothing can be known, with fewer than three owners that can be compared, or with
    owners who contradict one another without a majority. `divided`: so it is for sites as a whole.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    sites: dict[str, SiteTrust]
    unjudged: tuple[str, ...] = ()
    divided: bool = False

    @property
    def everyone(self) -> bool:
        """Whether all answers count."""
        return not any(site.left_out for site in self.sites.values())


@dataclass(frozen=True)
class Kept:
    """What counts of the answers of `sites`, some of those of a label space.

    `columns[k]`: which columns of the answers of `sites[k]`, None for all. `weights[k]`: how much these count.
    """

    sites: tuple[int, ...]
    columns: tuple[NDArray[np.int64] | None, ...]
    weights: tuple[float, ...]

    def class_sets(self, space: LabelSpace) -> list[tuple[int, ...]]:
        """Return for each site the classes that it counts for, in the order of its columns."""
        sets = (space.class_sets[i] for i in self.sites)
        return [held if c is None else tuple(held[k] for k in c) for held, c in zip(sets, self.columns, strict=True)]


def find_trust(space: LabelSpace, stores: Sequence[AnswerStore], samples: Usable) -> Trust:
    """Compare all sites over the usable samples, in one pass over the answers. Raises `UnifyError`, `StorageError`."""
    comparisons = Comparisons(space.class_sets)
    for block in blocks(stores, block_size(space)):
        if samples.mask is None or samples.mask[block.ids[0]]:  # one pattern: usable all or none
            comparisons.add(block.answers)
    found = outvoted(space.class_sets, comparisons.results())
    told = {}
    for i, site in enumerate(space.sites):
        agreement = float(found.correlations[i])
        out = i in found.sites
        told[site] = SiteTrust(
            agreement=agreement if math.isfinite(agreement) else None,
            sites=found.compared[i],
            samples=found.samples[i],
            trust=0.0 if out else 1.0,
            left_out=tuple(space.names[c] for c in space.class_sets[i] if out or (i, c) in found.cells),
        )
    return Trust(sites=told, unjudged=tuple(space.names[c] for c in found.unjudged), divided=found.divided)


def kept(space: LabelSpace, trust: Trust | None, sites: Sequence[int]) -> Kept:
    """Return what counts where `sites` alone answered; without `trust`, all of it.

    About a class that none but outvoted sites know, these are believed: there is nothing else. A site that is
    outvoted as a whole then keeps all its classes, with a weight of 0.001, so that the others decide what they can.
    """
    if trust is None or trust.everyone:
        return Kept(tuple(sites), (None,) * len(sites), (1.0,) * len(sites))
    about = {i: trust.sites[space.sites[i]] for i in sites}
    number = {name: c for c, name in enumerate(space.names)}
    out = {i: {number[name] for name in each.left_out} for i, each in about.items()}
    believed = {c for i in sites for c in space.class_sets[i] if c not in out[i]}
    found: list[tuple[int, NDArray[np.int64] | None, float]] = []
    for i in sites:
        classes, outvoted_wholly = space.class_sets[i], about[i].trust == 0
        stays = [k for k, c in enumerate(classes) if c not in out[i] or c not in believed]
        if stays:
            whole = outvoted_wholly or len(stays) == len(classes)
            found.append((i, None if whole else np.array(stays), HELD if outvoted_wholly else 1.0))
    names, columns, weights = zip(*found, strict=True)
    return Kept(names, columns, weights)


def cut(block: Block, keep: Kept) -> tuple[list[NDArray[np.float32]], list[NDArray[np.float32] | None]]:
    """Return what counts of a block's answers and coverage, of the sites of `keep` alone.

    Coverage of a site with fewer classes is its coverage times the share of its answer on these; that of a site that is
    outvoted as a whole does not count.
    """
    answers, coverage = [], []
    for i, columns, weight in zip(keep.sites, keep.columns, keep.weights, strict=True):
        rows, told = block.answers[i], block.coverage[i]
        assert rows is not None
        if weight < 1:
            told = None
        if columns is not None:
            if told is not None:
                part, whole = (
                    np.logaddexp.reduce(held.astype(np.float64), axis=1) for held in (rows[:, columns], rows)
                )
                told = (told * np.exp(np.minimum(part - whole, 0.0))).astype(np.float32)
            rows = rows[:, columns]
        answers.append(rows)
        coverage.append(told)
    return answers, coverage
