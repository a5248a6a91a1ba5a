"""Rounded Gaussians: as SciPy has them, in the middle and where hardly anything is."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import chisquare, norm

from consilience.client.privacy.rounded import NEAR, RoundedGaussian, rounded

WHOLE = 2**63


def words(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, (count, 2), np.uint64)


@pytest.mark.parametrize("sigma", [256.0, 1000.3, 2.0**17])
def test_numbers_are_distributed_as_they_should_be(sigma: float) -> None:
    count = 400_000
    found = RoundedGaussian(sigma).draw(words(count, 1))
    edges = np.round(sigma * np.linspace(-3.6, 3.6, 91)) + 0.5
    chances = np.diff(norm.cdf(np.array([-np.inf, *edges, np.inf]) / sigma))
    seen = np.histogram(found, np.array([-np.inf, *edges, np.inf]))[0]
    assert chisquare(seen, chances * count).pvalue > 1e-4
    single = np.bincount(np.abs(found[np.abs(found) < 8]), minlength=8)  # number by number, where they are likely
    due = count * np.diff(norm.cdf(np.arange(-0.5, 8) / sigma)) * np.array([1.0, *[2.0] * 7])
    assert chisquare(single, due * single.sum() / due.sum()).pvalue > 1e-4
    # and no other width passes
    wrong = np.diff(norm.cdf(np.array([-np.inf, *edges, np.inf]) / (1.03 * sigma)))
    assert chisquare(seen, wrong * count).pvalue < 1e-10


@pytest.mark.parametrize("sigma", [256.0, 777.7, 2.0**15])
def test_every_threshold_is_where_the_chance_says(sigma: float) -> None:
    """The word with which the next number begins is the chance of all smaller ones."""
    sizes = np.unique(np.linspace(1, int(NEAR * sigma) - 1, 500).astype(np.int64))
    below = 1 - 2 * norm.sf((sizes - 0.5) / sigma)
    slack = 2**-45  # of SciPy's difference from 1
    draw = RoundedGaussian(sigma).draw
    for shift, wanted in ((-slack, sizes - 1), (slack, sizes)):
        first = ((below + shift) * WHOLE).astype(np.uint64) << np.uint64(1)
        assert np.array_equal(draw(np.stack([first, first], axis=1)), wanted)
        assert np.array_equal(draw(np.stack([first | np.uint64(1), first], axis=1)), -wanted)


def test_far_numbers_are_as_rare_as_they_should_be() -> None:
    """Given that a number is beyond 4 standard deviations, the second word says how far, to 9 of them."""
    sigma = 1024.0
    near = int(NEAR * sigma)
    tail = norm.sf((near - 0.5) / sigma)
    sizes = np.array([near, near + 1, near + 50, int(5 * sigma), int(6 * sigma), int(7 * sigma)])
    beyond = norm.sf((sizes + 0.5) / sigma) / tail  # of the next one or more
    first = np.full(len(sizes), 2**64 - 2, np.uint64)
    for share, wanted in ((1 - 1e-6, sizes), (1 + 1e-6, None)):
        second = ((1 - beyond * share) * WHOLE).astype(np.uint64) << np.uint64(1)
        found = RoundedGaussian(sigma).draw(np.stack([first, second], axis=1))
        if wanted is None:
            assert (np.abs(found - sizes) <= 1).all()
        else:
            assert ((found - sizes >= 0) & (found - sizes <= 1)).all()
    ends = np.array([[2**64 - 1, 2**64 - 1], [2**64 - 2, 2**64 - 1]], np.uint64)
    assert np.abs(RoundedGaussian(sigma).draw(ends)).max() <= 9 * sigma


def test_the_same_words_give_the_same_numbers_in_any_shape() -> None:
    some = words(60, 3)
    found = rounded(300.0).draw(some)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(rounded(300.0).draw(some.reshape(6, 10, 2)), found.reshape(6, 10))
    assert rounded(300.0).draw(some[:0]).shape == (0,)
