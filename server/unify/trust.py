"""Whom the others contradict: sites whose answers do not go with those of a majority, as a whole or about a class.

Lives here: moments of pairs of sites, gathered block by block, and the verdicts that follow. Does not live here: where
answers come from and what is done with a site that is outvoted (server/robust).

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

LEAST_CORRELATION = 0.3
"""Two sites contradict one another where their correlation is clearly below this."""
CLEARLY = 2.0
"""How many standard errors below, by Fisher's transformation, of 1 / sqrt(samples - 3) each. Two sites must say so."""
FEWEST = 20.0
"""Samples, by the two sites' own answers, below which nothing is said about the two, or about a class of theirs."""
FEWEST_OWNERS = 3
"""Sites that must be comparable for one to be outvoted: two who disagree may either of them be right."""
_NOTHING = 1e-12
"""Variance of a probability that is as good as constant."""


@dataclass(frozen=True)
class Comparison:
    """What two sites' answers have to do with one another, on the k classes that both know.

    `correlation` and `samples`: of all these classes together; `by_class` (k,) and `samples_by_class` (k,): of each.
    Samples count by how likely they are of one of the classes (of this class) in the eyes of these sites.
    """

    classes: tuple[int, ...]
    correlation: float
    samples: float
    by_class: FloatArray
    samples_by_class: FloatArray


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
        self._weight = 0.0

    def add(self, one: FloatArray, two: FloatArray) -> None:
        mass_one, s = _restricted(one[:, self.left])
        mass_two, t = _restricted(two[:, self.right])
        # A sample that either site holds for one of its other classes says little about these.
        v = np.sqrt(mass_one * mass_two)
        weighted_s, weighted_t = v[:, None] * s, v[:, None] * t
        self._weight += float(v.sum())
        self._sums += [
            weighted_s.sum(0),
            weighted_t.sum(0),
            (weighted_s * s).sum(0),
            (weighted_t * t).sum(0),
            (weighted_s * t).sum(0),
        ]

    def result(self, classes: list[int]) -> Comparison:
        total = max(self._weight, 1e-300)
        mean_s, mean_t, square_s, square_t, product = self._sums / total
        variance_s, variance_t = square_s - mean_s**2, square_t - mean_t**2
        covariance = product - mean_s * mean_t
        return Comparison(
            tuple(classes),
            float(_ratio(covariance.sum(), variance_s.sum(), variance_t.sum())),
            self._weight,
            _ratio(covariance, variance_s, variance_t),
            # The larger of the two: a site that never speaks of a class is told by one that does.
            np.maximum(self._sums[0], self._sums[1]),
        )


@dataclass(frozen=True)
class Outvoted:
    """Who is outvoted: sites as a whole, and (site, class) of sites that are not.

    `correlations[i]`: the median of site i's correlations with those that it can be compared with, NaN without any;
    `compared[i]`: how many these are; `samples[i]`: the fewest samples of those comparisons.
    `divided`: whether some sites could be compared, contradict one another, and no majority of them goes together; then
    nobody of them is outvoted. `unjudged`: the classes of which nothing can be known, for fewer than three owners can
    be compared on them or these are divided.
    """

    sites: frozenset[int]
    cells: frozenset[tuple[int, int]]
    correlations: FloatArray
    compared: tuple[int, ...]
    samples: tuple[float, ...]
    divided: bool
    unjudged: tuple[int, ...]


def outvoted(class_sets: Sequence[Sequence[int]], comparisons: dict[tuple[int, int], Comparison]) -> Outvoted:
    """Judge all sites, then the others class by class.

    A site is outvoted where it contradicts more of those left than it goes with, two at least; the one with the
    largest surplus first, and the rest are looked at again. What is left must be a majority of those compared.
    """
    count = len(class_sets)
    verdicts = np.zeros((count, count), np.int64)
    told: list[list[tuple[float, float]]] = [[] for _ in range(count)]
    for (i, j), found in comparisons.items():
        verdict = _verdict(found.correlation, found.samples)
        verdicts[i, j] = verdicts[j, i] = verdict
        if verdict:
            for site in (i, j):
                told[site].append((found.correlation, found.samples))
    values = np.full((count, count), np.nan)
    for (i, j), found in comparisons.items():
        values[i, j] = values[j, i] = found.correlation
    bad: set[int] = set()
    divided = False
    for group in _groups(verdicts):
        against = _minority(group, verdicts, values)
        divided |= against is None
        bad |= against or set()
    cells, unjudged = _by_class(class_sets, comparisons, bad)
    return Outvoted(
        sites=frozenset(bad),
        cells=frozenset(cells),
        correlations=np.array([np.median([c for c, _ in held]) if held else np.nan for held in told]),
        compared=tuple(len(held) for held in told),
        samples=tuple(min((n for _, n in held), default=0.0) for held in told),
        divided=divided,
        unjudged=tuple(unjudged),
    )


def _by_class(
    class_sets: Sequence[Sequence[int]], comparisons: dict[tuple[int, int], Comparison], bad: set[int]
) -> tuple[set[tuple[int, int]], list[int]]:
    owners: dict[int, list[int]] = {}
    for site, classes in enumerate(class_sets):
        for c in classes:
            owners.setdefault(int(c), []).append(site)
    place = {pair: {c: k for k, c in enumerate(found.classes)} for pair, found in comparisons.items()}
    cells: set[tuple[int, int]] = set()
    unjudged = []
    for c, known in sorted(owners.items()):
        size = len(class_sets)
        verdicts, values = np.zeros((size, size), np.int64), np.full((size, size), np.nan)
        everyone = np.zeros((size, size), np.int64)
        for a, i in enumerate(known):
            for j in known[a + 1 :]:
                if (k := place.get((i, j), {}).get(c)) is None:
                    continue
                found = comparisons[i, j]
                verdict = _verdict(float(found.by_class[k]), float(found.samples_by_class[k]))
                everyone[i, j] = everyone[j, i] = verdict
                if i not in bad and j not in bad:
                    verdicts[i, j] = verdicts[j, i] = verdict
                    values[i, j] = values[j, i] = found.by_class[k]
        judged = any(len(group) >= FEWEST_OWNERS for group in _groups(everyone))
        for group in _groups(verdicts):
            against = _minority(group, verdicts, values)
            judged = judged and against is not None
            cells |= {(site, c) for site in against or ()}
        if not judged:
            unjudged.append(c)
    return cells, unjudged


def _verdict(correlation: float, samples: float) -> int:
    """Return -1 where two contradict one another, 1 where they do not, 0 where nothing can be said."""
    if samples < FEWEST:
        return 0
    bound = math.tanh(math.atanh(min(max(correlation, -0.999999), 0.999999)) + CLEARLY / math.sqrt(samples - 3))
    return -1 if bound < LEAST_CORRELATION else 1


def _groups(verdicts: npt.NDArray[np.int64]) -> list[list[int]]:
    """Return the sites that comparisons link, directly or by others; single ones are left out."""
    left, groups = set(np.flatnonzero(verdicts.any(axis=1)).tolist()), []
    while left:
        group, new = set[int](), {min(left)}
        while new:
            group |= new
            new = {int(j) for i in new for j in np.flatnonzero(verdicts[i])} - group
        left -= group
        groups.append(sorted(group))
    return groups


def _minority(group: list[int], verdicts: npt.NDArray[np.int64], values: FloatArray) -> set[int] | None:
    """Return who of `group` is outvoted; None where it is divided: those left are no majority, or go with nobody."""
    left = list(group)
    while True:
        part = verdicts[np.ix_(left, left)]
        contradicted, surplus = (part < 0).sum(axis=1), -part.sum(axis=1)
        candidates = [k for k in range(len(left)) if surplus[k] > 0 and contradicted[k] >= FEWEST_OWNERS - 1]
        if not candidates:
            break

        def rank(k: int, rows: list[int] = left, over: npt.NDArray[np.int64] = surplus) -> tuple[float, float, int]:
            held = values[rows[k], rows]
            return -float(over[k]), float(np.median(held[np.isfinite(held)])), rows[k]

        del left[min(candidates, key=rank)]
    if (part < 0).any() and (2 * len(left) <= len(group) or not (part > 0).any()):
        return None
    return set(group) - set(left) if 2 * len(left) > len(group) else None


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
