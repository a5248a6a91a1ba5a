"""What an attack's scores come to: areas, intervals and low false rates, by closed forms and by the definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import logit
from scipy.stats import beta, norm
from sklearn.metrics import roc_auc_score

from consilience.client.audit.losses import confidence, likelihood
from consilience.client.audit.membership import MOST_POINTS, Membership, membership
from consilience.common.errors import DataError

SCORES = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=30).map(np.array)


@pytest.mark.parametrize("shift", [0.0, 0.5, 2.0])
def test_the_area_of_two_gaussians_is_that_of_the_closed_form(shift: float) -> None:
    random = np.random.default_rng(3)
    found = membership(random.normal(shift, 1, 4000), random.normal(0, 1, 4000))
    expected = norm.cdf(shift / np.sqrt(2))
    assert found.low < expected < found.high
    assert found.high - found.low < 0.03
    for rate in (0.001, 0.01):
        share = found.found[rate]
        assert share is not None
        # the threshold is the others' own quantile, which is not exact in 4,000 of them
        assert share.share == pytest.approx(norm.sf(norm.isf(rate) - shift), abs=0.03)


@given(SCORES, SCORES)
def test_the_area_is_the_share_of_pairs_in_order_and_lies_in_its_interval(
    members: np.ndarray, others: np.ndarray
) -> None:
    found = membership(members, others)
    pairs = members[:, None] - others[None]
    assert found.auc == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean(), abs=1e-12)
    assert found.auc == pytest.approx(
        roc_auc_score(np.repeat([1, 0], [len(members), len(others)]), np.concatenate([members, others])), abs=1e-12
    )
    assert 0 <= found.low <= found.auc + 1e-12
    assert found.auc - 1e-12 <= found.high <= 1


@pytest.mark.parametrize(("shift", "m", "n"), [(0.0, 300, 60), (1.5, 80, 80), (3.0, 200, 40)])
def test_the_interval_holds_the_true_area_as_often_as_it_says(shift: float, m: int, n: int) -> None:
    random, truth = np.random.default_rng(7), norm.cdf(shift / np.sqrt(2))
    held = 0
    for _ in range(250):
        found = membership(random.normal(shift, 1, m), random.normal(0, 1, n))
        held += found.low <= truth <= found.high
    assert 0.92 <= held / 250 <= 0.985


def test_a_perfect_order_of_few_images_is_no_certainty() -> None:
    few = membership(np.arange(5.0) + 10, np.arange(5.0))
    many = membership(np.arange(500.0) + 1000, np.arange(500.0))
    assert (few.auc, few.high) == (1.0, 1.0)
    assert few.low == pytest.approx(beta.ppf(0.025, 5, 1))  # Clopper-Pearson of 5 pairs of 5
    assert few.low < 0.5 < 0.99 < many.low
    turned = membership(np.arange(5.0), np.arange(5.0) + 10)
    assert (turned.low, turned.high) == (0.0, pytest.approx(1 - few.low))


def test_scores_that_are_all_the_same_tell_nothing() -> None:
    found = membership(np.zeros(40), np.zeros(2000))
    assert (found.auc, found.low, found.high) == (0.5, 0.5, 0.5)
    share = found.found[0.001]
    assert share is not None
    assert (share.share, share.low) == (0, 0)


def test_a_false_rate_that_the_others_are_too_few_for_is_not_told() -> None:
    random = np.random.default_rng(0)
    found = membership(random.normal(1, 1, 500), random.normal(0, 1, 999))
    assert found.found[0.001] is None
    assert found.found[0.01] is not None
    assert membership(random.normal(1, 1, 500), random.normal(0, 1, 1000)).found[0.001] is not None
    assert membership(np.ones(5), np.zeros(99)).found[0.01] is None


@given(SCORES, SCORES.map(lambda scores: np.resize(scores, 130)))
def test_the_share_found_is_the_best_that_any_threshold_reaches(members: np.ndarray, others: np.ndarray) -> None:
    found = membership(members, others)
    share = found.found[0.01]
    assert share is not None
    thresholds = [np.inf, *np.unique(np.concatenate([members, others]))]
    best = max((members >= t).mean() for t in thresholds if (others >= t).mean() <= 0.01)
    assert share.share == pytest.approx(best)
    assert share.low <= best <= share.high
    k, m = round(best * len(members)), len(members)
    assert share.high == pytest.approx(beta.ppf(0.975, k + 1, m - k) if k < m else 1)


def test_equal_steps_of_tied_scores_hide_no_threshold() -> None:
    """One member and one other at each of 1,000 values: the curve is a straight line, and all its points count."""
    found = membership(np.arange(1000.0), np.arange(1000.0))
    for rate in (0.001, 0.01):
        share = found.found[rate]
        assert share is not None
        assert share.share == pytest.approx(rate)


def test_the_low_end_of_two_attacks_is_that_of_half_the_chance_of_error() -> None:
    random = np.random.default_rng(5)
    members, others = random.normal(0.3, 1, 300), random.normal(0, 1, 200)
    found = membership(members, others)
    # on the logit's scale the ends lie as far out as the quantiles do
    reach = (logit(found.auc) - logit([found.low, found.low_of_two])) / norm.ppf([0.975, 0.9875])
    assert reach[0] == pytest.approx(reach[1])
    few = membership(np.arange(5.0) + 10, np.arange(5.0))
    assert few.low_of_two == pytest.approx(beta.ppf(0.0125, 5, 1))


def test_a_long_curve_is_kept_short_with_its_left_end() -> None:
    random = np.random.default_rng(1)
    members, others = random.normal(1, 1, 20_000), random.normal(0, 1, 20_000)
    curve = membership(members, others).roc
    assert 100 < len(curve) <= MOST_POINTS
    assert (curve[0], curve[-1]) == ((0, 0), (1, 1))
    assert curve == tuple(sorted(curve))
    assert max(y for x, y in curve if x == 0) == pytest.approx((members > others.max()).mean())
    fractions = np.array(curve)
    area = np.trapezoid(fractions[:, 1], fractions[:, 0])
    assert area == pytest.approx(norm.cdf(1 / np.sqrt(2)), abs=0.01)


def test_a_record_is_read_back_as_it_was_written() -> None:
    random = np.random.default_rng(1)
    found = membership(random.normal(1, 1, 50), random.normal(0, 1, 200))
    assert Membership.model_validate_json(found.model_dump_json()) == found


@pytest.mark.parametrize("bad", [np.array([]), np.array([1.0, np.nan]), np.array([np.inf]), np.zeros((2, 2))])
def test_scores_that_are_none_are_refused(bad: np.ndarray) -> None:
    for given_ in ((bad, np.zeros(3)), (np.zeros(3), bad)):
        with pytest.raises(DataError, match="one finite score an image"):
            membership(*given_)


def test_confidence_keeps_its_digits_where_an_answer_is_nearly_certain() -> None:
    rows = np.log(np.array([[0.7, 0.2, 0.1], [0.25, 0.25, 0.5]]))
    labels = np.array([0, 2])
    np.testing.assert_allclose(likelihood(rows, labels), np.log([0.7, 0.5]))
    np.testing.assert_allclose(confidence(rows, labels), [np.log(0.7 / 0.3), 0], atol=1e-12)
    certain = np.array([[0.0, -40.0, -41.0]], np.float32)
    np.testing.assert_allclose(confidence(certain, np.array([0])), -np.log(np.exp(-40.0) + np.exp(-41.0)))
    assert confidence(np.zeros((3, 1)), np.zeros(3, np.int64)).tolist() == [0, 0, 0]
