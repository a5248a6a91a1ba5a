"""Coverage that is wrong, in order or in level, by what the other sites say about the same samples.

Lives here: how well a site's coverage orders samples, how far its level is off, and moving it. Does not live here: the
unification that gives the others' opinion, what is made of it (server/coverage_check), a site's own calibration.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from consilience.common.errors import UnifyError
from consilience.server.unify.answers import to_tensor
from consilience.server.unify.coverage import LEAST, Coverage, check_coverage
from consilience.server.unify.result import Answers

FloatArray = npt.NDArray[np.float64]

LEAST_AGREEMENT = 0.55
"""Coverage that orders samples less like the other sites than this is ignored; 0.5 is a coin."""

_FARTHEST = math.log1p(-LEAST) - math.log(LEAST)
"""The largest logit of coverage."""
_HALVINGS = 60
"""Of the range in which an offset is looked for: more would not be seen in fp64."""


@dataclass(frozen=True)
class Recalibration:
    """What the others say of one site's coverage.

    offset     what its logits are to be moved by, so that on average it is what the others say: the likeliest map
               that changes the level and nothing else
    error      standard error of the offset: it is large where the others see next to none of the site's classes, or
               nothing else
    agreement  the probability that a sample of the site's classes, in the eyes of the others, has more coverage
               than a sample of other classes (ties count half): 0.5 is chance, less is inverted, and 1 takes
               others who are never in doubt
    reason     empty, or why the coverage is to be ignored, which is so where `agreement` is below 0.55
    """

    offset: float
    error: float
    agreement: float
    reason: str

    def __call__(self, coverage: npt.ArrayLike) -> FloatArray:
        """Return the coverage with its level mended, of the same shape."""
        return moved(coverage, self.offset)


def moved(coverage: npt.ArrayLike, offset: float) -> FloatArray:
    """Return coverage in [0, 1], of any shape, with its logits moved by `offset`."""
    return _sigmoid(_logit(np.asarray(coverage, np.float64)) + offset)


def recalibrate(coverage: Coverage, masses: Callable[[int], npt.ArrayLike]) -> list[Recalibration | None]:
    """What the others say of each site's coverage, None for a site without.

    coverage  as for `unify`, over the whole pool: n rows
    masses    masses(i) is (n,) q(L_i) in [0, 1], estimated without the coverage of site i: unify with None in its
              place and add up its classes. Where nothing but its own coverage bears on that mass, this tells of
              nothing but the rule across components: then do not use it

    The offset minimises the cross-entropy of the moved coverage to those masses: mean coverage is then mean mass.
    Raises UnifyError as `unify` does for coverage, and for masses of a wrong shape or value.
    """
    rows = next((int(values.shape[0]) for values in coverage if values is not None), 0)
    check_coverage(coverage, len(coverage), rows)
    return [
        None if values is None else _fit(_logit(_array(site, values, "coverage")), _masses(site, masses(site), rows))
        for site, values in enumerate(coverage)
    ]


def _array(site: int, values: Answers, what: str) -> FloatArray:
    array = np.asarray(to_tensor(values).double().cpu().numpy(), np.float64)
    bad = ~((array >= 0) & (array <= 1))
    if bad.any():
        row = int(bad.argmax())
        raise UnifyError(f"{what} of site {site} holds {array[row]:g} in row {row}: not a probability from 0 to 1")
    return array


def _masses(site: int, values: npt.ArrayLike, rows: int) -> FloatArray:
    array = np.asarray(values, np.float64)
    if array.shape != (rows,):
        raise UnifyError(f"masses for site {site} have shape {array.shape} instead of ({rows},)")
    # Sums of float32 labels may pass 1 by rounding.
    return _array(site, np.where(array < 1 + 1e-5, np.minimum(array, 1.0), array), "masses")


def _fit(logit: FloatArray, target: FloatArray) -> Recalibration:
    agreement = _agreement(logit, target)
    reason = ""
    if agreement < 1 - LEAST_AGREEMENT:
        reason = "it is high where the other sites see none of its classes"
    elif agreement < LEAST_AGREEMENT:
        reason = "it does not tell the site's classes from others"
    if not target.size:
        return Recalibration(0.0, math.inf, agreement, reason)
    # The mean of the moved coverage grows with the offset, and what is looked for lies within the bounds of coverage.
    low, high = -2 * _FARTHEST, 2 * _FARTHEST
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _sigmoid(logit + middle).mean() < target.mean() else (low, middle)
    found = _sigmoid(logit + high)
    return Recalibration(high, float(1 / np.sqrt((found * (1 - found)).sum())), agreement, reason)


def _agreement(logit: FloatArray, target: FloatArray) -> float:
    """The area under the ROC curve when every sample counts `target` as one of the site's and the rest as not."""
    _, place = np.unique(logit, return_inverse=True)
    mine, others = np.bincount(place, weights=target), np.bincount(place, weights=1.0 - target)
    if target.size == 0 or not (mine.sum() > 0 and others.sum() > 0):
        return math.nan
    below = np.cumsum(others) - others
    return float((mine * (below + 0.5 * others)).sum() / (mine.sum() * others.sum()))


def _logit(values: FloatArray) -> FloatArray:
    inside = np.clip(values, LEAST, 1.0 - LEAST)
    return np.asarray(np.log(inside) - np.log1p(-inside), np.float64)


def _sigmoid(values: FloatArray) -> FloatArray:
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * values)), np.float64)
