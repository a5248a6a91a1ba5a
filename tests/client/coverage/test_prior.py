"""The estimated share of the pool is what mixtures were made of; ranks are scikit-learn's."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from consilience.client.coverage.prior import CONFIDENCE, TIGHTNESS, auroc, estimate_prior


def mixture(prior: float, far: float, seed: int, held: int = 2000, pool: int = 5000) -> tuple[np.ndarray, np.ndarray]:
    """Scores of private samples, N(far, 1), and of a pool of which `prior` are such and the rest are N(0, 1)."""
    random = np.random.default_rng(seed)
    mine = random.random(pool) < prior
    return random.normal(far, 1, held), random.normal(0, 1, pool) + far * mine


def by_hand(mine: np.ndarray, pool: np.ndarray) -> float:
    """The estimate as the paper writes it, threshold by threshold."""
    best = (math.inf, 0.0)
    for threshold in sorted({*mine.tolist(), *pool.tolist()}):
        of_mine, of_pool = float((mine >= threshold).mean()), float((pool >= threshold).mean())
        if of_mine:
            slack = sum(math.sqrt(math.log(4 / CONFIDENCE) / (2 * n)) for n in (len(mine), len(pool)))
            bound = (of_pool + (1 + TIGHTNESS) * slack) / of_mine
            best = min(best, (bound, of_pool / of_mine))
    return min(1.0, max(best[1], 1 / (len(pool) + 1)))


@pytest.mark.parametrize("prior", [0.05, 0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("far", [3.0, 6.0])
def test_the_share_of_a_mixture(prior: float, far: float) -> None:
    found = [estimate_prior(*mixture(prior, far, seed)) for seed in range(8)]
    assert np.mean(found) == pytest.approx(prior, abs=0.04)
    assert max(abs(one - prior) for one in found) < 0.07


@pytest.mark.parametrize("far", [0.0, 0.7, 1.5])
def test_where_classes_are_alike_it_is_too_high_and_not_too_low(far: float) -> None:
    found = [estimate_prior(*mixture(0.3, far, seed)) for seed in range(8)]
    assert min(found) > 0.25
    assert estimate_prior(*mixture(0.3, 0.0, 0)) > 0.85


def test_closed_forms() -> None:
    assert estimate_prior(np.ones(100), np.repeat([1.0, 0.0], [30, 70])) == pytest.approx(0.3)
    assert estimate_prior(np.ones(100), np.zeros(99)) == pytest.approx(1 / 100)  # none is not never
    assert estimate_prior(np.zeros(100), np.zeros(50)) == 1.0  # all alike
    assert estimate_prior(np.zeros(100), np.ones(50)) == 1.0  # worse than alike
    assert estimate_prior(np.array([0.0]), np.array([0.0])) == 1.0


SCORES = st.lists(st.integers(-4, 4), min_size=1, max_size=40).map(lambda held: np.array(held, np.float64))


@given(SCORES, SCORES)
def test_it_is_the_paper_s_whatever_is_tied(mine: np.ndarray, pool: np.ndarray) -> None:
    assert estimate_prior(mine, pool) == pytest.approx(by_hand(mine, pool), rel=1e-9)


@given(SCORES, SCORES, st.integers(0, 99))
def test_neither_order_nor_a_rising_map_changes_it(mine: np.ndarray, pool: np.ndarray, seed: int) -> None:
    random = np.random.default_rng(seed)
    moved = estimate_prior(random.permutation(np.exp(mine)), random.permutation(np.exp(pool)))
    assert moved == estimate_prior(mine, pool)
    assert 0 < moved <= 1


@pytest.mark.parametrize(
    ("mine", "pool"),
    [([], [1.0]), ([1.0], []), ([], []), ([math.nan], [1.0]), ([1.0, 2.0], [math.nan, 1.0])],
)
def test_nothing_comes_of_nothing(mine: list[float], pool: list[float]) -> None:
    with pytest.raises(ValueError, match="missing or NaN"):
        estimate_prior(np.array(mine), np.array(pool))


@given(SCORES, SCORES)
def test_ranks_are_scikit_learn_s_with_ties(mine: np.ndarray, pool: np.ndarray) -> None:
    truth = np.repeat([1, 0], [len(mine), len(pool)])
    assert auroc(mine, pool) == pytest.approx(roc_auc_score(truth, np.concatenate([mine, pool])), abs=1e-12)


@given(SCORES, SCORES, st.lists(st.integers(1, 4), min_size=1, max_size=6))
def test_a_weight_is_a_score_given_so_often(mine: np.ndarray, pool: np.ndarray, times: list[int]) -> None:
    """Of ranks alone; in the estimate's margin repeated samples are no more samples than they were."""
    counts = np.resize(times, len(mine))
    repeated = np.repeat(mine, counts)
    assert auroc(mine, pool, counts * 0.3) == pytest.approx(auroc(repeated, pool), abs=1e-12)
    even = np.full(len(mine), 0.7)
    assert estimate_prior(mine, pool, even) == pytest.approx(estimate_prior(mine, pool), abs=1e-9)


def test_weights_undo_that_some_were_drawn_more_often() -> None:
    """Half of the mine-ish scores are one kind, far off; it is 30 times as frequent in the private sample."""
    random = np.random.default_rng(0)
    kinds = [(60_00, 8.0), (200, 4.0)]
    mine = np.concatenate([random.normal(far, 0.5, n) for n, far in kinds])
    weights = np.repeat([3100 / 6000, 3100 / 200], [n for n, _ in kinds])
    pool = np.concatenate([random.normal(far, 0.5, n) for n, far in ((1000, 8.0), (1000, 4.0), (2000, 0.0))])
    assert estimate_prior(mine, pool) == pytest.approx(0.26, abs=0.03)
    assert estimate_prior(mine, pool, weights) == pytest.approx(0.5, abs=0.03)
