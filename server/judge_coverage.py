"""How good a site's coverage is: pure functions on arrays, for judging only.

Lives here: the figures of one site's coverage over the pool. Does not live here: where the arrays come from
(server/publishing_coverage), the metrics that it shares with the student (server/judge). True labels come in here for
the report; nothing here feeds a choice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from consilience.server.judge import BINS, Bin, bin_of, reliability

Floats = NDArray[np.float64]
MOST_POINTS = 100
"""Points kept of a ROC curve."""


@dataclass(frozen=True)
class Roc:
    """A ROC curve: its area, and (false positive rate, true positive rate) points from (0, 0) to (1, 1)."""

    auroc: float
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class CoverageFigures:
    """One site's coverage over `samples` pool samples; what needs true labels is None or empty without them.

    `mean` is the share of the pool that the site claims, `share` the share that is of its classes. `low` and `high`
    bound its coverage. `counts` (15) are samples by bins (b - 1) / 15 < c <= b / 15, `mine` those of its classes.
    `roc` is for coverage as a score for "the true class is one of mine", `confidence` for its teacher's largest
    probability; None where all samples, or none, are of its classes. `calibration_error` compares coverage with
    frequency over the bins `reliability`.
    """

    samples: int
    mean: float
    low: float
    high: float
    counts: tuple[int, ...]
    mine: tuple[int, ...] | None = None
    share: float | None = None
    roc: Roc | None = None
    confidence: Roc | None = None
    calibration_error: float | None = None
    reliability: tuple[Bin, ...] = ()


def coverage_figures(
    coverage: NDArray[np.floating], mine: NDArray[np.bool_] | None, confidence: NDArray[np.floating] | None
) -> CoverageFigures:
    """Return the figures of coverage (n,) in [0, 1], n >= 1.

    `mine` (n,): whether the true class is one of the site's; None where that is not known. `confidence` (n,): the
    teacher's largest probability, NaN where it did not answer; None when there is none.
    """
    told = np.asarray(coverage, np.float64)
    at = bin_of(told)
    figures = CoverageFigures(
        samples=len(told),
        mean=float(told.mean()),
        low=float(told.min()),
        high=float(told.max()),
        counts=tuple(map(int, np.bincount(at, minlength=BINS))),
    )
    if mine is None:
        return figures
    error, bins = reliability(told, mine)
    known = None if confidence is None else np.isfinite(confidence)
    return CoverageFigures(
        **vars(figures)
        | {
            "mine": tuple(map(int, np.bincount(at[mine], minlength=BINS))),
            "share": float(mine.mean()),
            "roc": roc(told, mine),
            "confidence": None if confidence is None or known is None else roc(confidence[known], mine[known]),
            "calibration_error": error,
            "reliability": bins,
        }
    )


def roc(scores: NDArray[np.floating], mine: NDArray[np.bool_]) -> Roc | None:
    """Return the ROC of scores (n,) for `mine` (n,), at about 100 points; None without both kinds of samples."""
    from sklearn.metrics import roc_auc_score, roc_curve  # late, as in judge

    if not 0 < mine.sum() < len(mine):
        return None
    false, true, _ = roc_curve(mine, scores)
    # Points at even distances along the curve: it rises and runs to the right only.
    way = false + true
    kept = np.unique(np.searchsorted(way, np.linspace(0, way[-1], MOST_POINTS)))
    kept = np.union1d(kept, (0, len(way) - 1))
    points = tuple((float(x), float(y)) for x, y in zip(false[kept], true[kept], strict=True))
    return Roc(float(roc_auc_score(mine, scores)), points)


def ends(coverage: NDArray[np.floating], most: int = 8) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows of the largest and of the smallest coverage (n,), at most `most` each and none in both.

    The largest and the smallest come first; of equals, the first rows.
    """
    count = min(most, len(coverage) // 2)
    largest = np.argsort(-np.asarray(coverage, np.float64), kind="stable")
    smallest = np.argsort(np.asarray(coverage, np.float64), kind="stable")
    smallest = smallest[~np.isin(smallest, largest[:count])]
    return largest[:count], smallest[:count]
