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
_STILL = 1e-7


def possible(
    sums: NDArray[np.float64], class_sets: Sequence[NDArray[np.int64]], weights: Sequence[float]
) -> NDArray[np.float64]:
    """Return (n, L): of all sums that distributions over the class sets can have, about the nearest to noisy ones.

    Found site by site, each in its turn taking the distribution that leaves least over, until none moves. `UNSURE` of
    the uniform distribution is mixed into each, so that noise makes no class impossible.
    """
    parts = [np.full((len(sums), len(classes)), 1 / len(classes)) for classes in class_sets]
    rest = sums.astype(np.float64)
    sites = list(zip(class_sets, weights, strict=True))
    for (classes, weight), part in zip(sites, parts, strict=True):
        rest[:, classes] -= weight * part
    for _ in range(_SWEEPS):
        moved = 0.0
        for i, (classes, weight) in enumerate(sites):
            found = project(rest[:, classes] / weight + parts[i])
            step = found - parts[i]
            rest[:, classes] -= weight * step
            parts[i], moved = found, max(moved, float(np.abs(step).max(initial=0.0)))
        if moved < _STILL:
            break
    out = np.zeros_like(rest)
    for (classes, weight), part in zip(sites, parts, strict=True):
        out[:, classes] += weight * ((1 - UNSURE) * part + UNSURE / len(classes))
    return out
