"""Fixed-point numbers: exact to their resolution, and sums of them never wrap."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consilience.common.errors import SettingsError
from consilience.common.sums.ring import MOST_SITES, Ring

weights = st.lists(st.floats(1, 10), min_size=1, max_size=MOST_SITES)


@given(weights)
@settings(max_examples=30)
def test_the_largest_sum_does_not_wrap(values: list[float]) -> None:
    ring = Ring(values)
    certain = np.array([[0.0, -1e4]])  # each site is sure of the first class
    words = [ring.encode(certain, weight) for weight in values]
    true = sum(int(word[0, 0]) for word in words)
    assert true < 2**32
    assert true > 2**32 - 4 * MOST_SITES  # and nearly all of the range is used
    total = np.zeros((1, 2), np.uint32)
    for word in words:
        total += word
    np.testing.assert_allclose(ring.decode(total)[0], [sum(values), 0], rtol=1e-6, atol=1e-6)


def test_sums_are_right_to_the_stated_resolution() -> None:
    random = np.random.default_rng(0)
    ring, exact, total = Ring([1.0] * 10), np.zeros((500, 7)), np.zeros((500, 7), np.uint32)
    for _ in range(10):
        scores = random.normal(0, 3, (500, 7))
        total += ring.encode(scores, 1.0)
        p = np.exp(scores)
        exact += p / p.sum(axis=1, keepdims=True)
    assert np.abs(ring.decode(total) - exact).max() <= 10 / (2 * ring.scale)
    assert 10 / (2 * ring.scale) < 1.2e-8


def test_an_offset_of_a_row_changes_nothing() -> None:
    scores = np.array([[0.0, 1.0, -2.0]], np.float32)
    ring = Ring([1.0, 2.0])
    np.testing.assert_array_equal(ring.encode(scores, 2.0), ring.encode(scores + 512, 2.0))


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ([], "positive"),
        ([1.0, 0.0], "positive"),
        ([1.0, -1.0], "positive"),
        ([1.0, float("nan")], "positive"),
        ([1.0, float("inf")], "positive"),
        ([1e308, 1e308], "positive"),
        ([1.0] * 256, "256 sites"),
        ([1.0, 1e-6], "1,048,576"),
    ],
)
def test_refused(values: list[float], part: str) -> None:
    with pytest.raises(SettingsError, match=part):
        Ring(values)
