"""Scores -> coverage, P(class of x is one of mine | score), from held-out private data and the pool.

Lives here: fitting and applying the map. Does not live here: scores (scorers) and the prior (prior).

Neither sample is labelled "not mine". But private data follows p(x | mine) and the pool p(x), so by Bayes
    c(s) = P(mine | s) = prior * p(s | mine) / p(s),
the density ratio of the two, times the prior. Weigh the private samples by `prior` in all and the pool's by 1, and ask
how likely a sample of score s is private: c / (1 + c). That is an ordinary two-class problem, for any model of c.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from scipy.optimize import minimize

LOWEST = 1e-3
"""Coverage stays within [LOWEST, 1 - LOWEST]: no finite sample shows that something never happens."""


class Platt(BaseModel):
    """c = 1 / (1 + exp(-(slope * score + offset))), slope >= 0."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["platt"] = "platt"
    slope: float
    offset: float

    def __call__(self, scores: NDArray[np.floating]) -> NDArray[np.float64]:
        """Return (n,) coverage of (n,) scores."""
        logits = self.slope * scores.astype(np.float64) + self.offset
        return _bounded(np.exp(-np.logaddexp(0, -logits)))


def fit_platt(mine: NDArray[np.floating], pool: NDArray[np.floating], prior: float) -> Platt:
    """Fit by maximum likelihood: (n,) held-out private and (m,) pool scores, prior in (0, 1]; two parameters."""
    held, seen = mine.astype(np.float64), pool.astype(np.float64)
    both = np.concatenate([held, seen])
    centre, width = float(np.median(both)), float(np.std(both)) or 1.0

    def loss(parameters: NDArray[np.float64]) -> float:
        steep, offset = parameters
        of_mine, of_pool = (steep * (s - centre) / width + offset for s in (held, seen))
        # c / (1 + c) = 1 / (2 + e^-l) and 1 / (1 + c) = (1 + e^-l) / (2 + e^-l) for the logit l of c
        private = np.logaddexp(np.log(2), -of_mine).mean()
        public = (np.logaddexp(np.log(2), -of_pool) - np.logaddexp(0, -of_pool)).mean()
        return float(prior * private + public)

    found = minimize(loss, np.array([1.0, 0.0]), method="L-BFGS-B", bounds=[(0, 50), (-50, 50)])
    steep, offset = (float(value) for value in found.x)
    return Platt(slope=steep / width, offset=offset - steep * centre / width)


def _bounded(coverage: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.clip(coverage, LOWEST, 1 - LOWEST)
