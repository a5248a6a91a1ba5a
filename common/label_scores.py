"""How well scores of labels that do not exclude one another rank images: average precision, label by label.

Lives here: the figure, for the sites' own held-out images and for judging. Does not live here: which images (client,
server/judge_labels).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def average_precision(truth: NDArray[np.int8], scores: NDArray[np.floating[Any]]) -> float | None:
    """Return the average precision of scores (n,) for one label, `truth` (n,): 1 applies, 0 does not, -1 not known.

    Images for which it is not known do not count. None where the label applies to none of the others.
    """
    from sklearn.metrics import average_precision_score  # a second to import, and sites that serve never need it

    known = truth >= 0
    if not (truth > 0).any():
        return None
    return float(average_precision_score(truth[known], np.asarray(scores)[known]))


def average_precisions(truth: NDArray[np.int8], scores: NDArray[np.floating[Any]]) -> list[float | None]:
    """Return `average_precision` of each label, for truth (n, L) and scores (n, L)."""
    return [average_precision(truth[:, k], scores[:, k]) for k in range(truth.shape[1])]


def mean_ap(precisions: Sequence[float | None]) -> float | None:
    """Return the mean of what average precisions there are; None where there are none."""
    known = [value for value in precisions if value is not None]
    return float(np.mean(known)) if known else None
