"""The likelihood-ratio attack (LiRA) of Carlini et al. (IEEE S&P 2022), from the scores of shadow teachers.

Lives here: which image is in which shadow's data, and from scores to the ratio. Does not live here: training shadows
(shadows).

Of each image it is known how confident shadows are that learned from it, and how confident those that did not. Two
Gaussians are fitted, and the teacher's own confidence is judged by their ratio: so an image that is easy for everybody
is not taken for a member.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from consilience.common.seeds import derive

LEAST_SHADOWS = 4
"""Two that learned from an image and two that did not: with fewer there is no spread."""
OWN_SPREAD = 64
"""Shadows from which on every image has a spread of its own; with fewer all images share one."""
LEAST_SPREAD = 1e-3
"""In units of log-odds. Less is rounding."""


def halves(images: int, shadows: int, seed: int) -> NDArray[np.bool_]:
    """Return (shadows, images) bool: whether a shadow learns from an image. Half of the shadows do, rounded down."""
    random = np.random.default_rng(derive(seed, "shadows", shadows))
    order = random.permuted(np.tile(np.arange(shadows), (images, 1)), axis=1)
    return np.ascontiguousarray((order < shadows // 2).T)


def likelihood_ratio(
    scores: NDArray[np.float64], shadows: NDArray[np.float64], inside: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Return (n,) the log of how much likelier a score is for a member than for another image.

    `scores` (n,) are the teacher's, `shadows` (S, n) the shadows', `inside` (S, n) whether a shadow learned from the
    image: at least two did and two did not.
    """
    found = np.zeros(len(scores))
    for chosen, sign in ((inside, 1.0), (~inside, -1.0)):
        mean, spread = _gaussian(shadows, chosen)
        found += sign * norm.logpdf(scores, mean, spread)
    return found


def _gaussian(
    shadows: NDArray[np.float64], chosen: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return (n,) the mean of the chosen scores of each image, and their standard deviation."""
    count = chosen.sum(axis=0)
    mean = np.where(chosen, shadows, 0.0).sum(axis=0) / count
    squares = np.where(chosen, (shadows - mean) ** 2, 0.0).sum(axis=0)
    if len(shadows) < OWN_SPREAD:
        variance = np.full(len(mean), squares.sum() / (count - 1).sum())
    else:
        variance = squares / (count - 1)
    return mean, np.maximum(np.sqrt(variance), LEAST_SPREAD)
