"""Which samples which sites answered: blocks of answers by pattern, and the samples that can be learnt from.

Lives here: streaming over stores some of which lack answers, of log-probabilities or of coverage. Does not live here:
the stores (server/answers) and what is done with the answers. Nothing of size samples x classes is held in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from consilience.common.errors import AskingError
from consilience.common.labels import LabelSpace
from consilience.server.answers import AnswerStore

CoverageStores = Sequence[AnswerStore | None]
"""One a site: its answers about coverage, None where it was not asked."""
BLOCK_VALUES = 2**21
"""Label values (samples x classes) read at a time."""


@dataclass(frozen=True)
class Block:
    """Samples `ids` (b,) int64, ascending, that the same sites answered.

    `answers[i]` (b, k_i) float32 log-probabilities of site i, None for a site that answered none of them; float16
    where they were asked for as they are stored.
    `coverage[i]` (b,) float32 in [0, 1] of site i, None for a site that gave it for none of them, or did not answer.
    """

    ids: NDArray[np.int64]
    answers: list[NDArray[Any] | None]
    coverage: list[NDArray[np.float32] | None]

    @property
    def sites(self) -> tuple[int, ...]:
        """The sites that answered."""
        return tuple(i for i, rows in enumerate(self.answers) if rows is not None)


@dataclass(frozen=True)
class Usable:
    """The pool samples that labels are made for and the student learns from.

    A sample can be used when every class of the label space is known to a site that answered the sample: else its
    label would deny a class that nobody was asked about. A class that some site tells alone must be told alone, and not
    in a group only. Of labels that do not exclude one another those that somebody told are enough. `mask` (n,) bool,
    None when all can. `unknown`: class ->
    samples that are left out because no site that answered them knows the class.
    """

    size: int
    mask: NDArray[np.bool_] | None
    unknown: dict[str, int]

    @property
    def ids(self) -> NDArray[np.int64] | None:
        """The usable samples, ascending; None when all are."""
        return None if self.mask is None else np.flatnonzero(self.mask)

    @property
    def count(self) -> int:
        """How many samples can be used."""
        return self.size if self.mask is None else int(self.mask.sum())

    def draw(self, most: int, seed: int) -> NDArray[np.int64]:
        """Return the usable samples, ascending; of more than `most`, so many that `seed` draws."""
        ids = np.arange(self.size) if self.ids is None else self.ids
        return ids if len(ids) <= most else np.sort(np.random.default_rng(seed).choice(ids, most, replace=False))


def block_size(space: LabelSpace) -> int:
    """Return how many samples make a block."""
    return max(1, BLOCK_VALUES // len(space))


def blocks(
    stores: Sequence[AnswerStore],
    size: int,
    coverage: CoverageStores | None = None,
    ids: NDArray[np.int64] | None = None,
    *,
    stored: bool = False,
) -> Iterator[Block]:
    """Yield every sample that a site answered, `size` samples of the pool at a time, by who answered and gave coverage.

    `coverage`: each site's store of coverage, None for a site that was not asked for it; without any, no block has
    coverage. `ids` (m,) ascending: these samples alone. Where every site answered everything, these are the pool's
    samples in order.
    """
    sites = len(stores)
    covers = coverage or [None] * sites
    complete = all(store.complete for store in (*stores, *covers) if store is not None)
    wanted = np.arange(stores[0].about.size) if ids is None else ids
    for at in range(0, len(wanted), size):
        whole = wanted[at : at + size]
        held = [read_rows(store, whole, stored=stored) for store in stores]
        given = [None if store is None else read_rows(store, whole)[:, 0] for store in covers]
        if complete:
            yield Block(whole, list(held), given)
            continue
        for pattern, rows in patterns([*stores, *covers], whole):
            if not pattern[:sites].any():
                continue
            answers = [a[rows] if p else None for a, p in zip(held, pattern, strict=False)]
            told = [
                c[rows] if c is not None and p and q else None
                for c, p, q in zip(given, pattern[:sites], pattern[sites:], strict=True)
            ]
            yield Block(whole[rows], answers, told)


def read_rows(store: AnswerStore, ids: NDArray[np.int64], *, stored: bool = False) -> NDArray[Any]:
    """Return what a store holds about the samples `ids` (b,) ascending, zeros where there is nothing.

    float32; with `stored` float16 where it is stored so.
    """
    read = store.answered_numbers if stored else store.read_answered
    parts = [read(start, stop) for start, stop in runs(ids)]
    return parts[0] if len(parts) == 1 else np.concatenate([np.empty((0, store.about.classes), np.float32), *parts])


def read_known(store: AnswerStore, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return (b,) bool: which of the samples `ids` (b,) ascending a store holds."""
    return np.concatenate([np.empty(0, np.bool_), *(store.answered(start, stop) for start, stop in runs(ids))])


def usable(stores: Sequence[AnswerStore], space: LabelSpace, told: Sequence[frozenset[int]] | None = None) -> Usable:
    """Find the samples that can be learnt from. `stores` are those of the sites of `space`, about one pool.

    `told`: the classes that each site tells, by default all of its own; of others labels say nothing.
    """
    total = stores[0].about.size
    if all(store.complete for store in stores):
        return Usable(total, None, {})
    mask, lacking = np.zeros(total, np.bool_), Counter[int]()
    everything = frozenset(range(len(space))) if told is None else frozenset[int]().union(*told)
    told = told or [space.tells(i) for i in range(len(space.sites))]
    for start, stop in _cuts(stores, block_size(space)):
        for pattern, rows in patterns(stores, np.arange(start, stop)):
            unknown = everything.difference(*(told[int(i)] for i in np.flatnonzero(pattern)))
            mask[start + rows] = bool(pattern.any()) if space.multi else not unknown
            if not mask[start + rows[0]]:
                lacking.update(dict.fromkeys(unknown, len(rows)))
    return Usable(total, None if mask.all() else mask, {space.names[i]: lacking[i] for i in sorted(lacking)})


def need_usable(samples: Usable) -> Usable:
    """Return `samples`. Raises `AskingError` where there is none that can be learnt from."""
    if samples.unknown and not samples.count:
        listed = ", ".join(list(samples.unknown)[:5])
        raise AskingError(
            f"No pool sample was answered by sites that together know every class; for all {samples.size:,} no "
            f"such site knows one of: {listed}",
            hint="Run the same command again to ask for the rest",
        )
    return samples


def _cuts(stores: Sequence[AnswerStore], size: int) -> Iterator[tuple[int, int]]:
    total = stores[0].about.size
    for start in range(0, total, size):
        yield start, min(start + size, total)


def runs(ids: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield the ranges (start, stop) of samples that follow one another."""
    cuts = np.flatnonzero(np.diff(ids) != 1) + 1
    for part in np.split(ids, cuts) if len(ids) else ():
        yield int(part[0]), int(part[-1]) + 1


def patterns(stores: CoverageStores, ids: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.bool_], NDArray[np.int64]]]:
    """Yield (which stores hold them, (b,) rows that exactly these hold) for samples `ids`."""
    nothing = np.zeros(len(ids), np.bool_)
    given = np.stack([nothing if store is None else read_known(store, ids) for store in stores], axis=1)
    kinds, which = np.unique(np.packbits(given, axis=1), axis=0, return_inverse=True)
    for kind in range(len(kinds)):
        rows = np.flatnonzero(which.reshape(-1) == kind)
        yield given[rows[0]], rows
