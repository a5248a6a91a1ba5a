"""Guesses of the shares of classes, where the right ones follow from Bayes' rule."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import log_softmax
from scipy.stats import norm

from consilience.client.audit.shares import distance, guess_shares, mean_shares, scaled_shares

TRUE = np.array([0.7, 0.2, 0.1])
CENTRES = np.array([-1.0, 0.0, 1.5])


def answers(pool: np.ndarray, count: int = 40_000) -> np.ndarray:
    """Return what an exact classifier of classes with shares `TRUE` says of a pool with shares `pool`."""
    random = np.random.default_rng(4)
    points = CENTRES[random.choice(3, count, p=pool)] + random.normal(0, 1, count)
    return log_softmax(norm.logpdf(points[:, None], CENTRES) + np.log(TRUE), axis=1)


def test_the_mean_answer_tells_the_shares_where_the_pool_has_them_too() -> None:
    assert distance(mean_shares(answers(TRUE)), TRUE) < 0.01
    assert distance(mean_shares(answers(np.full(3, 1 / 3))), TRUE) > 0.1


def test_scaling_tells_the_shares_where_the_pool_has_all_classes_equally_often() -> None:
    assert distance(scaled_shares(answers(np.full(3, 1 / 3))), TRUE) < 0.02


def test_the_guesses_are_told_beside_that_of_one_who_knows_nothing() -> None:
    found = guess_shares(answers(np.full(3, 1 / 3)).astype(np.float32), ("a", "b", "c"), TRUE)
    assert found.distance_uniform == pytest.approx(0.7 - 1 / 3)
    assert found.gained > 0.3
    assert sum(found.by_mean) == pytest.approx(1)
    assert sum(found.by_scaling) == pytest.approx(1)


def test_answers_that_say_nothing_give_the_uniform_guess() -> None:
    found = guess_shares(np.full((5, 3), -np.log(3)), ("a", "b", "c"), TRUE)
    np.testing.assert_allclose([found.by_mean, found.by_scaling], 1 / 3, atol=1e-9)
    assert found.gained == pytest.approx(0, abs=1e-9)


def test_certain_answers_and_a_single_class_give_finite_guesses() -> None:
    certain = np.full((30, 3), -80.0)
    certain[np.arange(30), np.arange(30) % 2] = 0  # the third class is never the answer
    found = guess_shares(certain, ("a", "b", "c"), TRUE)
    np.testing.assert_allclose(found.by_mean, [0.5, 0.5, 0], atol=1e-9)
    assert np.isfinite(found.by_scaling).all()
    assert guess_shares(np.zeros((4, 1)), ("a",), np.ones(1)).by_scaling == (1.0,)
