"""Answers on groups of classes beside answers on single ones: what can be compared, for judging only.

Lives here: from a label space to columns of answers. Does not live here: any metric (server/judge, server/quality). Of
sites that know single classes all of it is what it would be without groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from consilience.common.labels import LabelSpace

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Columns:
    """The columns of one site's answers (m, k): what they are about.

    `classes` (K,): the site's classes; `column` (K,): in which column each is; `share` (K,): one over the number of
    classes of that column. `sole` (k,): the class of a column of one class, -2 for a group, which is no class.
    `place` (L + 1,): the column of each class, -1 for one that the site does not know and, last, for label -1.
    """

    classes: Ints
    column: Ints
    share: Floats
    sole: Ints
    place: Ints

    @classmethod
    def of(cls, space: LabelSpace, site: int) -> Columns:
        """Return those of a site of `space`."""
        entries = space.entries(site)
        sizes = np.array([len(entry) for entry in entries])
        column = np.repeat(np.arange(len(entries)), sizes)
        classes = np.array([c for entry in entries for c in entry], np.int64)
        place = np.full(len(space) + 1, -1, np.int64)
        place[classes] = column
        sole = np.array([entry[0] if len(entry) == 1 else -2 for entry in entries], np.int64)
        return cls(classes, column, 1 / sizes[column], sole, place)

    @property
    def plain(self) -> bool:
        """Whether each column is of one class."""
        return len(self.sole) == len(self.classes)

    def spread(self, probs: Floats) -> Floats:
        """Return probabilities (m, k) shared out evenly among the classes of each column: (m, K)."""
        return probs if self.plain else probs[:, self.column] * self.share

    def summed(self, probs: Floats) -> Floats:
        """Return probabilities (m, K) of the site's classes added up by column: (m, k)."""
        if self.plain:
            return probs
        starts = np.flatnonzero(np.diff(self.column, prepend=-1))
        return np.asarray(np.add.reduceat(probs, starts, axis=1))


def meeting(space: LabelSpace, i: int, j: int) -> tuple[Floats, Floats] | None:
    """Return what adds up the columns of sites i and j, (k_i, b) and (k_j, b) of 0 and 1, to events both tell of.

    An event is a class that both know alone, or the least set of classes that both know as a whole. None where there
    are fewer than two.
    """
    held, sets = set(space.shared(i, j)), (space.entries(i), space.entries(j))
    whole = False
    while not whole:
        inside = [[e for e in entries if held.issuperset(e)] for entries in sets]
        left = set.intersection(*({c for e in entries for c in e} for entries in inside))
        whole, held = left == held, left
    event = {c: c for c in held}  # the least class of its event
    for _ in range(len(held)):
        before = dict(event)
        for within in inside:
            for entry in within:
                least = min(event[c] for c in entry)
                event.update(dict.fromkeys(entry, least))
        if event == before:
            break
    numbers = {least: n for n, least in enumerate(sorted(set(event.values())))}
    if len(numbers) < 2:
        return None
    found = []
    for entries in sets:
        sums = np.zeros((len(entries), len(numbers)))
        for column, entry in enumerate(entries):
            if entry[0] in event:
                sums[column, numbers[event[entry[0]]]] = 1.0
        found.append(sums)
    return found[0], found[1]
