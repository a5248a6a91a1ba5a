"""Repairing coverage that is wrong, by what the other sites say about the same samples.

Lives here: one monotone map per site, its fit, and the verdict on coverage that says nothing. Does not live here:
the unification that gives the others' opinion, or a site's own calibration.
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

_STEPS = 100


@dataclass(frozen=True)
class Recalibration:
    """What to make of one site's coverage c: sigmoid(a logit c + b), a >= 0.

    agreement  the probability that a sample of the site's classes, in the eyes of the others, has more coverage
               than a sample of other classes (ties count half): 0.5 is chance, less is inverted, and 1 takes
               others who are never in doubt
    reason     empty, or why a is 0: then c is to be ignored, and b alone is the others' mean
    """

    a: float
    b: float
    agreement: float
    reason: str

    def __call__(self, coverage: npt.ArrayLike) -> FloatArray:
        """The repaired coverage, of the same shape."""
        return _sigmoid(self.a * _logit(np.asarray(coverage, np.float64)) + self.b)


def recalibrate(coverage: Coverage, masses: Callable[[int], npt.ArrayLike]) -> list[Recalibration | None]:
    """One map per site, None for a site without coverage.

    coverage  as for `unify`, over the whole pool: n rows
    masses    masses(i) is (n,) q(L_i) in [0, 1], estimated without the coverage of site i: unify with None in its
              place and add up its classes. Where nothing but its own coverage bears on that mass, the map learns
              nothing but the rule across components: then do not use it

    The map minimises the cross-entropy of the repaired coverage to those masses, with the weight of one sample
    on a = 1, b = 0. Raises UnifyError as `unify` does for coverage, and for masses of a wrong shape or value.
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
    level = float(_logit(np.array(target.mean() if target.size else 0.5)))
    if agreement < 1 - LEAST_AGREEMENT:
        return Recalibration(0.0, level, agreement, "it is high where the other sites see none of its classes")
    if agreement < LEAST_AGREEMENT:
        return Recalibration(0.0, level, agreement, "it does not tell the site's classes from others")
    design = np.stack([logit, np.ones_like(logit)], axis=1)
    prior: FloatArray = np.array([1.0, 0.0])
    x: FloatArray = prior.copy()
    value = _loss(design, target, x, prior)
    for _ in range(_STEPS):
        found = _sigmoid(design @ x)
        gradient = design.T @ (found - target) + (x - prior)
        hessian = (design * (found * (1 - found))[:, None]).T @ design + np.eye(2)
        step = np.asarray(-np.linalg.solve(hessian, gradient), np.float64)
        length = 1.0
        while length > 1e-9 and _loss(design, target, x + length * step, prior) > value:
            length /= 2
        x = x + length * step
        value = _loss(design, target, x, prior)
        if float(np.abs(step).max()) < 1e-9:
            break
    if x[0] <= 0:
        return Recalibration(0.0, level, agreement, "it rises where the other sites see less of its classes")
    return Recalibration(float(x[0]), float(x[1]), agreement, "")


def _loss(design: FloatArray, target: FloatArray, x: FloatArray, prior: FloatArray) -> float:
    z = design @ x
    return float((np.logaddexp(0.0, z) - target * z).sum() + 0.5 * ((x - prior) ** 2).sum())


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
