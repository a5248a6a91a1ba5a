"""From sums that carry noise to sums that answers can have: all that is done to noise, and it costs nothing.

Lives here: `possible`. Does not live here: noise (common/sums/noise) and CE (server/unify), which wants sums that some
answers add up to: noisy ones are negative in places, and give classes more than their sites have.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from consilience.common.simplex import UNSURE, project

_SWEEPS = 200
_STILL = 1e-5
"""How far a probability may still move, in a sweep over all sites, where it is taken to have arrived."""


def possible(
    sums: NDArray[np.float64], class_sets: Sequence[NDArray[np.int64]], weights: Sequence[float]
) -> NDArray[np.float64]:
    """Return (n, L): of all sums that distributions over the class sets can have, about the nearest to noisy ones.

    Found site by site, each in its turn taking the distribution that leaves least over, until none moves much. `UNSURE`
    of the uniform distribution is mixed into each, so that noise makes no class impossible.
    """
    sites = [(np.asarray(classes), weight) for classes, weight in zip(class_sets, weights, strict=True)]
    out = np.zeros(sums.shape)
    rows = np.arange(len(sums))
    parts = [np.full((len(sums), len(classes)), 1 / len(classes)) for classes, _ in sites]
    rest = sums - _total(parts, sites, sums.shape[1])
    for sweep in range(_SWEEPS):
        moved = np.zeros(len(rows))
        for i, (classes, weight) in enumerate(sites):
            found = project(rest[:, classes] / weight + parts[i])
            step = found - parts[i]
            rest[:, classes] -= weight * step
            parts[i] = found
            np.maximum(moved, np.abs(step).max(axis=1), out=moved)
        still = moved < _STILL if sweep + 1 < _SWEEPS else np.ones(len(rows), np.bool_)
        if still.any():
            out[rows[still]] = _total(
                [(1 - UNSURE) * part[still] + UNSURE / part.shape[1] for part in parts], sites, sums.shape[1]
            )
            rows, rest, parts = rows[~still], rest[~still], [part[~still] for part in parts]
        if not len(rows):
            break
    return out


def _total(
    parts: Sequence[NDArray[np.float64]], sites: Sequence[tuple[NDArray[np.int64], float]], labels: int
) -> NDArray[np.float64]:
    """Return (n, labels) the sums of the sites' distributions, each (n, k)."""
    out = np.zeros((len(parts[0]), labels))
    for part, (classes, weight) in zip(parts, sites, strict=True):
        out[:, classes] += weight * part
    return out
