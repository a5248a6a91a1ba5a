"""Noisy votes against closed forms, and the way back to the simplex against brute force."""

from __future__ import annotations

from itertools import chain, combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.integrate import quad
from scipy.stats import norm

from consilience.client.privacy.votes import answers, draws, sums
from consilience.common.settings import Pate
from consilience.common.simplex import UNSURE, as_answer, project

ARG_MAX = Pate(mechanism="pate", parts=10, sigma=3)
CONFIDENT = Pate(mechanism="pate", parts=10, sigma=3, answer="confident", threshold=6, threshold_sigma=2)
AVERAGE = Pate(mechanism="pate", parts=10, sigma=3, answer="average")
TRIES = 200_000


def nearest(row: np.ndarray) -> np.ndarray:
    """The projection by trying every support: on each, the constraint alone shifts all entries evenly."""
    places = range(len(row))
    best, distance = row, np.inf
    for support in chain.from_iterable(combinations(places, k) for k in range(1, len(row) + 1)):
        found = np.zeros_like(row)
        kept = list(support)
        found[kept] = row[kept] - (row[kept].sum() - 1) / len(kept)
        if (found >= -1e-12).all() and np.sum((found - row) ** 2) < distance:
            best, distance = found, np.sum((found - row) ** 2)
    return best


@settings(max_examples=60)
@given(arrays(np.float64, st.tuples(st.just(2), st.integers(1, 6)), elements=st.floats(-50, 50)))
def test_the_projection_is_the_nearest_distribution(rows: np.ndarray) -> None:
    found = project(rows)
    for row, projected in zip(rows, found, strict=True):
        np.testing.assert_allclose(projected, nearest(row), atol=1e-9)


def test_a_distribution_stays_as_it_is_and_nothing_is_nothing() -> None:
    rows = np.random.default_rng(0).dirichlet(np.ones(7), 50)
    np.testing.assert_allclose(project(rows), rows, atol=1e-12)
    assert project(np.empty((0, 7))).shape == (0, 7)


def test_an_answer_is_log_probabilities_and_never_certain() -> None:
    rows = as_answer(np.array([[1.0, 0, 0, 0], [0.25, 0.25, 0.25, 0.25]]))
    assert rows.dtype == np.float32
    np.testing.assert_allclose(np.exp(rows.astype(np.float64)).sum(axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(np.exp(rows[0]), [1 - UNSURE * 0.75, *[UNSURE / 4] * 3], rtol=1e-5)
    np.testing.assert_allclose(rows[1], np.log(0.25), rtol=1e-6)


def frequencies(private: Pate, counts: list[float]) -> np.ndarray:
    """Return how often each class wins; a row that says nothing counts for none."""
    total = np.tile(np.array(counts), (TRIES, 1))
    probs = answers(private, total, np.random.default_rng(7).standard_normal((TRIES, draws(private, len(counts)))))
    won = probs.max(axis=1) == 1
    uniform = np.isclose(probs, 1 / len(counts)).all(axis=1)
    assert (won ^ uniform).all()
    return np.bincount(probs[won].argmax(axis=1), minlength=len(counts)) / TRIES


def wins(counts: list[float], sigma: float, winner: int) -> float:
    """P(noisy count of `winner` is the largest): an integral over its own noise."""

    def at(x: float) -> float:
        others = [norm.cdf((x - c) / sigma) for k, c in enumerate(counts) if k != winner]
        return float(norm.pdf(x, counts[winner], sigma) * np.prod(others))

    return float(quad(at, counts[winner] - 10 * sigma, counts[winner] + 10 * sigma, epsabs=1e-10)[0])


@pytest.mark.parametrize("counts", [[7.0, 3.0], [5.0, 3.0, 2.0], [4.0, 4.0, 1.0, 1.0]])
def test_a_noisy_vote_falls_as_often_as_it_should(counts: list[float]) -> None:
    found = frequencies(ARG_MAX, counts)
    expected = [wins(counts, 3, k) for k in range(len(counts))]
    assert sum(expected) == pytest.approx(1)
    np.testing.assert_allclose(found, expected, atol=4 * 0.5 / np.sqrt(TRIES))
    if len(counts) == 2:
        assert expected[0] == pytest.approx(norm.cdf((counts[0] - counts[1]) / (3 * np.sqrt(2))))


@pytest.mark.parametrize("counts", [[7.0, 3.0], [4.0, 3.0, 3.0]])
def test_a_confident_vote_says_nothing_as_often_as_it_should(counts: list[float]) -> None:
    passes = norm.cdf((max(counts) - 6) / 2)
    expected = [passes * wins(counts, 3, k) for k in range(len(counts))]
    np.testing.assert_allclose(frequencies(CONFIDENT, counts), expected, atol=4 * 0.5 / np.sqrt(TRIES))


def test_the_average_has_the_noise_that_it_says() -> None:
    total = np.tile([6.0, 3.0, 1.0], (TRIES, 1))
    normal = np.random.default_rng(3).standard_normal((TRIES, 3))
    still = answers(AVERAGE, total, 0 * normal)
    np.testing.assert_allclose(still, total / 10, atol=1e-7)
    # small noise stays on the simplex but for the part along (1, 1, 1), which the projection takes away
    small = AVERAGE.model_copy(update={"sigma": 0.2})
    spread = answers(small, total, normal) - total / 10
    assert spread.std(axis=0) == pytest.approx(0.02 * np.sqrt(2 / 3), rel=0.02)
    loud = answers(AVERAGE, total, normal * 100)
    assert (loud >= 0).all()
    np.testing.assert_allclose(loud.sum(axis=1), 1, atol=1e-9)


def test_sums_of_parts_by_hand_and_what_one_part_can_move() -> None:
    probs = np.array([[[0.6, 0.3, 0.1]], [[0.1, 0.8, 0.1]], [[0.5, 0.5, 0.0001]]])
    probs /= probs.sum(axis=2, keepdims=True)
    logs = np.log(probs).astype(np.float32)
    np.testing.assert_array_equal(sums(ARG_MAX, logs), [[2, 1, 0]])  # of two that are equal, the first
    np.testing.assert_array_equal(sums(CONFIDENT, logs), [[2, 1, 0]])
    np.testing.assert_allclose(sums(AVERAGE, logs), probs.sum(axis=0), rtol=1e-6)
    random = np.random.default_rng(0)
    for private in (ARG_MAX, AVERAGE):
        parts = np.log(random.dirichlet(np.full(4, 0.1), (9, 50)) + 1e-12).astype(np.float32)
        changed = parts.copy()
        changed[4] = np.log(random.dirichlet(np.full(4, 0.05), 50) + 1e-12)
        moved = sums(private, parts) - sums(private, changed)
        assert np.linalg.norm(moved, axis=1).max() <= np.sqrt(2) + 1e-6
        assert np.linalg.norm(moved, axis=1).max() > 1.2
        largest = sums(ARG_MAX, parts).max(axis=1) - sums(ARG_MAX, changed).max(axis=1)
        assert np.abs(largest).max() <= 1
