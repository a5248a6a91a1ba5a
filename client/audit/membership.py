"""How well an attack tells members, the images that a teacher learned from, from others.

Lives here: from one score an image to a ROC curve and the numbers that sum it up. Does not live here: the scores
(losses, shadows). ROC and area are scikit-learn's, intervals of shares SciPy's.

What matters is the left end of the curve: an attack that is certain of few members is worse for these than one that is
a little better than chance for all (Carlini et al., IEEE S&P 2022). So the share of members that are found is told
where one in 100 and one in 1,000 of the others is taken for a member.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit, ndtri
from scipy.stats import binomtest, rankdata
from sklearn.metrics import roc_auc_score, roc_curve

from consilience.common.errors import DataError
from consilience.common.settings import Settings

CONFIDENCE = 0.95
"""Of every interval."""
FALSE_RATES = (0.001, 0.01)
"""Shares of the others taken for members, at which the share of members that are found is told."""
MOST_POINTS = 400
"""Of a curve that is kept; the corners at its left end are all there."""


class Found(Settings):
    """The share of the members that are found, with an interval."""

    share: float
    low: float
    high: float


class Membership(Settings):
    """What an attack on membership reached.

    `auc` is the chance that a member scores above another image, 0.5 for an attack that knows nothing. `low_of_two` is
    the low end where the better of two attacks is told of: each has half of the chance of error (Bonferroni). `found`
    maps a share of others that are taken for members to the share of members found there; None where there are too few
    others to tell (fewer than one over that share). `roc` are (false, true) rates from (0, 0) to (1, 1).
    """

    auc: float
    low: float
    high: float
    low_of_two: float
    members: int
    others: int
    found: dict[float, Found | None]
    roc: tuple[tuple[float, float], ...]


def membership(members: NDArray[np.floating[Any]], others: NDArray[np.floating[Any]]) -> Membership:
    """Return what the scores (m,) of members and (n,) of others, larger for likelier members, come to.

    The threshold of a false rate is the one that finds most members; the interval of the share found there
    (Clopper-Pearson) takes it as given. Raises `DataError` without a score on either side, or with one that is not
    finite.
    """
    for name, given in (("members", members), ("others", others)):
        if given.ndim != 1 or not len(given) or not np.isfinite(given).all():
            raise DataError(
                f"Scores of {name} have shape {given.shape} and are {'' if np.isfinite(given).all() else 'not '}all "
                "finite; expected one finite score an image, of one image at least"
            )
    scores = np.concatenate([members, others]).astype(np.float64)
    truth = np.repeat([1, 0], [len(members), len(others)])
    # with all points: of equal steps in a row scikit-learn drops those between, and with them a threshold that counts
    false, true, _ = roc_curve(truth, scores, drop_intermediate=False)
    auc = float(roc_auc_score(truth, scores))
    inside, outside = np.asarray(members, np.float64), np.asarray(others, np.float64)
    low, high = auc_interval(inside, outside)
    low_of_two, _ = auc_interval(inside, outside, (1 + CONFIDENCE) / 2)
    return Membership(
        auc=auc,
        low=low,
        high=high,
        low_of_two=low_of_two,
        members=len(members),
        others=len(others),
        found={rate: _found(false, true, rate, len(members), len(others)) for rate in FALSE_RATES},
        roc=_thinned(false, true),
    )


def auc_interval(
    members: NDArray[np.float64], others: NDArray[np.float64], confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Return the interval of the area by DeLong et al. (1988), taken on the scale of its logit.

    Where every pair is in order, or none, this variance is 0. There the interval is that of as many independent pairs
    as there are images on the smaller side.
    """
    m, n = len(members), len(others)
    whole = rankdata(np.concatenate([members, others]))
    # each member's share of others below it, and each other's share of members above it; ties count half
    below = (whole[:m] - rankdata(members)) / n
    above = 1 - (whole[m:] - rankdata(others)) / m
    auc = float(below.mean())
    if auc in (0.0, 1.0):
        edge = ((1 - confidence) / 2) ** (1 / min(m, n))
        return (edge, 1.0) if auc else (0.0, 1 - edge)
    spread = math.sqrt(sum(_variance(part) / len(part) for part in (below, above)))
    reach = float(ndtri((1 + confidence) / 2)) * spread / (auc * (1 - auc))
    centre = float(logit(auc))
    return float(expit(centre - reach)), float(expit(centre + reach))


def _variance(values: NDArray[np.float64]) -> float:
    """Return the unbiased variance; of a single value nothing is known, so that of a fair coin."""
    return float(values.var(ddof=1)) if len(values) > 1 else 0.25


def _found(false: NDArray[np.float64], true: NDArray[np.float64], rate: float, m: int, n: int) -> Found | None:
    if n * rate < 1 - 1e-9:
        return None
    share = float(true[false <= rate * (1 + 1e-9)].max())
    ends = binomtest(round(share * m), m).proportion_ci(CONFIDENCE, "exact")
    return Found(share=share, low=float(ends.low), high=float(ends.high))


def _thinned(false: NDArray[np.float64], true: NDArray[np.float64]) -> tuple[tuple[float, float], ...]:
    """Return at most `MOST_POINTS` points of the curve: as dense where false rates are small, by their logarithm."""
    if len(false) > MOST_POINTS:
        at = np.geomspace(max(false[false > 0].min(), 1e-12), 1, MOST_POINTS - 3)
        kept = np.unique([0, *(np.searchsorted(false, [0, *at], side="right") - 1), len(false) - 1])
        false, true = false[kept], true[kept]
    return tuple((float(x), float(y)) for x, y in zip(false, true, strict=True))
