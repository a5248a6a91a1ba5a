"""Owner sets of one component, and the fixed matrices that the dual of CE needs.

Lives here: `Overlap`, built once per component. Does not live here: anything per sample.

An *owner set* T is the set of sites that know a class; classes with the same T behave alike in the dual. Sets
with one owner drop out of it (docs/unify.md). A *part* is a pair (T, i) with i in T: what site i contributes
to the mass of T.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from consilience.server.unify.plan import IntArray, Plan
from consilience.server.unify.sparse import Sparse


@dataclass(frozen=True)
class Overlap:
    """A component with n >= 2 sites that count: S owner sets with two or more owners, I parts, E pairs.

    A *pair* is an owner set with two of its owners, i < j. Shapes of the matrices are given as rows x columns;
    all are to be multiplied with blocks whose last dimension is the batch.
    """

    sites: torch.Tensor
    """(n,) which sites of the plan these are."""
    weights: torch.Tensor
    """(n, 1)"""
    part_set: torch.Tensor
    """(I,) T of each part."""
    part_site: torch.Tensor
    """(I,) i of each part, counted within the component."""
    pairs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    """T, part (T, i), part (T, j): (E,) each."""
    part_rows: IntArray
    """(K,) the part that each stacked row adds to, -1 for the rows of classes with one owner."""
    set_count: int
    """S."""
    to_parts: Sparse
    """I x K, from stacked probabilities to w_i p_i(classes of T)."""
    parts_to_sets: Sparse
    """S x I, ones."""
    parts_to_sites: Sparse
    """n x I, ones."""
    sites_to_sets: Sparse
    """S x n, ones."""
    sets_to_sites: Sparse
    """n x S, ones."""
    classes_to_sets: Sparse
    """S x L, ones."""
    classes_to_singles: Sparse
    """n x L, ones: the classes that only this site knows."""
    parts_to_links: Sparse
    """n n x I: row (i, j) adds up the parts (T, i) over the sets T that hold both i and j."""
    sets_to_links: Sparse
    """n n x S: row (i, j) adds up the sets that hold both."""
    sets_to_pairs: Sparse
    """n (n - 1) / 2 x S: the rows (i, j), i < j, of `sets_to_links`."""
    pairs_to_links: Sparse
    """n n x E, symmetric."""
    pairs_to_flows: Sparse
    """n n x E, antisymmetric: +1 in row (i, j), -1 in row (j, i)."""

    @property
    def size(self) -> int:
        """n."""
        return int(self.sites.shape[0])

    @property
    def row_doubles(self) -> int:
        """Doubles that one sample needs at the same time, roughly."""
        return 7 * self.size**2 + 4 * int(self.part_set.shape[0]) + 4 * int(self.pairs[0].shape[0])


def owner_sets(plan: Plan) -> tuple[list[Overlap], IntArray]:
    """The overlaps of all components, and for each class its row (L,) in [sets of all overlaps..., sites].

    A class with one owner that counts, or none, has the row of its (first) owner.
    """
    owners: list[list[int]] = [[] for _ in range(plan.num_classes)]
    for site, column, counted in zip(plan.sites, plan.columns, plan.counted, strict=True):
        if counted:
            owners[column].append(int(site))
    stacked_row = {(int(s), int(c)): r for r, (s, c) in enumerate(zip(plan.sites, plan.columns, strict=True))}
    overlaps: list[Overlap] = []
    class_row = np.full(plan.num_classes, -1, dtype=np.int64)
    total = 0
    for sites, classes in plan.groups():
        if sites.size < 2:
            continue
        numbers: dict[tuple[int, ...], int] = {}
        set_of_class = {
            int(c): numbers.setdefault(tuple(owners[c]), len(numbers)) for c in classes if len(owners[c]) > 1
        }
        overlaps.append(_overlap(plan, sites, list(numbers), set_of_class, stacked_row))
        for column, number in set_of_class.items():
            class_row[column] = total + number
        total += len(numbers)
    for column in np.flatnonzero(class_row < 0):
        class_row[column] = total + owners[column][0]
    return overlaps, class_row


def _overlap(
    plan: Plan,
    sites: IntArray,
    sets: list[tuple[int, ...]],
    set_of_class: dict[int, int],
    stacked_row: dict[tuple[int, int], int],
) -> Overlap:
    device = plan.device
    n, size = sites.size, len(sets)
    local = {int(site): i for i, site in enumerate(sites)}
    part_set = np.repeat(np.arange(size), [len(owners) for owners in sets])
    part_site = np.array([local[site] for owners in sets for site in owners])
    starts = np.concatenate([[0], np.cumsum([len(owners) for owners in sets])])
    pair_set, pair_one, pair_two = _pairs(sets, starts)
    i, j = part_site[pair_one], part_site[pair_two]
    parts, pairs = part_set.size, pair_set.size

    into: list[tuple[int, int, float]] = []
    for column, number in set_of_class.items():
        for place, site in enumerate(sets[number]):
            into.append((int(starts[number]) + place, stacked_row[site, column], float(plan.weights[site])))
    into_part, into_row, into_weight = (np.array(values) for values in zip(*into, strict=True))
    part_rows = np.full(plan.columns.size, -1)
    part_rows[into_row.astype(np.int64)] = into_part
    singles = [
        (local[int(site)], int(column))
        for site, column in zip(plan.sites, plan.columns, strict=True)
        if int(site) in local and int(column) not in set_of_class
    ]
    single_site, single_class = np.array(singles, dtype=np.int64).reshape(-1, 2).T
    all_parts = np.arange(parts)
    both = np.concatenate([i * n + j, j * n + i])
    pair_row = np.zeros((n, n), dtype=np.int64)
    pair_row[np.triu_indices(n, 1)] = np.arange(n * (n - 1) // 2)
    ones = np.ones(pairs)
    twice = np.tile(np.arange(pairs), 2)
    return Overlap(
        sites=plan.tensor(sites),
        weights=plan.tensor(plan.weights[sites])[:, None],
        part_set=plan.tensor(part_set),
        part_site=plan.tensor(part_site),
        pairs=(plan.tensor(pair_set), plan.tensor(pair_one), plan.tensor(pair_two)),
        part_rows=part_rows,
        set_count=size,
        to_parts=Sparse(into_part, into_row, (parts, plan.columns.size), device, into_weight),
        parts_to_sets=Sparse(part_set, all_parts, (size, parts), device),
        parts_to_sites=Sparse(part_site, all_parts, (n, parts), device),
        sites_to_sets=Sparse(part_set, part_site, (size, n), device),
        sets_to_sites=Sparse(part_site, part_set, (n, size), device),
        classes_to_sets=Sparse(
            list(set_of_class.values()), list(set_of_class.keys()), (size, plan.num_classes), device
        ),
        classes_to_singles=Sparse(single_site, single_class, (n, plan.num_classes), device),
        parts_to_links=Sparse(both, np.concatenate([pair_one, pair_two]), (n * n, parts), device),
        sets_to_links=Sparse(both, np.concatenate([pair_set, pair_set]), (n * n, size), device),
        sets_to_pairs=Sparse(pair_row[i, j], pair_set, (n * (n - 1) // 2, size), device),
        pairs_to_links=Sparse(both, twice, (n * n, pairs), device),
        pairs_to_flows=Sparse(both, twice, (n * n, pairs), device, np.concatenate([ones, -ones])),
    )


def _pairs(sets: list[tuple[int, ...]], starts: IntArray) -> tuple[IntArray, IntArray, IntArray]:
    """All (T, part of i, part of j) with i before j in T."""
    numbers, ones, twos = [], [], []
    for number, owners in enumerate(sets):
        one, two = np.triu_indices(len(owners), 1)
        numbers.append(np.full(one.size, number))
        ones.append(starts[number] + one)
        twos.append(starts[number] + two)
    return np.concatenate(numbers), np.concatenate(ones), np.concatenate(twos)
