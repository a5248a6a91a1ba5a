"""What answers about the public pool tell of how often each class is among the private data.

Lives here: two ways to guess the shares of the classes, and how far the guesses are off. Does not live here: answers
(answers), membership.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp, softmax

from consilience.common.settings import Settings

MOST_ROUNDS = 2000
ENOUGH = 1e-9
"""Largest change of a share in a round at which scaling has converged."""


class Shares(Settings):
    """The shares of the classes, true and guessed, in the teacher's order; each sums to 1.

    `by_mean` is the mean answer, `by_scaling` what a pool of equally many images of each class would say. The
    distances are total variation from the truth: the share of the images that a guess puts into a wrong class.
    """

    samples: int
    classes: tuple[str, ...]
    true: tuple[float, ...]
    by_mean: tuple[float, ...]
    by_scaling: tuple[float, ...]
    distance_by_mean: float
    distance_by_scaling: float
    distance_uniform: float
    """Of guessing that all classes are equally frequent, for which no answer is needed."""

    @property
    def gained(self) -> float:
        """How much nearer to the truth than the uniform guess the better of the two comes; not above 0 for nothing."""
        return self.distance_uniform - min(self.distance_by_mean, self.distance_by_scaling)


def guess_shares(log_probs: NDArray[np.floating[Any]], classes: tuple[str, ...], true: NDArray[np.float64]) -> Shares:
    """Return what answers (n, K), n >= 1, tell of the `true` shares (K,) of the classes."""
    rows = np.asarray(log_probs, np.float64)
    mean, scaled = mean_shares(rows), scaled_shares(rows)
    return Shares(
        samples=len(rows),
        classes=classes,
        true=tuple(true.tolist()),
        by_mean=tuple(mean.tolist()),
        by_scaling=tuple(scaled.tolist()),
        distance_by_mean=distance(mean, true),
        distance_by_scaling=distance(scaled, true),
        distance_uniform=distance(np.full(len(true), 1 / len(true)), true),
    )


def mean_shares(log_probs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (K,) the mean of the answers (n, K): the shares, if the pool is made as the private data are."""
    total = np.exp(logsumexp(log_probs, axis=0))
    mean: NDArray[np.float64] = total / total.sum()
    return mean


def scaled_shares(log_probs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (K,) the shares under which the answers (n, K) would say that the pool has all classes equally often.

    A classifier's answer is in proportion to the share of a class in what it learned from. Divided by the right shares
    and normalised, the answers about a pool in which all classes are equally frequent have a uniform mean (the prior
    correction of Saerens et al., 2002, turned round). These shares are found by scaling rows and columns in turn.
    """
    classes = log_probs.shape[1]
    shares = np.zeros(classes)  # logarithms
    for _ in range(MOST_ROUNDS):
        corrected = log_probs - shares
        corrected -= logsumexp(corrected, axis=1, keepdims=True)
        step = logsumexp(corrected, axis=0) - np.log(len(log_probs) / classes)
        before, shares = softmax(shares), shares + step
        if np.abs(softmax(shares) - before).max() < ENOUGH:
            break
    found: NDArray[np.float64] = softmax(shares)
    return found


def distance(guess: NDArray[np.float64], true: NDArray[np.float64]) -> float:
    """Return the total variation between two distributions (K,)."""
    return float(np.abs(guess - true).sum() / 2)
