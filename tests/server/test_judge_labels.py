"""Average precision by label: brute force, baselines, and labels of which nothing is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.special import expit

from consilience.common.label_scores import average_precision, average_precisions, mean_ap
from consilience.common.labels import LabelSpace
from consilience.server.judge_labels import judge_labels, label_agreement

SPACE = LabelSpace(("a", "b", "c"), ("east", "west"), ((0, 1), (1, 2)), multi=True)


def brute(truth: np.ndarray, scores: np.ndarray) -> float:
    """The sum over thresholds, falling, of precision times the rise of recall."""
    found, recall = 0.0, 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        taken = scores >= threshold
        now = truth[taken].sum() / truth.sum()
        found, recall = found + truth[taken].mean() * (now - recall), now
    return float(found)


@given(st.integers(1, 30), st.data())
def test_it_is_the_sum_over_thresholds(n: int, data: st.DataObject) -> None:
    truth = data.draw(hnp.arrays(np.int8, n, elements=st.integers(-1, 1)))
    scores = data.draw(hnp.arrays(np.float64, n, elements=st.sampled_from([0.0, 0.1, 0.5, 0.9])))
    found = average_precision(truth, scores)
    if (truth > 0).any():
        assert found == pytest.approx(brute(truth[truth >= 0], scores[truth >= 0]))
    else:
        assert found is None


def test_a_mean_leaves_out_what_is_not_known() -> None:
    assert mean_ap([0.5, None, 1.0]) == 0.75
    assert mean_ap([None]) is None
    assert average_precisions(np.array([[1, 0], [0, 0]], np.int8), np.zeros((2, 2))) == [0.5, None]


TRUTH = np.array([[1, 0, 1], [0, 1, 0], [1, 1, 0], [0, 0, -1]], np.int8)
EAST = np.array([[2.0, -1], [-2, 1], [1, 2], [-1, -3]])
WEST = np.array([[3.0, 2], [-2, -1], [-1, -2], [1, 5]])


def test_contenders_are_told_apart() -> None:
    student = np.log(np.array([[0.9, 0.1, 0.9], [0.1, 0.8, 0.2], [0.8, 0.9, 0.3], [0.7, 0.6, 0.1]]))
    found = judge_labels(TRUTH, SPACE, [EAST, WEST], None, student, None)
    assert found.student == 1.0
    assert found.baselines["unified_ensemble"] is None
    assert found.baselines["oracle"] is None
    b = (expit(EAST[:, 1]) + expit(WEST[:, 0])) / 2
    naive = [1.0, brute(TRUTH[:, 1], b), 1.0]
    assert found.baselines["naive"] == pytest.approx(np.mean(naive))
    # East says nothing of c, which one of three known images has.
    assert found.best_site == "east"
    assert found.baselines["best_site"] == pytest.approx((1 + 1 + 1 / 3) / 3)
    assert [(score.known, score.support) for score in found.labels] == [(4, 2), (4, 2), (3, 1)]
    assert found.sites[0].teacher == 1.0
    assert found.sites[1].teacher == pytest.approx((brute(TRUTH[:, 1], WEST[:, 0]) + 1) / 2)
    assert found.sites[0].accuracy == 1.0
    assert found.sites[1].student == 1.0


def test_a_site_that_did_not_answer_and_a_label_that_nobody_told_are_no_obstacle() -> None:
    unified = np.stack([expit(EAST[:, 0]), expit(EAST[:, 1]), np.full(4, np.nan)], axis=1)
    found = judge_labels(
        TRUTH, SPACE, [EAST, None], unified, np.log(np.full((4, 3), 0.5)), np.log(np.full((4, 3), 0.5))
    )
    assert found.sites[1].teacher is None
    assert found.labels[2].unified_ensemble == pytest.approx(1 / 3)
    assert found.baselines["naive"] == pytest.approx((1 + 1 + 1 / 3) / 3)
    assert found.student == found.baselines["oracle"]
    nobody = judge_labels(TRUTH, SPACE, [None, None], None, np.log(np.full((4, 3), 0.5)), None)
    assert set(nobody.baselines.values()) == {None}
    assert nobody.best_site is None


def test_calibration_counts_every_known_label_once() -> None:
    truth = np.array([[1, 0], [1, -1]], np.int8)
    space = LabelSpace(("a", "b"), ("one",), ((0, 1),), multi=True)
    found = judge_labels(truth, space, [None], None, np.log(np.array([[0.9, 0.2], [0.9, 0.5]])), None)
    # Two of probability 0.9 that apply, one of 0.2 that does not.
    assert found.calibration_error == pytest.approx((2 * 0.1 + 0.2) / 3)
    assert sum(b.count for b in found.reliability) == 3


def test_labels_without_any_known_image_are_no_score() -> None:
    found = judge_labels(np.full((3, 3), -1, np.int8), SPACE, [None, None], None, np.log(np.full((3, 3), 0.5)), None)
    assert found.student is None
    assert found.calibration_error is None


@pytest.mark.parametrize(
    ("truth", "student", "reason"),
    [
        (np.zeros((0, 3), np.int8), np.zeros((0, 3)), "m >= 1"),
        (np.zeros((2, 2), np.int8), np.zeros((2, 3)), "wanted"),
        (np.full((2, 3), 2, np.int8), np.zeros((2, 3)), "wanted"),
        (np.zeros((2, 3), np.int8), np.zeros((2, 2)), "student: shape"),
        (np.zeros((2, 3), np.int8), np.full((2, 3), np.nan), "student: NaN"),
    ],
)
def test_what_does_not_fit_is_refused(truth: np.ndarray, student: np.ndarray, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        judge_labels(truth, SPACE, [None, None], None, student, None)


def test_sites_agree_where_they_are_on_the_same_side() -> None:
    found = label_agreement([[EAST, WEST], [EAST[:1], None]], SPACE)
    # b: east -1, 1, 2, -3 and west 3, -2, -1, 1.
    assert found[0, 1] == found[1, 0] == 0
    assert np.isnan(found[0, 0])
    assert label_agreement([[EAST, -WEST]], SPACE)[0, 1] == 1
