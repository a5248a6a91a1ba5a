"""How much of the pool is of the site's classes, from scores alone.

Lives here: class-prior estimation from positive and unlabelled data, and how well scores rank the two. Does not live
here: where scores come from (learned) and what is made of the prior (calibrate).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.1
"""delta of the paper: the bounds hold with this chance of failing."""
TIGHTNESS = 0.01
"""gamma of the paper."""
FIRST_PRIOR = 0.3
"""What a first, short training takes for the prior, which is then estimated from its scores. Too low a prior costs
little, too high a one much."""


def estimate_prior(
    mine: NDArray[np.floating], pool: NDArray[np.floating], weights: NDArray[np.floating] | None = None
) -> float:
    """Estimate the share of the pool that is of the site's classes, in (0, 1].

    mine  (n,) scores of private samples that the score's maker has not learned from
    pool  (m,) scores of pool samples; a higher score means more like the private data
    weights  (n,) positive: how much each private sample counts; None: all the same

    Best bin estimation (Garg et al., NeurIPS 2021, algorithm 1): were a threshold passed by no sample of other
    classes, the shares of pool and private samples above it would be in the ratio sought. Every threshold bounds it
    from above; the one with the tightest bound, finite samples allowed for, is taken. Where the classes cannot be told
    apart the estimate is too high, never too low but for chance. Raises `ValueError` without scores, and for NaN.
    """
    if not len(mine) or not len(pool) or np.isnan(mine).any() or np.isnan(pool).any():
        raise ValueError("scores are missing or NaN: nothing to estimate a prior from")
    thresholds = np.unique(np.concatenate([mine, pool]))
    of_mine = _share_from(mine, thresholds, weights)
    certain = len(mine) if weights is None else float(weights.sum() ** 2 / np.square(weights).sum())
    of_pool = _share_from(pool, thresholds)
    reached = of_mine > 0
    of_mine, of_pool = of_mine[reached], of_pool[reached]
    width = math.sqrt(math.log(4 / CONFIDENCE) / 2)
    margin = (1 + TIGHTNESS) * (width / math.sqrt(certain) + width / math.sqrt(len(pool)))
    best = int(np.argmin((of_pool + margin) / of_mine))
    least = 1 / (len(pool) + 1)  # none above the threshold says that there are few, not that there is none
    return float(np.clip(of_pool[best] / of_mine[best], least, 1.0))


def _share_from(
    scores: NDArray[np.floating], thresholds: NDArray[np.floating], weights: NDArray[np.floating] | None = None
) -> NDArray[np.float64]:
    """Return the share of scores, or of their weights, that are at least each threshold."""
    order = np.argsort(scores)
    below = np.searchsorted(scores[order], thresholds, side="left")
    if weights is None:
        return 1 - below / len(scores)
    # from the top: what lies above the highest of them is exactly 0
    above = np.append(np.cumsum(weights[order][::-1])[::-1], 0.0)
    found: NDArray[np.float64] = above[below] / above[0]
    return found


def auroc(
    mine: NDArray[np.floating], others: NDArray[np.floating], weights: NDArray[np.floating] | None = None
) -> float:
    """Return the chance that a score of `mine` (n,) is higher than one of `others` (m,), ties counting half.

    n and m are at least 1; `weights` (n,) as in `estimate_prior`.
    """
    ranked = np.sort(others)
    below, up_to = np.searchsorted(ranked, mine, side="left"), np.searchsorted(ranked, mine, side="right")
    return float(np.average(below + up_to, weights=weights) / (2 * len(others)))
