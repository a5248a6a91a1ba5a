"""Average precision by vertical against scikit-learn and small cases by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from consilience.server.judge_verticals import average_precision, judge_verticals


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=1, max_size=40))
def test_average_precision_is_scikit_learns_with_ties_too(pairs: list[tuple[bool, int]]) -> None:
    positive, scores = np.array([p for p, _ in pairs]), np.array([s for _, s in pairs], np.float32)
    if positive.any():
        assert average_precision(positive, scores) == pytest.approx(
            average_precision_score(positive, scores), abs=1e-12
        )
    else:
        with pytest.raises(ValueError, match="needs a positive"):
            average_precision(positive, scores)


def test_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="numbers"):
        average_precision(np.array([True, False]), np.array([0.0, np.nan]))


def test_within_and_against_all_are_what_they_say() -> None:
    random = np.random.default_rng(0)
    verticals = [(0, 3), (1, 2, 4), (5,)]
    truth = random.integers(-1, 5, 60)  # none of class 5
    scores = random.normal(size=(60, 6)) + 2 * (truth[:, None] == np.arange(6))
    log_probs = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    told = judge_verticals(truth, log_probs, verticals)
    for v, classes in enumerate(verticals[:2]):
        here = np.isin(truth, classes)
        own = np.exp(log_probs[here][:, classes])
        own /= own.sum(axis=1, keepdims=True)
        within = [average_precision_score(truth[here] == c, own[:, at]) for at, c in enumerate(classes)]
        against = [average_precision_score(truth == c, log_probs[:, c]) for c in classes]
        assert told.within[v] == pytest.approx(np.mean(within), abs=1e-12)
        assert told.against_all[v] == pytest.approx(np.mean(against), abs=1e-12)
    assert told.within[2] is told.against_all[2] is None
    assert told.mean_within == pytest.approx((told.within[0] + told.within[1]) / 2)  # type: ignore[operator]


def test_without_images_nothing_is_known() -> None:
    told = judge_verticals(np.empty(0, np.int64), np.empty((0, 2)), [(0,), (1,)])
    assert told.within == (None, None)
    assert told.mean_against_all is None


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="wanted"):
        judge_verticals(np.zeros(2, np.int64), np.zeros((3, 2)), [(0, 1)])
