"""Who knows which class: checked once, before any answer is read.

Lives here: validation of class sets and weights, the order in which answers are stacked, the components of
the class-overlap graph. Does not live here: owner sets (`owners`) or anything that looks at answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from consilience.common.errors import UnifyError

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Plan:
    """The fixed part of a unification of N sites over L classes.

    The answers of all sites are stacked into K = sum of len(class_sets[i]) rows, site after site; `offsets`
    (N + 1,), `columns` (K,) and `sites` (K,) say which rows belong to which class and site.

    `counted` (K,) is False for rows that say nothing about ratios of classes: a site with one class answers
    probability 1 whatever it sees. Such a row counts only where no site with more classes knows its class,
    so that every class has a row that counts.
    """

    num_classes: int
    class_sets: tuple[IntArray, ...]
    weights: FloatArray
    offsets: IntArray
    columns: IntArray
    sites: IntArray
    counted: npt.NDArray[np.bool_]
    components: IntArray
    device: torch.device

    @property
    def num_sites(self) -> int:
        """N."""
        return len(self.class_sets)

    def tensor(self, array: npt.ArrayLike) -> torch.Tensor:
        """A fixed array on the device, floats in fp64."""
        values = np.array(array)
        return torch.from_numpy(values.astype(np.float64) if values.dtype.kind == "f" else values).to(self.device)

    def groups(self) -> list[tuple[IntArray, IntArray]]:
        """(sites that count, classes) of each component, ascending; a component may have no such site."""
        first = np.array([self.components[columns[0]] for columns in self.class_sets])
        voting = np.array([columns.size > 1 for columns in self.class_sets])
        return [
            (np.flatnonzero((first == c) & voting), np.flatnonzero(self.components == c))
            for c in range(int(self.components.max()) + 1)
        ]


def make_plan(
    class_sets: Sequence[npt.ArrayLike],
    num_classes: int | None,
    weights: npt.ArrayLike | None,
    device: torch.device,
) -> Plan:
    """Check class sets and weights and lay out the answers.

    Raises UnifyError for: no site, an empty class set, indices that are not whole numbers, out of range or
    doubled, classes that no site knows, weights that are not one positive finite number per site.
    """
    if len(class_sets) == 0:
        raise UnifyError("there is no site to unify", hint="Give at least one class set.")
    sets = tuple(_class_set(site, columns) for site, columns in enumerate(class_sets))
    size = _num_classes(sets, num_classes)
    columns = np.concatenate(sets)
    sites = np.repeat(np.arange(len(sets)), [s.size for s in sets])
    voting = np.array([s.size > 1 for s in sets])[sites]
    voted = np.zeros(size, dtype=np.bool_)
    voted[columns[voting]] = True
    return Plan(
        num_classes=size,
        class_sets=sets,
        weights=_weights(weights, len(sets)),
        offsets=np.concatenate([[0], np.cumsum([s.size for s in sets])]),
        columns=columns,
        sites=sites,
        counted=voting | ~voted[columns],
        components=_components(sets, size),
        device=device,
    )


def _class_set(site: int, values: npt.ArrayLike) -> IntArray:
    array = np.asarray(values)
    if array.ndim != 1:
        raise UnifyError(f"class set of site {site} has {array.ndim} dimensions instead of 1")
    if array.size == 0:
        raise UnifyError(f"class set of site {site} is empty", hint="Leave the site out.")
    if array.dtype.kind not in "iu":
        raise UnifyError(f"class set of site {site} holds {array.dtype} instead of whole numbers")
    columns = array.astype(np.int64)
    if columns.min() < 0:
        raise UnifyError(f"class set of site {site} holds the negative index {columns.min()}")
    unique, counts = np.unique(columns, return_counts=True)
    if counts.max() > 1:
        raise UnifyError(f"class set of site {site} names class {unique[counts.argmax()]} more than once")
    return columns


def _num_classes(sets: tuple[IntArray, ...], num_classes: int | None) -> int:
    largest = max(int(s.max()) for s in sets)
    size = largest + 1 if num_classes is None else num_classes
    if largest >= size:
        site = next(i for i, s in enumerate(sets) if s.max() == largest)
        raise UnifyError(f"class set of site {site} holds index {largest}, but there are {size} classes")
    known = np.zeros(size, dtype=np.bool_)
    known[np.concatenate(sets)] = True
    if not known.all():
        raise UnifyError(
            f"class {int(np.argmin(known))} is known to no site ({int((~known).sum())} such classes)",
            hint="Nothing can be said about it: leave it out of the label space.",
        )
    return size


def _weights(weights: npt.ArrayLike | None, num_sites: int) -> FloatArray:
    if weights is None:
        return np.ones(num_sites)
    array = np.asarray(weights, dtype=np.float64)
    if array.shape != (num_sites,):
        raise UnifyError(f"weights have shape {array.shape} instead of ({num_sites},)")
    bad = ~(np.isfinite(array) & (array > 0))
    if bad.any():
        site = int(bad.argmax())
        raise UnifyError(f"weight {array[site]} of site {site} is not a positive finite number")
    return array


def _components(sets: tuple[IntArray, ...], num_classes: int) -> IntArray:
    """Components of the graph in which two classes are joined when some site knows both."""
    parent = list(range(num_classes))

    def root(x: int) -> int:
        while parent[x] != x:
            parent[x] = parent[parent[x]]
            x = parent[x]
        return x

    for columns in sets:
        first = root(int(columns[0]))
        for column in columns[1:]:
            parent[root(int(column))] = first
    roots = np.array([root(x) for x in range(num_classes)])
    _, first_class, number = np.unique(roots, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first_class))[number].astype(np.int64)
