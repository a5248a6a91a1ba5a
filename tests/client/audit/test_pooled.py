"""Shadows as targets: low false rates on scores of which everything is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from consilience.client.audit.lira import halves, likelihood_ratio
from consilience.client.audit.membership import membership
from consilience.client.audit.pooled import pool_shadows

SHIFT = 3.0


def toy(images: int, shadows: int, seed: int, shift: float = SHIFT) -> tuple[np.ndarray, np.ndarray]:
    """Return scores (S, n) of images of unequal difficulty, which learning shifts, and which shadows learned (S, n)."""
    random = np.random.default_rng(seed)
    inside = halves(images, shadows, seed)
    return random.normal(0, 4, images) + shift * inside + random.normal(0, 1, inside.shape), inside


def test_the_pooled_figures_are_those_of_all_targets_scores_in_one_curve() -> None:
    scores, inside = toy(300, 8, 1)
    found = pool_shadows(scores, inside, 0)
    assert found is not None
    rest = [[k for k in range(8) if k != one] for one in range(8)]
    ratios = np.stack([likelihood_ratio(scores[k], scores[rest[k]], inside[rest[k]]) for k in range(8)])
    whole = membership(ratios[inside], ratios[~inside])
    assert (found.targets, found.images) == (8, 300)
    assert found.auc == pytest.approx(whole.auc)
    for rate in (0.001, 0.01):
        mine, told = found.found[rate], whole.found[rate]
        assert mine is not None
        assert told is not None
        assert mine.share == pytest.approx(told.share)


def test_a_hundred_others_resolve_one_false_alarm_in_a_thousand() -> None:
    scores, inside = toy(300, 8, 1)
    assert membership(scores[0][inside[0]], scores[0][~inside[0]]).found[0.001] is None
    found = pool_shadows(scores, inside, 0)
    assert found is not None
    share = found.found[0.001]
    assert share is not None
    assert share.low < share.share < share.high
    few = pool_shadows(*toy(40, 8, 1), 0)
    assert few is not None
    assert (few.found[0.001], few.found[0.01] is None) == (None, False)


def test_with_many_shadows_it_comes_to_the_closed_form() -> None:
    found = pool_shadows(*toy(1500, 40, 2), 0)
    assert found is not None
    assert found.auc == pytest.approx(norm.cdf(SHIFT / np.sqrt(2)), abs=0.01)
    share = found.found[0.01]
    assert share is not None
    assert share.share == pytest.approx(norm.sf(norm.isf(0.01) - SHIFT), abs=0.06)


def test_intervals_hold_what_other_images_and_shadows_show() -> None:
    """Difficulty is the images' and a drift the shadows': both must be in the interval."""
    random, all_found = np.random.default_rng(3), []
    for seed in range(40):
        scores, inside = toy(120, 8, 100 + seed)
        scores = scores + random.normal(0, 1, (8, 1))
        found = pool_shadows(scores, inside, seed)
        assert found is not None
        all_found.append(found.found[0.01])
    truth = np.mean([one.share for one in all_found if one])
    assert np.mean([one.low <= truth <= one.high for one in all_found if one]) >= 0.9


def test_nothing_to_tell_is_told_as_nothing_and_never_as_certain() -> None:
    inside = halves(200, 8, 0)
    found = pool_shadows(np.zeros((8, 200)), inside, 0)
    assert found is not None
    assert found.auc == 0.5
    share = found.found[0.01]
    assert share is not None
    assert (share.share, share.low) == (0, 0)
    assert share.high > 0.01  # of 200 images none found


def test_too_few_shadows_to_leave_one_out_give_nothing() -> None:
    assert pool_shadows(*toy(100, 5, 1), 0) is None
    assert pool_shadows(*toy(100, 6, 1), 0) is not None


def test_all_follows_from_the_seed() -> None:
    scores, inside = toy(100, 8, 4)
    assert pool_shadows(scores, inside, 7) == pool_shadows(scores, inside, 7)
    assert pool_shadows(scores, inside, 7) != pool_shadows(scores, inside, 8)
