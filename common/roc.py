"""How well scores tell two kinds of samples apart: the ROC curve and the area under it.

Does not live here: whose scores and which kinds (client/audit, server/judge). These are the numbers of scikit-learn,
which takes a second to import: a third of what a server's process for a run takes to start.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def auroc(mine: NDArray[np.floating], others: NDArray[np.floating]) -> float:
    """Return the chance that a score of `mine` (n,) is higher than one of `others` (m,), ties counting half.

    n and m are at least 1.
    """
    ranked = np.sort(others)
    below, up_to = np.searchsorted(ranked, mine, side="left"), np.searchsorted(ranked, mine, side="right")
    return float((below + up_to).mean() / (2 * len(others)))


def roc_auc_score(truth: ArrayLike, scores: NDArray[np.floating]) -> float:
    """Return `auroc` of the scores (n,) where `truth` (n,) holds, and of the others.

    Raises `ValueError` without samples of both kinds, and for NaN.
    """
    held = _two_kinds(truth, scores)
    return auroc(scores[held], scores[~held])


def roc_curve(truth: ArrayLike, scores: NDArray[np.floating]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the curve of scores (n,) for `truth` (n,): the rates (k,) of false and of true positives.

    It begins at (0, 0), ends at (1, 1), and has one point for each value that a score has: all scores from there up
    are taken for positive. Raises `ValueError` without samples of both kinds, and for NaN.
    """
    held = _two_kinds(truth, scores)
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    last = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1)  # of each run of equal scores
    true = np.append(0, np.cumsum(held[order])[last])
    false = np.append(0, last + 1) - true
    return false / false[-1], true / true[-1]


def _two_kinds(truth: ArrayLike, scores: NDArray[Any]) -> NDArray[np.bool_]:
    held = np.asarray(truth, np.bool_)
    if not 0 < held.sum() < len(held) or np.isnan(scores).any():
        raise ValueError("one kind of sample is missing, or scores are NaN: there is nothing to tell apart")
    return held
