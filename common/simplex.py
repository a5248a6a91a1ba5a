"""From noisy numbers to log-probabilities: all that happens after noise, and costs nothing.

Lives here: projection to the simplex, and the form in which a noisy answer leaves. Does not live here: noise.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

UNSURE = 0.01
"""Share of the uniform distribution in every noisy answer. None is certain, and a class that noise has pushed out has a
finite log-probability, so that one noisy answer does not outvote every other site's."""


def project(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the nearest rows (n, K), in Euclidean distance, that are not negative and sum to 1 (Held et al. 1974)."""
    if not values.size:
        return values
    ordered = -np.sort(-values, axis=1)
    above = np.cumsum(ordered, axis=1) - 1
    places = np.arange(1, values.shape[1] + 1)
    kept = np.count_nonzero(ordered * places > above, axis=1)
    shift = above[np.arange(len(values)), kept - 1] / kept
    nearest: NDArray[np.float64] = np.maximum(values - shift[:, None], 0)
    return nearest


def as_answer(probs: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return (n, K) float32 log-probabilities of noisy (n, K) probabilities, with `UNSURE` of the uniform ones."""
    mixed = (1 - UNSURE) * probs / probs.sum(axis=1, keepdims=True) + UNSURE / probs.shape[1]
    narrow: NDArray[np.float32] = np.log(mixed).astype(np.float32)
    return narrow
