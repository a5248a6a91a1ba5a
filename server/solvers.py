"""Unifiers of a pool's answers: what of a job's settings goes into them, and one for each set of sites that answered.

Does not live here: the mathematics (server/unify), streaming over a pool (server/labelling).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from consilience.common.cards import SiteCard
from consilience.common.labels import LabelSpace
from consilience.common.settings import Unify
from consilience.server.answered import Block
from consilience.server.grouped import AnyUnifier, group_unifier
from consilience.server.robust import Kept, Trust, cut, kept
from consilience.server.unify import Prior, UnifiedLabels, Unifier


@dataclass(frozen=True)
class Solved:
    """A block's labels: over the classes of `kept`, made of those `answers` (b, k) and that `coverage` (b,) a site."""

    kept: Kept
    answers: list[NDArray[np.float32]]
    coverage: list[NDArray[np.float32] | None] | None
    labels: UnifiedLabels
    components: int
    """The largest number of a component of these sites."""


def unifier(
    space: LabelSpace,
    settings: Unify,
    cards: Sequence[SiteCard],
    sites: Sequence[int] | None = None,
    *,
    covered: bool = True,
    keep: Kept | None = None,
) -> AnyUnifier:
    """Build the unifier that the job's settings describe, for the answers of all sites or of those at `sites`.

    `covered`: coverage comes with the answers; without it nothing says that a sample is outside the label space.
    `keep`: what counts of these sites' answers; by default all. Labels are of the classes of `keep`.
    """
    keep = keep or kept(space, None, range(len(space.sites)) if sites is None else sites)
    chosen, class_sets = keep.sites, keep.class_sets(space)
    if space.grouped and any(space.grouped[i] is not None for i in chosen):
        return group_unifier(space, settings, chosen, covered=covered)
    prior = None
    if settings.prior_correction:
        target = np.full(len(keep.classes), 1 / len(keep.classes))
        known = []
        for i, classes, columns in zip(chosen, class_sets, keep.columns, strict=True):
            told = cards[i].class_priors
            known.append(
                target[list(classes)] if told is None else np.asarray(told)[slice(None) if columns is None else columns]
            )
        prior = Prior(target, known)
    return Unifier(
        class_sets,
        len(keep.classes),
        method=settings.method,
        weights=[w * settings.weights.get(space.sites[i], 1.0) for i, w in zip(chosen, keep.weights, strict=True)],
        temperature=settings.temperature,
        prior=prior,
        across=settings.across,
        strength=[settings.strength_of(space.sites[i]) for i in chosen],
        other=settings.other if covered else 0.0,
    )


def usable_coverage(settings: Unify, told: list[NDArray[np.float32] | None]) -> list[NDArray[np.float32] | None] | None:
    """Return what a unifier is given of sites' coverage: None where no site gave it, or, for `sd`, not every site."""
    enough = all if settings.method == "sd" else any
    return told if enough(values is not None for values in told) else None


def anchored(solve: AnyUnifier, class_sets: Sequence[Sequence[int]], told: Sequence[object | None] | None) -> bool:
    """Whether some site of every component gives coverage: else nothing says that a sample is outside of all classes.

    `class_sets` are those of the sites that `solve` is for, `told` their coverage, None for a site that gives none.
    """
    components = solve.components
    given = {int(components[c[0]]) for c, values in zip(class_sets, told or [], strict=False) if values is not None}
    return len(given) == int(components.max()) + 1


class Solvers:
    """One unifier for each set of sites that answered the same samples, with coverage or without, made when needed."""

    MOST = 64
    """Unifiers kept: a site that fails now and then makes few sets, many such sites may make a great many."""

    def __init__(
        self, space: LabelSpace, settings: Unify, cards: Sequence[SiteCard], trust: Trust | None = None
    ) -> None:
        self._space, self._settings, self._cards, self._trust = space, settings, cards, trust
        self._made: dict[tuple[tuple[int, ...], bool], AnyUnifier] = {}
        self._kept: dict[tuple[int, ...], Kept] = {}
        self._lock = threading.RLock()

    def kept(self, sites: tuple[int, ...]) -> Kept:
        """Return what counts of the answers of these sites."""
        with self._lock:
            if sites not in self._kept:
                if len(self._kept) >= self.MOST:
                    self._kept.clear()
                self._kept[sites] = kept(self._space, self._trust, sites)
            return self._kept[sites]

    def solve(self, block: Block) -> Solved:
        """Return a block's labels, with the coverage that comes with it. Raises `UnifyError`."""
        keep = self.kept(block.sites)
        rows, told = cut(block, keep)
        given = usable_coverage(self._settings, told)
        solve = self(block.sites, False)
        if self._settings.other and anchored(solve, keep.class_sets(self._space), given):
            solve = self(block.sites, True)
        labels = solve(rows, coverage=given, alone=True)
        return Solved(keep, rows, given, labels, int(solve.components.max()))

    def __call__(self, sites: tuple[int, ...], covered: bool) -> AnyUnifier:
        """Return the unifier for the answers of these sites, with their coverage or without."""
        key = sites, covered
        with self._lock:
            if key not in self._made:
                if len(self._made) >= self.MOST:
                    self._made.clear()
                about = (self._space, self._settings, self._cards)
                self._made[key] = unifier(*about, covered=covered, keep=self.kept(sites))
            return self._made[key]
