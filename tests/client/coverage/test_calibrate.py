"""Calibration gives back the coverage that samples were drawn by, and stays a probability whatever the scores."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.optimize import minimize
from scipy.special import expit

from consilience.client.coverage.calibrate import LOWEST, Platt, at_level, fit_platt


def drawn(slope: float, offset: float, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, float]:
    """Pool scores, private ones among scores of the same distribution, and the share of the pool that is private."""
    random = np.random.default_rng(seed)
    pool, more = random.normal(1, 2, n), random.normal(1, 2, n)
    mine = more[random.random(n) < expit(slope * more + offset)]
    return mine, pool, float(expit(slope * pool + offset).mean())


@pytest.mark.parametrize(("slope", "offset"), [(1.0, 0.0), (2.0, -3.0), (0.5, 1.0), (4.0, 2.0), (1.0, -4.0)])
def test_a_logistic_coverage_is_found(slope: float, offset: float) -> None:
    mine, pool, prior = drawn(slope, offset, 60_000)
    found = fit_platt(mine, pool, prior)
    scores = np.linspace(-4, 6, 101)
    assert found(scores) == pytest.approx(expit(slope * scores + offset), abs=0.04)
    assert found(pool).mean() == pytest.approx(prior, abs=0.02)


def test_it_is_the_likelihood_s_maximum() -> None:
    """Against a search of the likelihood as it is defined, with no algebra."""
    mine, pool, prior = drawn(1.5, -1.0, 400)

    def loss(parameters: np.ndarray) -> float:
        own, others = (expit(abs(parameters[0]) * s + parameters[1]) for s in (mine, pool))
        return float(-prior * np.log(own / (1 + own)).mean() - np.log(1 / (1 + others)).mean())

    best = minimize(loss, [1.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-12, "maxiter": 4000})
    found = fit_platt(mine, pool, prior)
    assert (found.slope, found.offset) == pytest.approx((abs(best.x[0]), best.x[1]), abs=1e-3)


@pytest.mark.parametrize("prior", [0.05, 0.5, 0.95])
def test_inverted_scores_tell_nothing(prior: float) -> None:
    random = np.random.default_rng(0)
    found = fit_platt(random.normal(-2, 1, 500), random.normal(0, 1, 500), prior)
    assert found.slope == 0
    assert found(np.array([-9.0, 0.0, 9.0])) == pytest.approx(prior, abs=1e-3)


@pytest.mark.parametrize("at", [0.0, 7.0, -1e6])
@pytest.mark.parametrize("prior", [0.002, 0.4, 1.0])
def test_constant_scores_give_the_prior(at: float, prior: float) -> None:
    found = fit_platt(np.full(50, at), np.full(80, at), prior)
    assert found(np.array([at])) == pytest.approx(min(prior, 1 - LOWEST), abs=1e-3)


def test_some_extreme_scores_leave_the_others_their_coverage() -> None:
    mine, pool, prior = drawn(2.0, -2.0, 5000)
    plain = fit_platt(mine, pool, prior)
    found = fit_platt(np.append(mine, [1e6] * 5), np.append(pool, [1e6, -1e6]), prior)
    scores = np.linspace(-3, 3, 13)
    assert found(scores) == pytest.approx(plain(scores), abs=0.03)


FLOATS = st.floats(-3e38, 3e38)
LISTS = st.lists(FLOATS, min_size=1, max_size=12).map(lambda held: np.array(held, np.float64))


@given(LISTS, LISTS, st.floats(1e-6, 1), st.lists(FLOATS, min_size=2, max_size=6))
def test_coverage_is_a_probability_that_rises_with_the_score(
    mine: np.ndarray, pool: np.ndarray, prior: float, scores: list[float]
) -> None:
    found = fit_platt(mine, pool, prior)
    assert found.slope >= 0
    covered = found(np.sort(np.array(scores)))
    assert np.all((covered >= LOWEST) & (covered <= 1 - LOWEST))
    assert np.all(np.diff(covered) >= 0)


@given(st.floats(-1e3, 1e3), st.floats(1e-2, 1e2))
def test_shifted_and_stretched_scores_give_the_same_coverage(shift: float, stretch: float) -> None:
    mine, pool, prior = drawn(1.0, 0.0, 300)
    found = fit_platt(mine * stretch + shift, pool * stretch + shift, prior)
    assert found(pool * stretch + shift) == pytest.approx(fit_platt(mine, pool, prior)(pool), abs=1e-3)


@pytest.mark.parametrize(
    ("mine", "pool"), [([], [1.0]), ([1.0], []), ([math.nan], [1.0]), ([1.0], [0.0, math.inf]), ([-math.inf], [0.0])]
)
def test_scores_that_are_none_are_refused(mine: list[float], pool: list[float]) -> None:
    with pytest.raises(ValueError, match="missing or not finite"):
        fit_platt(np.array(mine), np.array(pool), 0.5)


@pytest.mark.parametrize(("slope", "offset"), [(-0.1, 0.0), (math.nan, 0.0), (math.inf, 0.0), (1.0, math.nan)])
def test_a_map_that_is_none_is_refused(slope: float, offset: float) -> None:
    with pytest.raises(ValidationError):
        Platt(slope=slope, offset=offset)


def test_a_map_of_no_scores_gives_none() -> None:
    assert Platt(slope=1, offset=0)(np.empty(0)).shape == (0,)


def test_a_weight_is_a_score_given_so_often() -> None:
    mine, pool, prior = drawn(1.5, -1.0, 2_000)
    counts = np.random.default_rng(1).integers(1, 5, len(mine))
    found, repeated = fit_platt(mine, pool, prior, counts / 7), fit_platt(np.repeat(mine, counts), pool, prior)
    # the two centre scores elsewhere, which moves nothing but where the search ends
    assert (found.slope, found.offset) == pytest.approx((repeated.slope, repeated.offset), rel=1e-3)
    assert found != fit_platt(mine, pool, prior)


@given(
    st.floats(0, 20),
    st.floats(-30, 30),
    st.lists(st.floats(-50, 50), min_size=1, max_size=20),
    st.floats(0.001, 1),
)
def test_at_its_level_coverage_is_the_prior_on_average(
    slope: float, offset: float, scores: list[float], prior: float
) -> None:
    pool = np.array(scores)
    moved = at_level(Platt(slope=slope, offset=offset), pool, prior)
    assert moved.slope == slope
    assert expit(slope * pool + moved.offset).mean() == pytest.approx(min(prior, 1 - LOWEST), abs=1e-6)
