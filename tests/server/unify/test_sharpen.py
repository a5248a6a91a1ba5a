"""How sure labels are to be: known exponents are found again, and labels of independent evidence become better."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import expit, log_softmax, softmax

from consilience.server.unify import unify
from consilience.server.unify.sharpen import Likeliest, sharpened

N = 4000
NOWHERE = np.zeros(N, np.float32)


def drawn(classes: int, seed: int = 0, samples: int = N) -> NDArray[np.float64]:
    return np.asarray(log_softmax(np.random.default_rng(seed).normal(0, 2, (samples, classes)), axis=1))


def softened(probs: NDArray[np.floating], exponent: float) -> NDArray[np.float64]:
    return np.asarray(softmax(exponent * np.log(probs), axis=1))


@pytest.mark.parametrize("exponent", [0.4, 1.0, 1.3, 3.0])
def test_labels_that_were_softened_get_the_exponent_that_undoes_it(exponent: float) -> None:
    rows = drawn(5)
    seen = Likeliest()
    seen.add(softened(np.exp(rows), 1 / exponent), [range(5)], [rows], [None], NOWHERE)
    assert seen.exponent == pytest.approx(exponent, rel=1e-3)


@pytest.mark.parametrize("exponent", [0.5, 1.7])
def test_coverage_makes_none_of_mine_an_outcome(exponent: float) -> None:
    rows = drawn(3, seed=1)  # classes 0 and 2, and none of them
    whole = np.exp(rows)
    coverage = (whole[:, 0] + whole[:, 1]).astype(np.float32)
    truth = whole[:, [0, 2, 1]]  # class 1 is what is none of the site's
    seen = Likeliest()
    seen.add(softened(truth, 1 / exponent), [(0, 2)], [rows[:, :2]], [coverage], NOWHERE)
    assert seen.exponent == pytest.approx(exponent, rel=1e-3)


def test_what_is_of_no_class_at_all_counts_for_nothing() -> None:
    """Labels are right on what is of a class; on the rest answers, though sure, and coverage do not count."""
    rows, coverage = drawn(3, seed=2), np.full(N, 0.9, np.float32)
    labels, other = softened(np.exp(rows), 1 / 1.5), np.full(N, 0.01, np.float32)
    strange = np.random.default_rng(0).random(N) < 0.3
    rows[strange], other[strange] = log_softmax([9.0, 0.0, 0.0]), 0.999
    labels[strange] = 1 / 3
    open_world, taken_as_closed = Likeliest(closed=False), Likeliest()
    for seen in (open_world, taken_as_closed):
        seen.add(labels, [range(3)], [rows], [coverage], other)
    assert open_world.exponent == pytest.approx(1.5, rel=5e-3)
    assert taken_as_closed.exponent != pytest.approx(1.5, rel=0.05)


def test_a_site_without_coverage_counts_by_what_labels_have_of_its_classes() -> None:
    rows = drawn(2, seed=3)
    labels = np.concatenate([0.5 * softened(np.exp(rows), 0.5), np.full((N, 1), 0.5)], axis=1)
    labels[::2] = [0.0, 0.0, 1.0]  # of these the site's answer says nothing, whatever it is
    rows[::2] = log_softmax([9.0, 0.0])
    seen = Likeliest()
    seen.add(labels, [(0, 1)], [rows], [None], NOWHERE)
    assert seen.exponent == pytest.approx(2.0, rel=1e-3)


def test_a_site_that_is_left_out_says_nothing() -> None:
    rows = drawn(4, seed=4)
    seen = Likeliest()
    others = [softened(np.exp(rows), 1 / 1.2), [range(4), range(4)], [rows, None], [None, None], NOWHERE]
    seen.add(*others)  # type: ignore[arg-type]
    assert seen.exponent == pytest.approx(1.2, rel=1e-3)


def test_blocks_add_up() -> None:
    rows = drawn(4, seed=5)
    labels, whole, parts = softened(np.exp(rows), 0.8), Likeliest(), Likeliest()
    whole.add(labels, [range(4)], [rows], [None], NOWHERE)
    for part in np.split(np.arange(N), [1, 1000, 1001]):
        parts.add(labels[part], [range(4)], [rows[part]], [None], NOWHERE[part])
    assert parts.exponent == pytest.approx(whole.exponent, rel=1e-9)


@pytest.mark.parametrize("labels", [np.full((N, 3), 1 / 3), np.eye(3)[np.zeros(N, int)]], ids=["flat", "certain"])
def test_labels_that_no_exponent_reconciles_with_the_sites_stay(labels: NDArray[np.float64]) -> None:
    seen = Likeliest()
    seen.add(labels, [range(3)], [drawn(3)], [None], NOWHERE)
    assert seen.exponent is None
    narrow = labels.astype(np.float32)
    assert sharpened(narrow, seen.exponent) is narrow


def test_without_samples_there_is_none() -> None:
    assert Likeliest().exponent is None


@given(st.floats(0.25, 4), st.integers(2, 6), st.integers(0, 2**32 - 1))
def test_sharpened_labels_are_powers(exponent: float, classes: int, seed: int) -> None:
    labels = np.exp(drawn(classes, seed, 20)).astype(np.float32)
    found = sharpened(labels, exponent)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(found.argmax(axis=1), labels.argmax(axis=1))
    expected = labels.astype(np.float64) ** exponent
    np.testing.assert_allclose(found, expected / expected.sum(axis=1, keepdims=True), rtol=1e-5, atol=1e-12)


def test_an_exponent_of_1_changes_no_bit_and_what_is_impossible_stays_so() -> None:
    labels = np.array([[0.25, 0.75, 0.0]], np.float32)
    assert sharpened(labels, 1.0) is labels
    np.testing.assert_allclose(sharpened(labels, 2.0), [[0.1, 0.9, 0.0]], rtol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_labels_of_sites_with_evidence_of_their_own_come_nearer_to_the_truth(seed: int) -> None:
    """Three sites of two classes each see the sample independently; each is calibrated by itself."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 6, N)
    answers, coverage = [], []
    for site in range(3):
        mine = truth // 2 == site
        score = rng.normal(np.where(mine, 2.0, 0.0))  # log odds of "mine": 2 score - 2, at even odds
        coverage.append(expit(2 * score - 2 - np.log(2)).astype(np.float32))
        within = rng.normal(np.where(truth % 2 == 1, 1.0, -1.0))
        answers.append(log_softmax(np.stack([np.zeros(N), 2 * within], axis=1), axis=1).astype(np.float32))
    sets = [(0, 1), (2, 3), (4, 5)]
    labels = unify(answers, sets, 6, coverage=coverage, strength=0.1).probs
    seen = Likeliest()
    seen.add(labels, sets, answers, coverage, NOWHERE)

    def surprise(probs: NDArray[np.floating]) -> float:
        return float(-np.log(np.maximum(probs[np.arange(N), truth], 1e-12)).mean())

    assert seen.exponent is not None
    assert seen.exponent > 1.1
    assert surprise(sharpened(labels, seen.exponent)) < surprise(labels) - 0.01
