"""How well a student ranks the images of each vertical: pure functions on arrays, for judging only.

Lives here: average precision by vertical and its mean, the mpvap of Gao et al. (2017). Does not live here: accuracy and
the rest (server/judge). Test labels come in here for the report; nothing here feeds a choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class VerticalScores:
    """`within[v]` and `against_all[v]` of each vertical, None for one of whose classes there is no test image.

    `within` is None for a vertical of one class too: there is nothing to rank its images against.
    Each is the mean over a vertical's classes, of which there are test images, of a class's average precision. Within:
    among the images of the vertical, by log-probabilities over its classes alone, as a specialist is judged. Against
    all: among all test images, by log-probabilities over all classes. The means are over verticals.
    """

    within: tuple[float | None, ...]
    against_all: tuple[float | None, ...]

    @property
    def mean_within(self) -> float | None:
        """The mean over verticals; None without any."""
        return _mean(self.within)

    @property
    def mean_against_all(self) -> float | None:
        """The mean over verticals; None without any."""
        return _mean(self.against_all)


def judge_verticals(truth: ArrayLike, log_probs: ArrayLike, verticals: Sequence[Sequence[int]]) -> VerticalScores:
    """Judge (m, L) `log_probs` of images of classes `truth` (m,), -1 where an image is of none.

    `verticals[v]`: classes. A class at a time is ranked: nothing of size m x L is made beside a vertical's own. Raises
    `ValueError` for shapes that do not fit, or NaN.
    """
    labels, scores = np.asarray(truth), np.asarray(log_probs)
    if labels.ndim != 1 or scores.ndim != 2 or len(labels) != len(scores):
        raise ValueError(f"truth has shape {labels.shape} and log_probs {scores.shape}; wanted (m,) and (m, L)")
    within, against = [], []
    for classes in verticals:
        held = np.asarray(classes)
        here = np.flatnonzero(np.isin(labels, held))
        own = scores[np.ix_(here, held)].astype(np.float64)
        own -= np.logaddexp.reduce(own, axis=1, keepdims=True) if len(here) else 0.0
        present = [at for at, label in enumerate(held) if (labels[here] == label).any()]
        ranked = present if len(held) > 1 else []
        within.append(_mean([average_precision(labels[here] == held[at], own[:, at]) for at in ranked]))
        against.append(_mean([average_precision(labels == held[at], scores[:, held[at]]) for at in present]))
    return VerticalScores(tuple(within), tuple(against))


def average_precision(positive: NDArray[np.bool_], scores: NDArray[np.floating[Any]]) -> float:
    """Return sum_n (R_n - R_{n-1}) P_n over the thresholds of (m,) scores with a positive; ties are one threshold.

    Raises `ValueError` without a positive, or with NaN.
    """
    if not positive.any() or np.isnan(scores).any():
        raise ValueError("average precision needs a positive and scores that are numbers")
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    last = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1)
    hits = np.cumsum(positive[order])[last]
    gained = np.diff(hits, prepend=0)
    return float((gained * (hits / (last + 1))).sum() / hits[-1])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
