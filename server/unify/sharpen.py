"""How sure unified labels are to be: the exponent at which they say of the sites' answers what these say themselves.

Unification weighs opinions against each other, and a compromise of calibrated opinions is too timid: where one site is
sure, and another knows nothing of the sample, the label is less sure than the first, though nothing speaks against it
(Ranjan & Gneiting 2010 prove it of mixtures). No true label is needed to see it. Let t be what a site takes for most
likely, and p what it claims for it. If the site is calibrated, the truth is t with probability p over the pool; so
calibrated labels, which know more than the site, must put p on t on average, too (the law of total expectation). Labels
that put less there are too timid, and q^b with some b > 1 is not.

A site with coverage makes two claims: which of its classes a sample is of *if* it is of one, and which it is, or none.
The second rests on coverage, which a site learns on the pool itself and as a rule overrates; the first on held-out
images, yet it asks for b = 1 where no other site knows its classes. One exponent has to serve both. Where a sample may
be of no class at all the second is left out: how often labels say so is not for b to move, and b would make up for it.

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

    def __init__(self, *, closed: bool = True) -> None:
        """`closed`: every sample is of some class."""
        self._closed = closed
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

        A site claims which of its classes a sample is of if it is of one, which counts by how likely it is so; in a
        closed world, with coverage (n,), it claims beside which of its classes it is, or none. `other` (n,): how likely
        a sample is of no class at all, beside which labels add up to 1.
        """
        probs = np.asarray(labels, np.float64)
        logs = np.log(np.maximum(probs, _TINY))
        logs -= logs.max(axis=1, keepdims=True)
        known, n = 1 - np.asarray(other, np.float64), np.arange(len(logs))
        seen = []
        for own, rows, told in zip(class_sets, answers, coverage, strict=True):
            if rows is None:
                continue
            places, mass = np.asarray(own), known * probs[:, list(own)].sum(axis=1)
            top = np.asarray(rows).argmax(axis=1)
            claims = _claims(np.asarray(rows, np.float64))
            self._claimed += float(mass @ claims)
            none = None
            if told is not None and self._closed:
                c = np.asarray(told, np.float64)
                none = 1 - c > c * claims
                self._claimed += float(np.where(none, 1 - c, c * claims).sum())
            seen.append((places, places[top], mass, none))
        for k, b in enumerate(EXPONENTS):
            powers = np.exp(b * logs)
            powers /= powers.sum(axis=1, keepdims=True)
            for places, top, mass, none in seen:
                inside, there = powers[:, places].sum(axis=1), powers[n, top]
                self._put[k] += float(mass @ (there / np.maximum(inside, _TINY)))
                if none is not None:
                    self._put[k] += float(np.where(none, 1 - inside, there).sum())

    @property
    def exponent(self) -> float | None:
        """The b at which labels put on the sites' likeliest outcomes what these claim; None where none tried does."""
        curve = np.maximum.accumulate(self._put) - self._claimed
        if not curve[0] < 0 < curve[-1]:
            return None
        return float(np.exp(np.interp(0.0, curve, np.log(EXPONENTS))))


def sharpened(labels: NDArray[np.float32], exponent: float | None) -> NDArray[np.float32]:
    """Return labels^exponent (n, L), each row adding up to 1; for None, as they are."""
    if exponent is None or exponent == 1:
        return labels
    with np.errstate(divide="ignore"):  # a class of probability 0 keeps it
        logs = exponent * np.log(labels.astype(np.float64))
    logs -= logs.max(axis=1, keepdims=True)
    powers = np.exp(logs)
    narrow: NDArray[np.float32] = (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)
    return narrow


def _claims(rows: Floats) -> Floats:
    """Return (n,) the probability of the likeliest class in each row of log-probabilities (n, k)."""
    claims: Floats = np.exp(rows.max(axis=1) - np.logaddexp.reduce(rows, axis=1))
    return claims
