"""The lower bound on epsilon: right where the chances are known, and never more than it may be."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import expit, logit
from scipy.stats import binom, binomtest, norm

from consilience.client.audit.one_run import GUESSED, bound_by_guesses, lower_bound, p_value
from consilience.common.errors import DataError, SettingsError


def test_the_paper_s_own_numbers() -> None:
    # arXiv 2305.08846: appendix D, section 7
    assert lower_bound(1000, 100, 75, delta=1e-4, confidence=0.95) == pytest.approx(0.673, abs=1e-3)
    assert lower_bound(100_000, 1510, 1439, delta=1e-5, confidence=0.95) == pytest.approx(2.675, abs=1e-3)


@pytest.mark.parametrize(("guesses", "correct"), [(20, 20), (50, 31), (200, 140), (1000, 990), (1000, 501), (9, 3)])
def test_without_delta_it_is_clopper_and_pearson_s(guesses: int, correct: int) -> None:
    share = binomtest(correct, guesses, alternative="greater").proportion_ci(0.95, "exact").low
    assert lower_bound(guesses, guesses, correct, delta=0, confidence=0.95) == pytest.approx(
        max(0.0, float(logit(share))), abs=1e-9
    )


@pytest.mark.parametrize(("canaries", "guesses", "correct"), [(12, 8, 6), (8, 8, 8), (30, 5, 1), (6, 4, 0)])
def test_delta_s_part_is_the_sum_that_it_says(canaries: int, guesses: int, correct: int) -> None:
    right, delta = Fraction(3, 4), Fraction(1, 1000)  # epsilon log 3

    def chance(k: int) -> Fraction:
        return math.comb(guesses, k) * right**k * (1 - right) ** (guesses - k)

    most = max(
        (sum((chance(k) for k in range(correct - i, correct)), Fraction(0)) / i for i in range(1, correct + 1)),
        default=Fraction(0),
    )
    expected = sum((chance(k) for k in range(correct, guesses + 1)), Fraction(0)) + 2 * canaries * delta * most
    got = p_value(canaries, guesses, correct, math.log(3), 1e-3)
    assert got == pytest.approx(float(min(expected, Fraction(1))), rel=1e-12)


@pytest.mark.parametrize("guesses", [10, 57, 300])
@pytest.mark.parametrize("epsilon", [0.0, 0.5, 1.0, 3.0])
def test_it_is_too_large_for_randomised_response_in_one_of_twenty_at_most(guesses: int, epsilon: float) -> None:
    """Over all that can happen, by its exact chance."""
    chances = binom.pmf(np.arange(guesses + 1), guesses, expit(epsilon))
    bounds = [lower_bound(guesses, guesses, v, delta=0, confidence=0.95) for v in range(guesses + 1)]
    too_large = np.array(bounds) > epsilon + 1e-9
    assert chances[too_large].sum() <= 0.05
    assert guesses < 300 or chances[too_large].sum() > 0.01  # and not by being blind


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_it_comes_near_with_many_canaries(epsilon: float) -> None:
    correct = round(200_000 * float(expit(epsilon)))
    found = lower_bound(200_000, 200_000, correct, delta=0, confidence=0.95)
    assert epsilon - 0.05 < found < epsilon


@given(
    canaries=st.integers(1, 400),
    data=st.data(),
    delta=st.sampled_from([0.0, 1e-6, 1e-4]),
)
def test_more_right_guesses_are_never_less_evidence(canaries: int, data: st.DataObject, delta: float) -> None:
    guesses = data.draw(st.integers(0, canaries))
    correct = data.draw(st.integers(0, guesses))
    here = lower_bound(canaries, guesses, correct, delta=delta, confidence=0.95)
    assert lower_bound(canaries, guesses, correct, delta=delta, confidence=0.99) <= here + 1e-9
    assert lower_bound(canaries, guesses, correct, delta=delta + 1e-4, confidence=0.95) <= here + 1e-9
    assert here <= lower_bound(canaries, guesses, correct, delta=0, confidence=0.95) + 1e-9
    if correct < guesses:
        assert lower_bound(canaries, guesses, correct + 1, delta=delta, confidence=0.95) >= here - 1e-9
    assert here == 0 or correct > guesses / 2


def test_guesses_take_the_highest_scores_for_planted_ones() -> None:
    planted = np.arange(64) % 2 == 0
    random = np.random.default_rng(0)
    best = bound_by_guesses(np.where(planted, 1.0, -1.0), planted, random, delta=0, confidence=0.95)
    assert (best.guesses, best.correct) == (64, 64)
    # each of the four is tested at a quarter of the chance of error
    assert best.epsilon == pytest.approx(logit((0.05 / len(GUESSED)) ** (1 / 64)), abs=1e-9)
    worst = bound_by_guesses(np.where(planted, -1.0, 1.0), planted, random, delta=0, confidence=0.95)
    assert (worst.epsilon, worst.correct) == (0.0, 0)


def test_those_between_are_left_open_where_only_the_ends_tell() -> None:
    """Fifty canaries are found for certain, and of the others nothing is known."""
    random = np.random.default_rng(1)
    planted = random.random(400) < 0.5
    known = random.permutation(400)[:50]
    scores = random.normal(0, 1, 400)
    scores[known] = np.where(planted[known], 10, -10)
    best = bound_by_guesses(scores, planted, random, delta=0, confidence=0.95)
    assert best.guesses == 50
    assert best.epsilon > 1


def test_guesses_after_randomised_response_are_rarely_too_good() -> None:
    """The whole way, with the choice of how many are guessed, and ties everywhere."""
    random, epsilon, wrong, runs = np.random.default_rng(2), 1.0, 0, 300
    for _ in range(runs):
        planted = random.random(100) < 0.5
        told = np.where(random.random(100) < expit(epsilon), planted, ~planted)
        wrong += bound_by_guesses(told.astype(float), planted, random, delta=0, confidence=0.8).epsilon > epsilon
    # 20 % may be; three standard deviations above it
    assert wrong / runs <= 0.2 + 3 * math.sqrt(0.2 * 0.8 / runs)


def test_guesses_behind_gaussian_noise_stay_below_its_epsilon() -> None:
    """Noise of deviation 1 on one coin, 0 or 1: epsilon by the exact curve of Balle and Wang (2018)."""

    def delta_at(epsilon: float) -> float:
        return float(norm.cdf(0.5 - epsilon) - math.exp(epsilon) * norm.cdf(-0.5 - epsilon))

    delta = 1e-5
    truth = brentq(lambda epsilon: delta_at(epsilon) - delta, 0.1, 20)
    random, bounds = np.random.default_rng(3), []
    for _ in range(40):
        planted = random.random(1000) < 0.5
        scores = planted + random.normal(0, 1, 1000)
        bounds.append(bound_by_guesses(scores, planted, random, delta=delta, confidence=0.95).epsilon)
    assert max(bounds) < truth
    assert np.median(bounds) > 0.5


def test_nothing_is_made_of_nothing() -> None:
    random = np.random.default_rng(4)
    one = bound_by_guesses(np.zeros(1), np.array([True]), random, delta=0, confidence=0.95)
    assert (one.epsilon, one.guesses) == (0.0, 0)
    assert lower_bound(0, 0, 0, delta=0, confidence=0.95) == 0
    assert p_value(10, 10, 10, 800.0, 0.0) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_none_are_refused(bad: float) -> None:
    scores = np.array([0.5, bad, *range(18)])
    with pytest.raises(DataError, match="Of 20 scores of canaries 1 are not finite"):
        bound_by_guesses(scores, np.arange(20) % 2 == 0, np.random.default_rng(0), delta=0, confidence=0.95)


@pytest.mark.parametrize(
    ("numbers", "delta", "confidence", "said"),
    [
        ((10, 5, 6), 0.0, 0.95, "cannot be"),
        ((10, 11, 6), 0.0, 0.95, "cannot be"),
        ((10, 5, -1), 0.0, 0.95, "cannot be"),
        ((10, 5, 5), 2.0, 0.95, "delta 2;"),
        ((10, 5, 5), math.nan, 0.95, "delta nan;"),
        ((10, 5, 5), 0.0, 1.0, "confidence is 1"),
    ],
)
def test_numbers_out_of_range_are_refused(
    numbers: tuple[int, int, int], delta: float, confidence: float, said: str
) -> None:
    with pytest.raises(SettingsError, match=said):
        lower_bound(*numbers, delta=delta, confidence=confidence)
