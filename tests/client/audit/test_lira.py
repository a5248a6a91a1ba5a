"""The likelihood ratio, on scores of which everything is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from consilience.client.audit.lira import halves, likelihood_ratio
from consilience.client.audit.membership import membership

IMAGES = 3000
HARD = 4.0
"""Spread of how hard images are; learning from one shifts its score by 1, with spread 1."""


def toy(shadows: int, seed: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return scores (n,), whether an image is a member, scores of shadows and which of them learned from it."""
    random = np.random.default_rng(seed)
    hard, member = random.normal(0, HARD, IMAGES), random.random(IMAGES) < 0.5
    inside = halves(IMAGES, shadows, seed)
    scores = hard + member + random.normal(0, 1, IMAGES)
    return scores, member, hard + inside + random.normal(0, 1, inside.shape), inside


def area(scores: np.ndarray, member: np.ndarray) -> float:
    return membership(scores[member], scores[~member]).auc


@pytest.mark.parametrize("shadows", [63, 400])
def test_with_many_shadows_the_ratio_reaches_the_best_area_there_is(shadows: int) -> None:
    scores, member, others, inside = toy(shadows)
    # difficulty is known then: what is left is a shift of 1 with spread 1; by the score alone it drowns in difficulty
    assert area(likelihood_ratio(scores, others, inside), member) == pytest.approx(norm.cdf(1 / np.sqrt(2)), abs=0.02)
    assert area(scores, member) == pytest.approx(norm.cdf(1 / np.sqrt(2 * (1 + HARD**2))), abs=0.03)


def test_few_shadows_are_better_than_the_score_alone() -> None:
    scores, member, others, inside = toy(8)
    assert area(likelihood_ratio(scores, others, inside), member) > area(scores, member) + 0.08


def test_the_ratio_is_that_of_two_gaussians() -> None:
    shadows = np.array([[1.0, 5.0], [3.0, 4.0], [0.0, 2.0], [-2.0, 1.0]])
    inside = np.array([[True, False], [True, True], [False, True], [False, False]])
    # by hand: one spread for all, from 2 images of 2 scores each: squares 2 + 2 inside, 2 + 8 outside
    mean_in, mean_out = np.array([2.0, 3.0]), np.array([-1.0, 3.0])
    expected = norm.logpdf(1.5, mean_in, np.sqrt(2)) - norm.logpdf(1.5, mean_out, np.sqrt(5))
    np.testing.assert_allclose(likelihood_ratio(np.full(2, 1.5), shadows, inside), expected)


def test_shadows_that_all_say_the_same_give_a_finite_ratio() -> None:
    inside = halves(30, 8, 0)
    ratio = likelihood_ratio(np.zeros(30), np.zeros((8, 30)), inside)
    np.testing.assert_array_equal(ratio, np.zeros(30))


@pytest.mark.parametrize("shadows", [4, 7, 8])
def test_every_image_is_in_half_of_the_shadows_and_halves_are_independent(shadows: int) -> None:
    inside = halves(IMAGES, shadows, 5)
    assert inside.shape == (shadows, IMAGES)
    assert (inside.sum(axis=0) == shadows // 2).all()
    np.testing.assert_allclose(inside.mean(axis=1), (shadows // 2) / shadows, atol=0.04)
    np.testing.assert_array_equal(inside, halves(IMAGES, shadows, 5))
    assert (inside != halves(IMAGES, shadows, 6)).mean() > 0.4
