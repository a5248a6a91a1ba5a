"""Ranks and curves are scikit-learn's, with ties; what tells nothing apart is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics

from consilience.common.roc import auroc, roc_auc_score, roc_curve

SCORES = st.lists(st.one_of(st.integers(-4, 4).map(float), st.floats(allow_nan=False)), min_size=1, max_size=40).map(
    lambda held: np.array(held, np.float64)
)
FINITE = SCORES.map(lambda scores: np.nan_to_num(scores))
KINDS = [np.bool_, np.int64]


@given(FINITE, FINITE, st.sampled_from(KINDS))
def test_the_numbers_are_scikit_learn_s_with_ties(mine: np.ndarray, others: np.ndarray, kind: type) -> None:
    truth = np.repeat([1, 0], [len(mine), len(others)]).astype(kind)
    scores = np.concatenate([mine, others])
    mixed = np.random.default_rng(len(scores)).permutation(len(scores))
    area = metrics.roc_auc_score(truth, scores)
    assert auroc(mine, others) == pytest.approx(area, abs=1e-12)
    assert roc_auc_score(truth[mixed], scores[mixed]) == pytest.approx(area, abs=1e-12)
    false, true = roc_curve(truth[mixed], scores[mixed])
    assert np.array_equal([false, true], metrics.roc_curve(truth, scores, drop_intermediate=False)[:2])


@given(SCORES, SCORES)
def test_infinite_scores_rank_as_the_largest_and_smallest(mine: np.ndarray, others: np.ndarray) -> None:
    """Scikit-learn takes none: ranks take their place."""
    _, ranks = np.unique(np.concatenate([mine, others]), return_inverse=True)
    truth = np.repeat([1, 0], [len(mine), len(others)])
    scores = np.concatenate([mine, others])
    assert roc_auc_score(truth, scores) == pytest.approx(metrics.roc_auc_score(truth, ranks), abs=1e-12)
    assert np.array_equal(roc_curve(truth, scores), metrics.roc_curve(truth, ranks, drop_intermediate=False)[:2])


@pytest.mark.parametrize("of", [roc_auc_score, roc_curve])
@pytest.mark.parametrize(
    ("truth", "scores"),
    [([], []), ([1, 1], [0.0, 1.0]), ([0], [0.0]), ([0, 1], [math.nan, 1.0]), ([1, 0], [math.nan, 1.0])],
)
def test_what_tells_nothing_apart_is_refused(of: object, truth: list[int], scores: list[float]) -> None:
    with pytest.raises(ValueError, match="missing, or scores are NaN"):
        of(truth, np.array(scores))  # type: ignore[operator]
