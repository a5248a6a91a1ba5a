"""What a policy takes from log-probabilities: its bounds hold, and nothing else changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import log_softmax

from consilience.client.shaping import check_floor, shape
from consilience.common.encoding.floats import log_prob_problem
from consilience.common.errors import SettingsError
from consilience.common.settings import Policy

ROWS = st.integers(2, 6).flatmap(
    lambda k: arrays(np.float64, st.tuples(st.integers(1, 5), st.just(k)), elements=st.floats(-200, 200))
)
POLICIES = st.builds(
    Policy,
    temperature=st.sampled_from([1.0, 1.5, 20.0]),
    decimals=st.sampled_from([None, 1, 2, 8]),
    cap=st.sampled_from([1.0, 0.99, 0.5]),
    floor=st.sampled_from([0.0, 1e-6, 0.1]),
)


def shaped(rows: Any, **policy: Any) -> np.ndarray:
    return shape(np.asarray(rows, np.float32), Policy(**policy))


@given(ROWS, POLICIES)
def test_bounds_hold_and_rows_stay_distributions_in_their_order(rows: np.ndarray, policy: Policy) -> None:
    log_probs = np.asarray(log_softmax(rows, axis=1), np.float32)
    out = shape(log_probs, policy)
    assert out.dtype == np.float32
    assert log_prob_problem(out) is None
    probs = np.exp(out.astype(np.float64))
    assert (probs <= policy.cap + 1e-6).all()
    assert (probs >= policy.floor * (1 - 1e-5)).all()
    order = np.argsort(log_probs, axis=1, kind="stable")
    assert (np.diff(np.take_along_axis(out, order, axis=1), axis=1) >= -1e-5).all()


@given(ROWS, POLICIES)
def test_a_row_s_answer_does_not_depend_on_its_neighbours(rows: np.ndarray, policy: Policy) -> None:
    log_probs = np.asarray(log_softmax(rows, axis=1), np.float32)
    single = np.concatenate([shape(log_probs[i : i + 1], policy) for i in range(len(log_probs))])
    assert np.array_equal(shape(log_probs, policy), single)


def test_a_policy_that_takes_nothing_away_gives_the_same_bytes() -> None:
    rows = np.log(np.array([[0.7, 0.2, 0.1]], np.float32))
    assert shape(rows, Policy()) is rows


def test_each_step_is_what_its_field_says() -> None:
    rows = np.log([[0.9, 0.09, 0.01]])
    assert np.allclose(shaped(rows, temperature=2), log_softmax(rows / 2, axis=1), atol=1e-6)
    assert np.allclose(np.exp(shaped(rows, cap=0.6)), [[0.6, 0.36, 0.04]], atol=1e-6)
    assert np.allclose(np.exp(shaped(rows, floor=0.1)), 0.1 + 0.7 * np.exp(rows), atol=1e-6)
    expected = np.array([[0.9, 0.1, 0.1 / 6]]) / (1 + 0.1 / 6)
    assert np.allclose(np.exp(shaped(rows, decimals=1)), expected, atol=1e-6)


def test_rounding_many_classes_to_nothing_says_nothing() -> None:
    rows = log_softmax(np.random.default_rng(0).normal(0, 0.1, (3, 1000)), axis=1)
    assert np.allclose(np.exp(shaped(rows, decimals=2)), 1e-3)


def test_one_class_stays_certain() -> None:
    assert np.array_equal(shaped([[0.0]], cap=0.5, temperature=3, decimals=1), [[0.0]])


@pytest.mark.parametrize(("floor", "classes"), [(0.1, 10), (0.4, 3)])
def test_a_floor_that_leaves_nothing_is_refused(floor: float, classes: int) -> None:
    with pytest.raises(SettingsError, match=rf"policy\.floor' is {floor:g}; .* {classes} classes"):
        check_floor(Policy(floor=floor), classes)
    check_floor(Policy(floor=floor), classes - 1)
