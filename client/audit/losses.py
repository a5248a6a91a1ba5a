"""Scores by which a single answer tells whether its image was learned from.

Lives here: the loss, and the confidence on a scale on which it is nearly Gaussian. Does not live here: what is made of
scores (membership, shadows).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp


def likelihood(log_probs: NDArray[np.floating[Any]], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return (n,) the log-probability of the true class: minus the loss (Yeom et al., CSF 2018)."""
    rows = np.asarray(log_probs, np.float64)
    own: NDArray[np.float64] = rows[np.arange(len(rows)), labels]
    return own


def confidence(log_probs: NDArray[np.floating[Any]], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return (n,) log p / (1 - p) of the true class, the scale of Carlini et al. (2022); 0 where it is the only class.

    1 - p is the sum of the other classes' probabilities, so that an answer that is nearly certain keeps its digits.
    """
    rows = np.array(log_probs, np.float64)
    if rows.shape[1] == 1:
        return np.zeros(len(rows))
    own = likelihood(rows, labels)
    rows[np.arange(len(rows)), labels] = -np.inf
    odds: NDArray[np.float64] = own - logsumexp(rows, axis=1)
    return odds
