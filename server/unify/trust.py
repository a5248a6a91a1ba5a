"""How far sites' answers go together: moments of pairs of sites, gathered block by block.

Does not live here: whom the others contradict (server/unify/verdicts), where answers come from and what is done with a
site that is outvoted (server/robust).

Two sites are compared on the classes that both know, by their answers restricted and renormalised to these. Sites that
see the same thing raise and lower a class's probability on the same samples: its *correlation* over the pool is high,
whatever either site's accuracy. It is 0 for answers that are random or constant, and below 0 for swapped classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from consilience.common.errors import UnifyError
from consilience.server.unify.answers import to_tensor
from consilience.server.unify.result import Answers

FloatArray = npt.NDArray[np.float64]

_NOTHING = 1e-12
"""Variance of a probability that is as good as constant."""


@dataclass(frozen=True)
class Comparison:
    """What two sites' answers have to do with one another, on the k classes that both know.

    `covariance` (k,) of the two sites' probabilities of each class, `variances` (2, k) of either's.
    `samples`: how many samples this rests on, of all these classes together, and `samples_by_class` (k,) of each. They
    count by how likely they are of one of the classes (of this class) in the eyes of the one site that holds them the
    likelier, and no more than differ in weight: a site that leaves these classes a little of every sample has spoken.
    """

    classes: tuple[int, ...]
    covariance: FloatArray
    variances: FloatArray
    samples: float
    samples_by_class: FloatArray

    @property
    def correlation(self) -> float:
        """Of all classes together."""
        return float(_ratio(self.covariance.sum(), *self.variances.sum(axis=1)))

    @property
    def by_class(self) -> FloatArray:
        """(k,) the correlation of each class."""
        return _ratio(self.covariance, *self.variances)

    def without(self, classes: frozenset[int]) -> Comparison:
        """Return the same on the classes that are not among these."""
        left = [k for k, c in enumerate(self.classes) if c not in classes]
        if len(left) == len(self.classes):
            return self
        samples = min(self.samples, float(self.samples_by_class[left].sum()))
        parts = self.covariance[left], self.variances[:, left], samples, self.samples_by_class[left]
        return Comparison(tuple(self.classes[k] for k in left), *parts)


class Comparisons:
    """Moments of every pair of sites that share two classes or more, gathered over blocks of answers, in fp64.

    class_sets  as for `unify`; memory is a few numbers for each class that two sites share
    """

    def __init__(self, class_sets: Sequence[Sequence[int]]) -> None:
        self._sets = [tuple(int(c) for c in classes) for classes in class_sets]
        self._moments: dict[tuple[int, int], _Moments] = {}
        for i, mine in enumerate(self._sets):
            place = {c: k for k, c in enumerate(mine)}
            for j in range(i + 1, len(self._sets)):
                shared = [(place[c], k) for k, c in enumerate(self._sets[j]) if c in place]
                if len(shared) > 1:
                    shared.sort()
                    self._moments[i, j] = _Moments([a for a, _ in shared], [b for _, b in shared])

    def add(self, answers: Sequence[Answers | None]) -> None:
        """Take in a block: (b, len(class_sets[i])) log-probabilities or logits of site i, None for a site without.

        -inf is allowed, also for all classes that a pair shares. Raises UnifyError for NaN, +inf, or another width.
        """
        rows = [None if a is None else _log_probs(i, a, len(self._sets[i])) for i, a in enumerate(answers)]
        for (i, j), moments in self._moments.items():
            one, two = rows[i], rows[j]
            if one is not None and two is not None:
                moments.add(one, two)

    def results(self) -> dict[tuple[int, int], Comparison]:
        """Return (i, j), i < j, -> how the two compare; pairs that share fewer than two classes are not there."""
        return {
            (i, j): moments.result([self._sets[i][k] for k in moments.left])
            for (i, j), moments in self._moments.items()
        }


class _Moments:
    """Weighted sums over the samples that two sites answered: of s, s squared and s times s', by class."""

    def __init__(self, left: list[int], right: list[int]) -> None:
        self.left, self.right = left, right
        self._sums = np.zeros((5, len(left)))
        self._weight = self._squares = 0.0
        self._mass = np.zeros(2)

    def add(self, one: FloatArray, two: FloatArray) -> None:
        mass_one, s = _restricted(one[:, self.left])
        mass_two, t = _restricted(two[:, self.right])
        # A sample that either site holds for one of its other classes says little about these.
        v = np.sqrt(mass_one * mass_two)
        weighted_s, weighted_t = v[:, None] * s, v[:, None] * t
        self._weight += float(v.sum())
        self._squares += float((v * v).sum())
        self._mass += [mass_one.sum(), mass_two.sum()]
        self._sums += [
            weighted_s.sum(0),
            weighted_t.sum(0),
            (weighted_s * s).sum(0),
            (weighted_t * t).sum(0),
            (weighted_s * t).sum(0),
        ]

    def result(self, classes: list[int]) -> Comparison:
        mean_s, mean_t, square_s, square_t, product = self._sums / max(self._weight, 1e-300)
        # Kish's number of samples of equal weight does not shrink with a site's mass on these classes as a whole.
        equal = self._weight**2 / max(self._squares, 1e-300)
        samples = min(equal, float(self._mass.max()))
        return Comparison(
            tuple(classes),
            product - mean_s * mean_t,
            np.stack([square_s - mean_s**2, square_t - mean_t**2]),
            samples,
            # The larger of the two: a site that never speaks of a class is told by one that does.
            np.maximum(mean_s, mean_t) * samples,
        )


def _log_probs(site: int, answers: Answers, width: int) -> FloatArray:
    rows = to_tensor(answers).double()
    if rows.ndim != 2 or rows.shape[1] != width:
        raise UnifyError(f"answers of site {site} have shape {tuple(rows.shape)} instead of (rows, {width})")
    if bool(torch.isnan(rows).any() | (rows == math.inf).any()):
        raise UnifyError(f"answers of site {site} hold NaN or +inf")
    return np.asarray((rows - torch.logsumexp(rows, dim=1, keepdim=True)).cpu().numpy(), np.float64)


def _restricted(rows: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the mass (b,) of log-probabilities (b, k) and the probabilities renormalised; uniform without mass."""
    top = rows.max(axis=1, keepdims=True)
    inside = np.isfinite(top)
    parts = np.exp(np.where(inside, rows - np.where(inside, top, 0.0), 0.0))
    total = parts.sum(axis=1, keepdims=True)
    mass = np.where(inside, np.exp(np.where(inside, top, 0.0)) * total, 0.0)
    return np.asarray(mass[:, 0]), np.asarray(parts / total)


def _ratio(covariance: npt.ArrayLike, one: npt.ArrayLike, two: npt.ArrayLike) -> FloatArray:
    """Return correlations, 0 where either side is constant."""
    both = np.asarray(np.asarray(one) * np.asarray(two), np.float64)
    known = (np.asarray(one) > _NOTHING) & (np.asarray(two) > _NOTHING)
    return np.asarray(
        np.where(known, np.asarray(covariance) / np.sqrt(np.where(known, both, 1.0)), 0.0).clip(-1.0, 1.0)
    )
