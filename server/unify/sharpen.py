"""How sure unified labels are to be: the exponent at which they say of the sites' answers what these say themselves.

Unification weighs opinions against each other, and a compromise of calibrated opinions is too timid: where one site is
sure, and another knows nothing of the sample, the label is less sure than the first, though nothing speaks against it
(Ranjan & Gneiting 2010 prove it of mixtures). No true label is needed to see it. Let t be what a site takes for most
likely, and p what it claims for it. If the site is calibrated, the truth is t with probability p over the pool; so
calibrated labels, which know more than the site, must put p on t on average, too (the law of total expectation). Labels
that put less there are too timid, and q^b with some b > 1 is not.

Lives here: the exponent and its use, on arrays. Does not live here: which samples (server/sharpness).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

EXPONENTS: Floats = np.exp(np.linspace(-math.log(4), math.log(4), 65))
"""The exponents b that are tried; between them is interpolated."""
_TINY = 1e-12


class Likeliest:
    """What sites take for most likely, what they claim for it, and what q^b puts there, added up for every b."""

    def __init__(self) -> None:
        self._claimed, self._put = 0.0, np.zeros(len(EXPONENTS))

    def add(
        self,
        labels: NDArray[np.floating],
        class_sets: Sequence[Sequence[int]],
        answers: Sequence[NDArray[Any] | None],
        coverage: Sequence[NDArray[np.float32] | None],
        other: NDArray[np.float32],
    ) -> None:
        """Add n samples with labels (n, L), each site's log-probabilities (n, k_i), None to leave it out, and coverage.

        Coverage (n,) makes "none of mine" one more of a site's outcomes; a site without it counts by what the labels
        have of its classes. `other` (n,): how likely a sample is of no class at all, beside which labels add up to 1.
        """
        logs = np.log(np.maximum(np.asarray(labels, np.float64), _TINY))
        logs -= logs.max(axis=1, keepdims=True)
        seen = [
            _outcome(np.asarray(rows, np.float64), told, list(own))
            for own, rows, told in zip(class_sets, answers, coverage, strict=True)
            if rows is not None
        ]
        known = 1 - np.asarray(other, np.float64)
        n = np.arange(len(logs))
        weights = [
            None if covered else np.asarray(labels, np.float64)[:, own].sum(axis=1) for own, _, _, covered in seen
        ]
        for (_, _, claims, _), weight in zip(seen, weights, strict=True):
            self._claimed += float(claims.sum() if weight is None else weight @ claims)
        for k, b in enumerate(EXPONENTS):
            probs = np.exp(b * logs)
            probs /= probs.sum(axis=1, keepdims=True)
            for (own, top, _, _), weight in zip(seen, weights, strict=True):
                inside = probs[:, own].sum(axis=1)
                there = probs[n, np.array(own)[top]]
                if weight is None:
                    self._put[k] += float(np.where(top < 0, 1 - known * inside, known * there).sum())
                else:
                    self._put[k] += float(weight @ (there / np.maximum(inside, _TINY)))

    @property
    def exponent(self) -> float:
        """The b at which labels put on the sites' likeliest outcomes what these claim; 1 where none tried does."""
        curve = np.maximum.accumulate(self._put) - self._claimed
        if not curve[0] < 0 < curve[-1]:
            return 1.0
        return float(np.exp(np.interp(0.0, curve, np.log(EXPONENTS))))


def sharpened(labels: NDArray[np.float32], exponent: float) -> NDArray[np.float32]:
    """Return labels^exponent (n, L), each row adding up to 1."""
    if exponent == 1:
        return labels
    with np.errstate(divide="ignore"):  # a class of probability 0 keeps it
        logs = exponent * np.log(labels.astype(np.float64))
    logs -= logs.max(axis=1, keepdims=True)
    powers = np.exp(logs)
    narrow: NDArray[np.float32] = (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)
    return narrow


def _outcome(
    rows: Floats, coverage: NDArray[np.float32] | None, own: list[int]
) -> tuple[list[int], NDArray[np.int64], Floats, bool]:
    """Return a site's classes, its likeliest outcome (n,), -1 for none of them, its claim (n,), if it is covered."""
    top = rows.argmax(axis=1)
    claims = np.exp(rows.max(axis=1) - np.logaddexp.reduce(rows, axis=1))
    if coverage is None:
        return own, top, claims, False
    c = np.asarray(coverage, np.float64)
    none = 1 - c > c * claims
    return own, np.where(none, -1, top), np.where(none, 1 - c, c * claims), True
