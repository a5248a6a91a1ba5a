"""Whom the others contradict, and who deserves less weight: verdicts on sites as a whole and about single classes.

Lives here: the verdicts that follow from comparisons of pairs. Does not live here: how pairs are compared
(server/unify/trust), what is done with a site that is outvoted (server/robust).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from consilience.server.unify.trust import Comparison, FloatArray

IntArray = npt.NDArray[np.int64]
Comparisons = dict[tuple[int, int], Comparison]

LEAST_CORRELATION = 0.3
"""Two sites contradict one another where their correlation is clearly below this, and go with one another from here."""
CLEARLY = 2.0
"""How many standard errors below, by Fisher's transformation, of 1 / sqrt(samples - 3) each. Two sites must say so."""
FEWEST = 20.0
"""Samples below which nothing is said about two sites, or about a class of theirs."""
FEWEST_OWNERS = 3
"""Sites that must be comparable for one to be outvoted: two who disagree may either of them be right."""
USUAL = 0.7
"""Of what others' answers deliver: who clearly delivers less counts less."""
FALL, LEAST_WEIGHT = 4, 0.1
"""The power of that share which is a site's weight, and the least of a site that is not outvoted."""


@dataclass(frozen=True)
class Outvoted:
    """Who is outvoted: sites as a whole, and (site, class) of sites that are not.

    `weights[i]`: how much site i counts if it is not outvoted, in [0.1, 1].
    `correlations[i]`: the median of site i's correlations with those that it can be compared with, NaN without any;
    `compared[i]`: how many these are; `samples[i]`: the fewest samples of those comparisons.
    `divided`: whether some sites could be compared, contradict one another, and no majority of them goes together; then
    nobody of them is outvoted. `unjudged`: the classes of which nothing can be known, for no three owners can be
    compared on them with one another, or these are divided.
    """

    sites: frozenset[int]
    cells: frozenset[tuple[int, int]]
    weights: tuple[float, ...]
    correlations: FloatArray
    compared: tuple[int, ...]
    samples: tuple[float, ...]
    divided: bool
    unjudged: tuple[int, ...]


def outvoted(class_sets: Sequence[Sequence[int]], comparisons: Comparisons) -> Outvoted:
    """Judge all sites, then the others class by class, then how much those who are left count.

    A site is outvoted where it contradicts more of those left than it goes with, and among these two who go with one
    another; the one with the largest surplus first, and the rest are looked at again. Those who are left and go with
    somebody must be a majority of those compared.
    """
    count = len(class_sets)
    verdicts, values = _nothing(count)
    told: list[list[tuple[float, float]]] = [[] for _ in range(count)]
    for (i, j), found in comparisons.items():
        values[i, j] = values[j, i] = found.correlation
        verdicts[i, j] = verdicts[j, i] = _verdict(found.correlation, found.samples)
        if found.samples >= FEWEST:
            for site in (i, j):
                told[site].append((found.correlation, found.samples))
    bad, divided = set[int](), set[int]()
    for group in _groups(verdicts):
        against = _minority(group, verdicts, values)
        if against is None:
            divided |= set(group)
        bad |= against or set()
    cells, unjudged = _by_class(class_sets, comparisons, bad)
    return Outvoted(
        sites=frozenset(bad),
        cells=frozenset(cells),
        weights=_weights(count, comparisons, bad | divided, cells),
        correlations=np.array([np.median([c for c, _ in held]) if held else np.nan for held in told]),
        compared=tuple(len(held) for held in told),
        samples=tuple(min((n for _, n in held), default=0.0) for held in told),
        divided=bool(divided),
        unjudged=tuple(unjudged),
    )


def _by_class(
    class_sets: Sequence[Sequence[int]], comparisons: Comparisons, bad: set[int]
) -> tuple[set[tuple[int, int]], list[int]]:
    owners: dict[int, list[int]] = {}
    for site, classes in enumerate(class_sets):
        for c in classes:
            owners.setdefault(int(c), []).append(site)
    place = {pair: {c: k for k, c in enumerate(found.classes)} for pair, found in comparisons.items()}
    by_class = {pair: found.by_class for pair, found in comparisons.items()}
    cells: set[tuple[int, int]] = set()
    unjudged = []
    for c, known in sorted(owners.items()):
        verdicts, values = _nothing(len(known))
        linked = np.zeros_like(verdicts)
        for a, i in enumerate(known):
            for b, j in enumerate(known[a + 1 :], a + 1):
                if (k := place.get((i, j), {}).get(c)) is None:
                    continue
                correlation, samples = float(by_class[i, j][k]), float(comparisons[i, j].samples_by_class[k])
                linked[a, b] = linked[b, a] = samples >= FEWEST
                if i not in bad and j not in bad:
                    verdicts[a, b] = verdicts[b, a] = _verdict(correlation, samples)
                    values[a, b] = values[b, a] = correlation
        judged = bool(np.trace(linked @ linked @ linked))  # three that can be compared with one another
        for group in _groups(verdicts):
            against = _minority(group, verdicts, values)
            judged = judged and against is not None
            cells |= {(known[a], c) for a in against or ()}
        if not judged:
            unjudged.append(c)
    return cells, unjudged


def _nothing(count: int) -> tuple[IntArray, FloatArray]:
    return np.zeros((count, count), np.int64), np.full((count, count), np.nan)


def _verdict(correlation: float, samples: float) -> int:
    """Return -1 where two contradict one another, 1 where they go with one another, 0 where nothing can be said."""
    if samples < FEWEST:
        return 0
    if correlation >= LEAST_CORRELATION:
        return 1
    bound = math.tanh(math.atanh(max(correlation, -0.999999)) + CLEARLY / math.sqrt(samples - 3))
    return -1 if bound < LEAST_CORRELATION else 0


def _groups(verdicts: IntArray) -> list[list[int]]:
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


def _minority(group: list[int], verdicts: IntArray, values: FloatArray) -> set[int] | None:
    """Return who of `group` is outvoted; None where it is divided: too few of those left go with one another."""
    left = list(group)
    while True:
        part = verdicts[np.ix_(left, left)]
        against, beside = (part < 0).astype(np.int64), (part > 0).astype(np.int64)
        surplus, witnesses = -part.sum(axis=1), np.diag(against @ beside @ against)
        candidates = [k for k in range(len(left)) if surplus[k] > 0 and witnesses[k] > 0]
        if not candidates:
            break

        def rank(k: int, rows: list[int] = left, over: IntArray = surplus) -> tuple[float, float, int]:
            held = values[rows[k], rows]
            return -float(over[k]), float(np.median(held[np.isfinite(held)])), rows[k]

        del left[min(candidates, key=rank)]
    if len(left) == len(group) and not against.any():
        return set()
    return set(group) - set(left) if 2 * int(beside.any(axis=1).sum()) > len(group) else None


def _weights(count: int, comparisons: Comparisons, ignored: set[int], cells: set[tuple[int, int]]) -> tuple[float, ...]:
    """Return how much each site counts: all, unless its answers deliver clearly less than others' do.

    Site i delivers to site j cov(i, j) / var(i): of what its answers claim, what j confirms. This is alike for all
    sites that are calibrated, however much they know; a site that knows little claims little. A site that is not
    calibrated may yet be correlated as much as others are. Its share of what others deliver to the same j, or of their
    correlation with j, is the median over all j, and the larger of the two counts.
    """
    slopes, values = _nothing(count)[1], _nothing(count)[1]
    samples = np.zeros((count, count))
    left_out = [frozenset(c for at, c in cells if at == site) for site in range(count)]
    for (i, j), whole in comparisons.items():
        found = whole.without(left_out[i] | left_out[j])
        if found.samples >= FEWEST and not {i, j} & ignored and (found.variances.sum(axis=1) > 0).all():
            samples[i, j] = samples[j, i] = found.samples
            values[i, j] = values[j, i] = found.correlation
            slopes[i, j], slopes[j, i] = found.covariance.sum() / found.variances.sum(axis=1)
    return tuple(_weight(i, slopes, values, samples) for i in range(count))


def _weight(i: int, slopes: FloatArray, values: FloatArray, samples: FloatArray) -> float:
    others = np.flatnonzero(samples[i])
    if len(others) < FEWEST_OWNERS - 1:
        return 1.0
    shares = []
    for measure in (slopes, values):
        beside = measure[np.ix_(others, others)]  # [k, j]: what k delivers to j, of those that i is compared with
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of j that nobody else is compared with
            usual = np.nanmedian(beside, axis=0)
        known = usual > 0
        if int(known.sum()) < FEWEST_OWNERS - 1:
            return 1.0
        shares.append(float(np.median(measure[i, others][known] / usual[known])))
    error = CLEARLY / math.sqrt(float(np.median(samples[i, others])) - 3)
    return min(1.0, max(LEAST_WEIGHT, max(0.0, (max(shares) + error) / USUAL) ** FALL))
