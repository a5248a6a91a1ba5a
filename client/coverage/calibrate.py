"""Scores -> coverage, P(class of x is one of mine | score), from held-out private data and the pool.

Lives here: fitting, levelling and applying the map. Does not live here: scores (learned) and the prior (prior).

Neither sample is labelled "not mine". But private data follows p(x | mine) and the pool p(x), so by Bayes
    c(s) = P(mine | s) = prior * p(s | mine) / p(s),
the density ratio of the two, times the prior. Weigh the private samples by `prior` in all and the pool's by 1, and ask
how likely a sample of score s is private: c / (1 + c). That is an ordinary two-class problem, for any model of c.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, FiniteFloat
from scipy.special import expit

from consilience.common.settings import Settings

LOWEST = 1e-3
"""Coverage stays within [LOWEST, 1 - LOWEST]: no finite sample shows that something never happens."""
SAME = 1e-6
"""Scores that differ by less are one score."""
STEEPEST = 50.0
"""Logits that a map may rise over the middle half of the scores: more is a step, and only bounds the search."""


class Platt(Settings):
    """c = 1 / (1 + exp(-(slope * score + offset))), slope >= 0, within [LOWEST, 1 - LOWEST]."""

    slope: float = Field(ge=0, allow_inf_nan=False)
    offset: FiniteFloat

    def __call__(self, scores: NDArray[np.floating]) -> NDArray[np.float64]:
        """Return (n,) float64 coverage of (n,) finite scores."""
        return np.clip(expit(self.slope * scores.astype(np.float64) + self.offset), LOWEST, 1 - LOWEST)


def at_level(calibration: Platt, scores: NDArray[np.floating], prior: float) -> Platt:
    """Return the map with its offset moved so that coverage of the pool's scores (m,) is `prior` on average.

    Coverage is a probability, so its mean is the share of the pool that is of the site's classes; but a score's maker
    that learned from the pool's images, and not from the private ones, ranks the former lower, and the fit follows.
    """
    from scipy.optimize import brentq

    logits = calibration.slope * scores.astype(np.float64) + calibration.offset
    level, reach = min(max(prior, LOWEST), 1 - LOWEST), float(np.abs(logits).max()) + math.log(1 / LOWEST)
    moved = float(brentq(lambda by: float(expit(logits + by).mean()) - level, -reach, reach))
    return Platt(slope=calibration.slope, offset=calibration.offset + moved)


def fit_platt(
    mine: NDArray[np.floating],
    pool: NDArray[np.floating],
    prior: float,
    weights: NDArray[np.floating] | None = None,
) -> Platt:
    """Fit by maximum likelihood: (n,) held-out private and (m,) pool scores, prior in (0, 1]; two parameters.

    `weights` (n,) positive: how much each private score counts; None: all the same.
    Where higher scores are not more often private the slope is 0, and coverage is the prior for every score. Raises
    `ValueError` for scores that are missing or not finite.
    """
    from scipy.optimize import minimize  # a third of a second, which an agent, which never fits, does without

    held, seen = mine.astype(np.float64), pool.astype(np.float64)
    if not len(held) or not len(seen) or not (np.isfinite(held).all() and np.isfinite(seen).all()):
        raise ValueError("scores are missing or not finite: nothing to calibrate on")
    both = np.concatenate([held, seen])
    low, centre, high = (float(q) for q in np.quantile(both, [0.25, 0.5, 0.75]))
    widths = (high - low, float(np.std(both)))  # the first, where it can be had: a few extreme scores do not widen it
    width = next((width for width in widths if width > SAME), 1.0)
    x_held, x_seen = (held - centre) / width, (seen - centre) / width
    counts = np.ones(len(held)) if weights is None else weights / weights.mean()

    def loss(parameters: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        of_mine, of_pool = (parameters[0] * x + parameters[1] for x in (x_held, x_seen))
        # c / (1 + c) = 1 / (2 + e^-l) and 1 / (1 + c) = (1 + e^-l) / (2 + e^-l) for the logit l of c
        private = (counts * np.logaddexp(math.log(2), -of_mine)).mean()
        public = (np.logaddexp(math.log(2), -of_pool) - np.logaddexp(0, -of_pool)).mean()
        slope_mine = -counts * expit(-of_mine - math.log(2))
        slope_pool = expit(-of_pool) - expit(-of_pool - math.log(2))
        by_offset = prior * slope_mine.mean() + slope_pool.mean()
        by_steep = prior * (slope_mine * x_held).mean() + (slope_pool * x_seen).mean()
        return float(prior * private + public), np.array([by_steep, by_offset])

    # Not convex: from a flat and from a steep start; the flat one first, which wins where they are as good.
    starts = [np.array([0.0, math.log(min(prior, 0.999) / (1 - min(prior, 0.999)))]), np.array([2.0, 0.0])]
    bounds = [(0.0, STEEPEST), (-STEEPEST, STEEPEST)]
    found = [minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds) for start in starts]
    steep, offset = (float(value) for value in min(found, key=lambda result: float(result.fun)).x)
    return Platt(slope=steep / width, offset=offset - steep / width * centre)
