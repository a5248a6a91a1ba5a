"""Unifying answers about labels that do not exclude one another: each label by itself.

A label's unified log-odds are the weighted mean of those of the sites that know it, where the weighted sum of relative
entropies to the sites' answers is least: p* = argmin_p sum_i w_i KL(p || p_i). A site's weight is w_i times c_i^s, with
its coverage c_i (how likely it is that any of its labels applies to the sample) and a strength s: a site that has
never seen such images says "no" to all of its labels, and is not to outvote one that has. Does not live here: streaming
(server/labelling_multi), answers of one label an image (unifier).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from consilience.common.errors import UnifyError
from consilience.server.unify.coverage import LEAST

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class UnifiedLabels:
    """`probs` (n, L) float32 in (0, 1), NaN for a label that no site with an answer knows; `answered` (L,): the others.

    `spread` (n, L) float32: the weighted standard deviation of the owners' log-odds, NaN as `probs`.
    """

    probs: NDArray[np.float32]
    answered: NDArray[np.bool_]
    spread: NDArray[np.float32]


def unify_labels(
    log_odds: Sequence[Floats],
    class_sets: Sequence[Sequence[int]],
    num_classes: int,
    *,
    weights: Sequence[float] | None = None,
    coverage: Sequence[Floats | None] | None = None,
    strength: float | Sequence[float] = 0.1,
    temperature: float = 1.0,
) -> UnifiedLabels:
    """Unify the log-odds of sites about n samples, label by label.

    `log_odds[i]` (n, k_i) floating and finite, of the labels `class_sets[i]`, indices in [0, num_classes); `weights`:
    one positive number a site, 1 by default; `coverage`: (n,) floating in [0, 1] a site, None for a site that gives
    none, which counts as 1; `strength` in (0, 1], one for all or one a site; unified log-odds are divided by
    `temperature`. Raises `UnifyError` for anything else.
    """
    n, shares = _checked(log_odds, class_sets, num_classes, weights)
    strengths = [strength] * len(log_odds) if isinstance(strength, int | float) else list(strength)
    total, mean, square = np.zeros((n, num_classes)), np.zeros((n, num_classes)), np.zeros((n, num_classes))
    for site, (rows, classes) in enumerate(zip(log_odds, class_sets, strict=True)):
        own = list(classes)
        share = np.full((n, 1), shares[site])
        if coverage is not None and (told := coverage[site]) is not None:
            share = share * _covered(told, site, n)[:, None] ** strengths[site]
        wide = np.asarray(rows, np.float64)
        # West's update: the spread is a sum of squares that are never differences of large numbers.
        total[:, own] += share
        step = (share / total[:, own]) * (wide - mean[:, own])
        square[:, own] += share * (wide - mean[:, own]) * (wide - mean[:, own] - step)
        mean[:, own] += step
    answered = np.zeros(num_classes, np.bool_)
    answered[[label for classes in class_sets for label in classes]] = True
    with np.errstate(invalid="ignore"):
        spread = np.sqrt(np.maximum(square, 0) / np.where(total > 0, total, 1))
    probs = expit(mean / temperature)
    probs[:, ~answered] = spread[:, ~answered] = np.nan
    return UnifiedLabels(probs.astype(np.float32), answered, spread.astype(np.float32))


def _checked(
    log_odds: Sequence[Floats],
    class_sets: Sequence[Sequence[int]],
    num_classes: int,
    weights: Sequence[float] | None,
) -> tuple[int, list[float]]:
    """Return n and the sites' weights. Raises `UnifyError`."""
    if not log_odds or len(log_odds) != len(class_sets):
        raise UnifyError(f"there are answers of {len(log_odds)} sites and {len(class_sets)} class sets")
    n = len(log_odds[0])
    for site, (rows, classes) in enumerate(zip(log_odds, class_sets, strict=True)):
        if rows.shape != (n, len(classes)) or rows.dtype.kind != "f":
            raise UnifyError(
                f"answers of site {site} have shape {rows.shape} and type {rows.dtype}; expected "
                f"{(n, len(classes))} floating"
            )
        if len(set(classes)) != len(classes) or not all(0 <= label < num_classes for label in classes):
            raise UnifyError(f"class set of site {site} names a label twice, or one not in 0..{num_classes - 1}")
        wrong = ~np.isfinite(rows).all(axis=1)
        if wrong.any():
            raise UnifyError(
                f"answers of site {site} are not finite in row {int(np.argmax(wrong))}", hint="Ask the site again."
            )
    shares = [1.0] * len(log_odds) if weights is None else [float(weight) for weight in weights]
    if len(shares) != len(log_odds) or not all(np.isfinite(share) and share > 0 for share in shares):
        raise UnifyError(f"weights are {shares}; expected {len(log_odds)} positive numbers")
    return n, shares


def _covered(told: Floats, site: int, n: int) -> NDArray[np.float64]:
    """Return coverage (n,) within the bounds that it has beside answers. Raises `UnifyError`."""
    if told.shape != (n,):
        raise UnifyError(f"coverage of site {site} has shape {told.shape} instead of ({n},)")
    values = np.asarray(told, np.float64)
    wrong = ~((values >= 0) & (values <= 1))
    if wrong.any():
        row = int(np.argmax(wrong))
        raise UnifyError(
            f"coverage of site {site} holds {values[row]:g} in row {row}: not a probability from 0 to 1",
            hint="Ask the site again, or unify without its coverage.",
        )
    return np.clip(values, LEAST, 1.0)
