"""Which sites' answers count about which classes: trust from agreement over the pool, and answers cut accordingly.

Lives here: the streaming pass, verdicts in words and names, and what is left of a block's answers. Does not live here:
the verdicts' mathematics (server/unify/trust), unification itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from consilience.common.labels import LabelSpace
from consilience.server.answered import Block, Usable, block_size, blocks, usable
from consilience.server.answers import AnswerStore
from consilience.server.unify.trust import Comparisons
from consilience.server.unify.verdicts import outvoted


class SiteTrust(BaseModel):
    """What the others' answers say of one site's.

    `agreement`: the median correlation of its answers with those of the `sites` that it can be compared with, None
    without any; each comparison rests on `samples` or more. `trust`: how much it counts: 0 for a site that is outvoted,
    below 1 for one whose answers deliver clearly less than the others'. `left_out`: the classes about which its answers
    do not count.
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
    owners who contradict one another without a majority. `divided`: so it is for sites as a whole. `lost`: classes that
    none but outvoted sites know, so that no label has them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    sites: dict[str, SiteTrust]
    unjudged: tuple[str, ...] = ()
    divided: bool = False
    lost: tuple[str, ...] = ()

    @property
    def everyone(self) -> bool:
        """Whether all answers count, and as much as they did."""
        return not self.doubted

    @property
    def doubted(self) -> frozenset[str]:
        """The sites whose answers do not all count, or count less."""
        return frozenset(name for name, site in self.sites.items() if site.left_out or site.trust < 1)


@dataclass(frozen=True)
class Kept:
    """What counts of the answers of `sites`, some of those of a label space.

    `columns[k]`: which columns of the answers of `sites[k]`, None for all. `weights[k]`: how much these count.
    `classes`: those of the label space that are left, ascending; labels are made of these alone.
    """

    sites: tuple[int, ...]
    columns: tuple[NDArray[np.int64] | None, ...]
    weights: tuple[float, ...]
    classes: tuple[int, ...]

    def class_sets(self, space: LabelSpace) -> list[tuple[int, ...]]:
        """Return for each site what it counts for, in the order of its columns, as places in `classes`."""
        sets = [space.class_sets[i] for i in self.sites]
        place = {c: k for k, c in enumerate(self.classes)}
        return [
            tuple(place[c] for c in (held if columns is None else [held[k] for k in columns]))
            for held, columns in zip(sets, self.columns, strict=True)
        ]

    def components(self, space: LabelSpace) -> tuple[int, ...]:
        """Return for each of `classes` the number of its component, by what counts alone."""
        names = tuple(space.names[c] for c in self.classes)
        left = LabelSpace(names, tuple(space.sites[i] for i in self.sites), tuple(self.class_sets(space)), space.multi)
        return left.components

    def spread(self, labels: NDArray[np.float32], space: LabelSpace) -> NDArray[np.float32]:
        """Return labels (b, len(classes)) over all classes of `space`: none of their mass is on those that are lost."""
        if len(self.classes) == len(space):
            return labels
        out = np.zeros((len(labels), len(space)), np.float32)
        out[:, list(self.classes)] = labels
        return out


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
            trust=0.0 if out else found.weights[i],
            left_out=tuple(space.names[c] for c in space.class_sets[i] if out or (i, c) in found.cells),
        )
    lost = set(space.names).difference(*(_counted(space, told[site], i) for i, site in enumerate(space.sites)))
    return Trust(
        sites=told,
        unjudged=tuple(space.names[c] for c in found.unjudged if space.names[c] not in lost),
        divided=found.divided,
        lost=tuple(name for name in space.names if name in lost),
    )


def _counted(space: LabelSpace, told: SiteTrust, site: int) -> list[str]:
    """Return the classes about which a site's answers count."""
    return [name for c in space.class_sets[site] if (name := space.names[c]) not in told.left_out]


def labelled(space: LabelSpace, stores: Sequence[AnswerStore], samples: Usable, trust: Trust | None) -> Usable:
    """Return those of the usable samples that keep a label: a class that is left is known to a site that counts there.

    All do that every site answered.
    """
    if trust is None or trust.everyone:
        return samples
    number = {name: c for c, name in enumerate(space.names)}
    told = [frozenset(number[n] for n in _counted(space, trust.sites[s], i)) for i, s in enumerate(space.sites)]
    found = usable(stores, space, told)
    if found.mask is None or samples.mask is None:
        return found if samples.mask is None else samples
    return dataclasses.replace(found, mask=found.mask & samples.mask, unknown={**samples.unknown, **found.unknown})


def kept(space: LabelSpace, trust: Trust | None, sites: Sequence[int]) -> Kept:
    """Return what counts where `sites` alone answered; without `trust`, all of it.

    A class that none but outvoted sites know is left out: its odds to others would be theirs alone, at any weight.
    """
    if trust is None or trust.everyone:
        return Kept(tuple(sites), (None,) * len(sites), (1.0,) * len(sites), tuple(range(len(space))))
    found: list[tuple[int, NDArray[np.int64] | None, float]] = []
    left = set[int]()
    for i in sites:
        classes, told = space.class_sets[i], trust.sites[space.sites[i]]
        out = set(told.left_out)
        stays = [k for k, c in enumerate(classes) if space.names[c] not in out]
        if stays:
            left.update(classes[k] for k in stays)
            found.append((i, None if len(stays) == len(classes) else np.array(stays), told.trust))
    names, columns, weights = zip(*found, strict=True) if found else ((), (), ())
    return Kept(names, columns, weights, tuple(sorted(left)))


def cut(block: Block, keep: Kept) -> tuple[list[NDArray[np.float32]], list[NDArray[np.float32] | None]]:
    """Return what counts of a block's answers and coverage, of the sites of `keep` alone.

    Coverage of a site with fewer classes is its coverage times the share of its answer on these.
    """
    answers, coverage = [], []
    for i, columns in zip(keep.sites, keep.columns, strict=True):
        rows, told = block.answers[i], block.coverage[i]
        assert rows is not None
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
