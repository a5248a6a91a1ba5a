"""From guesses about canaries to a lower bound on epsilon, by one training (Steinke, Nasr, Jagielski, NeurIPS 2023).

Lives here: numbers alone. Does not live here: where scores come from (canaries).

Each of m canaries was planted by a fair coin. Were the mechanism (epsilon, delta)-DP for one canary more or less, then
whoever guesses r of the coins from what it let out would be right at most about as often as r coins that come up right
with chance e^epsilon / (1 + e^epsilon) each. More right guesses than that are evidence against that epsilon, and the
largest epsilon that is refuted is a lower bound.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import binom

from consilience.common.errors import DataError, SettingsError

GUESSED = (1 / 8, 1 / 4, 1 / 2, 1.0)
"""Shares of the canaries about which a guess is made, half of it "in" and half "out". They are fixed before any score
is looked at; each is tested at the chance of error divided by how many they are (Bonferroni), and the best counts."""
HALVINGS = 40


@dataclass(frozen=True)
class Bound:
    """The lower bound on epsilon, and the guesses that it rests on: how many there were, how many were right."""

    epsilon: float
    guesses: int
    correct: int


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Return an upper bound on the chance of so many `correct` of `guesses` under (`epsilon`, `delta`)-DP.

    `guesses` of the `canaries` are guessed, the others left open. Corollary 5.4 of the paper: with W binomial,
    P[W >= correct] + 2 m delta max_i P[correct > W >= correct - i] / i. Raises `SettingsError` for numbers out of
    range.
    """
    if not 0 <= correct <= guesses <= canaries:
        raise SettingsError(f"Of {canaries} canaries {guesses} were guessed and {correct} rightly: cannot be")
    if not (epsilon >= 0 and 0 <= delta <= 1):
        raise SettingsError(f"epsilon is {epsilon:g} and delta {delta:g}; allowed: at least 0, and 0 to 1")
    right = float(expit(epsilon))
    chance = float(binom.sf(correct - 1, guesses, right))
    if delta and correct:
        below = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guesses, right))
        chance += 2 * canaries * delta * float((below / np.arange(1, correct + 1)).max())
    return min(chance, 1.0)


def lower_bound(canaries: int, guesses: int, correct: int, *, delta: float, confidence: float) -> float:
    """Return the epsilon that `correct` of `guesses` refute with `confidence`, in (0, 1); 0 where they refute none.

    Raises `SettingsError` as `p_value`, and for another confidence.
    """
    if not 0 < confidence < 1:
        raise SettingsError(f"confidence is {confidence:g}; allowed: between 0 and 1", hint="Give about 0.95")

    def refuted(epsilon: float) -> bool:
        return p_value(canaries, guesses, correct, epsilon, delta) < 1 - confidence

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high):  # at 40 or so the chance of a right guess is 1 in fp64, which nothing refutes
        low, high = high, 2 * high
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def bound_by_guesses(
    scores: NDArray[np.float64],
    planted: NDArray[np.bool_],
    random: np.random.Generator,
    *,
    delta: float,
    confidence: float,
) -> Bound:
    """Return the lower bound from scores (m,), larger for likelier planted canaries, and what was `planted` (m,).

    The highest scores are guessed to be in, as many of the lowest out, and those between are left open. Equal scores
    are told apart by `random`. Raises `SettingsError` as `lower_bound`, and `DataError` for scores that are not finite.
    """
    if not np.isfinite(scores).all():
        raise DataError(
            f"Of {len(scores)} scores of canaries {int(np.sum(~np.isfinite(scores)))} are not finite; expected one "
            "finite score a canary"
        )
    order = np.lexsort((random.random(len(scores)), scores))
    each = 1 - (1 - confidence) / len(GUESSED)
    best = Bound(0.0, 0, 0)
    for share in GUESSED:
        side = int(share * len(scores)) // 2
        if not side:
            continue
        correct = int(np.sum(~planted[order[:side]])) + int(np.sum(planted[order[-side:]]))
        epsilon = lower_bound(len(scores), 2 * side, correct, delta=delta, confidence=each)
        if epsilon >= best.epsilon:
            best = Bound(epsilon, 2 * side, correct)
    return best
