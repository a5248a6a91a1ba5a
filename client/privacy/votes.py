"""Noisy sums over the parts of a site's data: GNMax, Confident-GNMax and the average (Papernot et al. 2017, 2018).

Lives here: from every part's log-probabilities and the noise to one answer. Does not live here: where the parts'
teachers come from (pate) and where the noise does (noise).

One record is in one part and decides what that part says, so it moves one vote from one class to another, or one row
of probabilities to another row: at most sqrt(2) in the sum, and 1 in the largest count.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from consilience.client.privacy.noise import on_grid
from consilience.common.settings import Pate
from consilience.common.simplex import project


def sums(settings: Pate, parts: Iterable[NDArray[np.float32]]) -> NDArray[np.float64]:
    """Return (n, K) float64: votes of the parts, each (n, K) log-probabilities, or the sum of their probabilities.

    A part votes for its likeliest class, the first of several.
    """
    total: NDArray[np.float64] | None = None
    for rows in parts:
        if total is None:
            total = np.zeros(rows.shape)
        if settings.answer == "average":
            probs = np.exp(rows.astype(np.float64))
            total += probs / probs.sum(axis=1, keepdims=True)
        else:
            total[np.arange(len(rows)), rows.argmax(axis=1)] += 1
    assert total is not None  # settings have two parts at least
    return total


def draws(settings: Pate, classes: int) -> int:
    """Return how many normal numbers an answer over so many classes takes."""
    return classes + (settings.answer == "confident")


def answers(settings: Pate, total: NDArray[np.float64], normal: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (n, K) probabilities from sums (n, K) and standard normal numbers (n, `draws`).

    `arg-max`: all on the class that wins. `confident`: the same, or uniform where the largest count does not pass.
    `average`: the mean, noisy and put back on the simplex.
    """
    noisy = total + settings.sigma * normal[:, : total.shape[1]]
    if settings.answer == "average":
        return project(on_grid(noisy / settings.parts))
    probs = np.zeros_like(total)
    probs[np.arange(len(total)), noisy.argmax(axis=1)] = 1
    if settings.threshold is not None and settings.threshold_sigma is not None:
        seen = total.max(axis=1) + settings.threshold_sigma * normal[:, -1]
        probs[seen < settings.threshold] = 1 / total.shape[1]
    return probs
