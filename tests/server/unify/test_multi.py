"""Labels unified each by itself: closed forms, an optimiser, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit

from consilience.common.errors import UnifyError
from consilience.server.unify.multi import unify_labels

SETS = [[0, 1], [1, 2]]


def odds(*rows: list[float]) -> list[np.ndarray]:
    return [np.array([row], np.float64) for row in rows]


def test_a_label_of_one_owner_stays_as_it_is_and_a_shared_one_is_the_mean() -> None:
    found = unify_labels(odds([2.0, -1.0], [3.0, 0.5]), SETS, 3)
    assert found.probs.dtype == np.float32
    assert np.allclose(logit(found.probs.astype(np.float64))[0], [2.0, 1.0, 0.5], atol=1e-5)
    assert np.allclose(found.spread[0], [0, 2, 0], atol=1e-6)
    assert found.answered.tolist() == [True, True, True]


def test_weights_and_coverage_weigh_and_temperature_softens() -> None:
    coverage = [np.array([0.25]), np.array([1.0])]
    found = unify_labels(odds([0.0, -1.0], [3.0, 0.0]), SETS, 3, weights=[2, 1], coverage=coverage, strength=0.5)
    # Weights 2 * 0.25 ** 0.5 and 1: equal.
    assert np.allclose(logit(found.probs[0].astype(np.float64)), [0, 1, 0], atol=1e-6)
    softer = unify_labels(odds([0.0, -1.0], [3.0, 0.0]), SETS, 3, temperature=2.0)
    assert np.allclose(logit(softer.probs[0].astype(np.float64)), [0, 0.5, 0], atol=1e-6)
    each = unify_labels(odds([0.0, -1.0], [3.0, 0.0]), SETS, 3, coverage=coverage, strength=[1.0, 0.3])
    assert logit(float(each.probs[0, 1])) == pytest.approx((0.25 * -1 + 3) / 1.25, abs=1e-5)


def test_coverage_of_one_site_alone_and_of_0_leaves_its_own_labels_as_they_are() -> None:
    found = unify_labels(odds([2.0, -1.0], [3.0, 0.5]), SETS, 3, coverage=[np.array([0.0]), None], strength=1.0)
    assert np.allclose(logit(found.probs[0].astype(np.float64)), [2, 3, 0.5], atol=1e-4)


def test_labels_without_an_answer_are_told_as_such() -> None:
    found = unify_labels(odds([2.0]), [[1]], 3)
    assert np.isnan(found.probs[0]).tolist() == [True, False, True]
    assert np.isnan(found.spread[0]).tolist() == [True, False, True]
    assert found.answered.tolist() == [False, True, False]


@given(st.lists(st.tuples(st.floats(-8, 8), st.floats(0.1, 5)), min_size=1, max_size=5))
def test_it_is_where_the_weighted_relative_entropy_is_least(held: list[tuple[float, float]]) -> None:
    values, weights = map(np.array, zip(*held, strict=True))
    found = unify_labels([np.array([[v]]) for v in values], [[0]] * len(held), 1, weights=weights.tolist())

    def entropy(d: float) -> float:
        p, q = expit(d), expit(values)
        return float((weights * (p * (d - values) + np.log1p(-p) - np.log1p(-q))).sum())

    best = minimize_scalar(entropy, bounds=(-9, 9), method="bounded", options={"xatol": 1e-9}).x
    assert float(found.probs[0, 0]) == pytest.approx(expit(best), abs=1e-4)


def test_sites_in_another_order_and_samples_by_themselves_come_to_the_same() -> None:
    random = np.random.default_rng(0)
    rows = [random.normal(0, 3, (50, 2)), random.normal(0, 3, (50, 2)), random.normal(0, 3, (50, 3))]
    sets = [[0, 3], [3, 1], [1, 2, 3]]
    whole = unify_labels(rows, sets, 4)
    assert np.allclose(unify_labels(rows[::-1], sets[::-1], 4).probs, whole.probs, atol=1e-6)
    parts = [unify_labels([r[k : k + 1] for r in rows], sets, 4).probs for k in range(50)]
    assert np.array_equal(np.concatenate(parts), whole.probs)


def test_answers_at_the_ends_stay_finite() -> None:
    found = unify_labels(odds([100.0], [-100.0]), [[0], [0]], 1)
    assert found.probs.tolist() == [[0.5]]
    assert found.spread[0, 0] == 100


def test_no_samples_give_no_labels() -> None:
    assert unify_labels([np.empty((0, 2), np.float32)], [[0, 1]], 3).probs.shape == (0, 3)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"log_odds": []}, "answers of 0 sites"),
    ({"log_odds": odds([1.0, 2.0], [1.0])}, "shape \\(1, 1\\)"),
    ({"log_odds": [np.zeros((1, 2), np.int64), np.zeros((1, 2))]}, "type int64"),
    ({"log_odds": odds([1.0, 2.0], [np.nan, 0.0])}, "site 1 are not finite in row 0"),
    ({"class_sets": [[0, 0], [1, 2]]}, "class set of site 0"),
    ({"class_sets": [[0, 1], [1, 3]]}, "class set of site 1"),
    ({"weights": [1.0]}, "weights"),
    ({"weights": [1.0, 0.0]}, "weights"),
    ({"weights": [1.0, float("nan")]}, "weights"),
    ({"coverage": [np.array([1.2]), None]}, "coverage of site 0 holds 1.2 in row 0"),
    ({"coverage": [None, np.array([np.nan])]}, "coverage of site 1 holds nan"),
    ({"coverage": [None, np.array([0.1, 0.2])]}, "instead of \\(1,\\)"),
]


@pytest.mark.parametrize(("changes", "reason"), BAD)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], reason: str) -> None:
    held: dict[str, Any] = {"log_odds": odds([1.0, 2.0], [3.0, 4.0]), "class_sets": SETS, "num_classes": 3}
    with pytest.raises(UnifyError, match=reason):
        unify_labels(**(held | changes))
