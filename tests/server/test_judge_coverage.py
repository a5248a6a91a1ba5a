"""The figures of a site's coverage against scikit-learn, plain loops and closed forms."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from sklearn.metrics import auc, roc_auc_score

from consilience.common.pages.figures import BAR, BLUE, GREY
from consilience.server.judge import BINS
from consilience.server.judge_coverage import MOST_POINTS, coverage_figures, ends, roc
from consilience.server.plots_coverage import histogram
from consilience.server.plots_coverage import roc as draw_roc


def case(n: int = 3000, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    coverage = rng.beta(0.6, 0.9, n)
    return coverage, rng.uniform(size=n) < coverage**1.5, rng.uniform(size=n)


def test_figures_against_scikit_learn_and_loops() -> None:
    coverage, mine, confidence = case()
    found = coverage_figures(coverage, mine, confidence)
    assert found.roc is not None
    assert found.confidence is not None
    assert found.roc.auroc == pytest.approx(roc_auc_score(mine, coverage))
    assert found.confidence.auroc == pytest.approx(roc_auc_score(mine, confidence))
    assert (found.samples, found.mean, found.share) == (
        3000,
        pytest.approx(coverage.mean()),
        pytest.approx(mine.mean()),
    )
    assert (found.low, found.high) == (coverage.min(), coverage.max())
    error = 0.0
    for b in range(BINS):
        inside = [n for n in range(3000) if b / BINS < coverage[n] <= (b + 1) / BINS]
        assert found.counts[b] == len(inside)
        assert found.mine is not None
        assert found.mine[b] == sum(mine[inside])
        assert found.reliability[b].accuracy == pytest.approx(mine[inside].mean())
        error += len(inside) / 3000 * abs(mine[inside].mean() - coverage[inside].mean())
    assert found.calibration_error == pytest.approx(error)


def test_a_closed_form() -> None:
    coverage = np.array([0.0, 0.25, 0.75, 1.0])
    found = coverage_figures(coverage, np.array([False, True, False, True]), np.array([0.9, 0.8, 0.7, 0.6]))
    assert found.roc is not None
    assert found.roc.auroc == 0.75  # of four pairs, three are in order
    assert found.roc.points == ((0, 0), (0, 0.5), (0.5, 0.5), (0.5, 1), (1, 1))
    assert found.confidence is not None
    assert found.confidence.auroc == 0.25
    assert found.calibration_error == pytest.approx((0 + 0.75 + 0.75 + 0) / 4)
    assert [b for b, n in enumerate(found.counts) if n] == [0, 3, 11, 14]


def test_without_labels_only_what_needs_none() -> None:
    found = coverage_figures(np.array([0.5, 0.25]), None, None)
    assert (found.samples, found.mean, sum(found.counts)) == (2, 0.375, 2)
    assert (found.roc, found.mine, found.share, found.calibration_error, found.reliability) == (None,) * 4 + ((),)


@pytest.mark.parametrize("mine", [[True] * 3, [False] * 3])
def test_one_kind_of_samples_has_no_roc_but_is_calibrated_or_not(mine: list[bool]) -> None:
    found = coverage_figures(np.array([0.5, 0.5, 0.5]), np.array(mine), np.array([0.1, 0.2, 0.3]))
    assert (found.roc, found.confidence) == (None, None)
    assert found.calibration_error == 0.5


def test_samples_that_the_teacher_did_not_answer_do_not_count_for_its_roc() -> None:
    coverage, mine, confidence = case(200)
    confidence[::3] = np.nan
    found = coverage_figures(coverage, mine, confidence)
    known = np.isfinite(confidence)
    assert found.confidence is not None
    assert found.confidence.auroc == pytest.approx(roc_auc_score(mine[known], confidence[known]))
    nothing = coverage_figures(coverage, mine, np.full(200, np.nan))
    assert nothing.confidence is None
    json.dumps(vars(nothing) | {"roc": None, "reliability": None}, allow_nan=False)


def test_a_long_curve_is_thinned_and_keeps_its_area() -> None:
    coverage, mine, _ = case(20_000)
    found = roc(coverage, mine)
    assert found is not None
    assert 50 < len(found.points) <= MOST_POINTS + 2
    points = np.array(found.points)
    assert points[0].tolist() == [0, 0]
    assert points[-1].tolist() == [1, 1]
    assert (np.diff(points, axis=0) >= 0).all()
    assert auc(points[:, 0], points[:, 1]) == pytest.approx(found.auroc, abs=1e-3)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), max_size=30))
def test_ends_are_the_largest_and_smallest_and_share_none(values: list[float]) -> None:
    coverage = np.array(values)
    largest, smallest = ends(coverage)
    assert len(largest) == len(smallest) == min(8, len(values) // 2)
    assert not set(largest) & set(smallest)
    assert_array_equal(coverage[largest], np.sort(coverage)[::-1][: len(largest)])
    assert_array_equal(coverage[smallest], np.sort(coverage)[: len(smallest)])


def test_of_equals_the_first_rows_are_shown() -> None:
    largest, smallest = ends(np.full(40, 0.5))
    assert largest.tolist() == [*range(8)]
    assert smallest.tolist() == [*range(8, 16)]


def test_figures_draw_what_there_is() -> None:
    coverage, mine, confidence = case(200)
    found = coverage_figures(coverage, mine, confidence)
    assert found.roc is not None
    both = draw_roc((("coverage", found.roc), ("largest probability", found.confidence)), "one")
    assert f"coverage: {found.roc.auroc:.3f}" in both
    assert "largest probability: 0." in both
    alone = draw_roc((("coverage", found.roc), ("largest probability", None)), "two")
    assert "largest probability" not in alone
    assert (f"stroke: {GREY}" in both, f"stroke: {GREY}" in alone) == (True, False)
    split, whole = histogram(found.counts, found.mine, "three"), histogram(found.counts, None, "four")
    assert ("of its classes" in split, "of its classes" in whole) == (True, False)
    assert (f"fill: {BLUE}" in split, f"fill: {BLUE}" in whole) == (True, False)
    assert f"fill: {BAR}" in whole
    assert f"{max(found.counts)}" in whole
    assert "nan" not in split + whole + both
    histogram([0] * BINS, None, "five")
