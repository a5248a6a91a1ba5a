"""Maps are what closed forms, SciPy and brute force say, and are kept only where they help on samples not fitted on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pydantic import ValidationError
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from consilience.client.calibration import (
    LEAST_LOG_PROB,
    SHARPEST,
    SOFTEST,
    CalibrationMap,
    best_dirichlet,
    best_temperature,
    fit_calibration,
    scores_of,
)
from consilience.server.judge import calibration as judged_calibration


def drawn(logits: np.ndarray, seed: int = 0) -> np.ndarray:
    """Labels that are as likely as the softmax of the logits says."""
    sums = np.exp(log_softmax(logits, axis=1)).cumsum(axis=1)
    return np.asarray((sums > np.random.default_rng(seed).random(len(logits))[:, None]).argmax(axis=1), np.int64)


def normal(n: int, k: int, seed: int = 0, spread: float = 2.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, spread, (n, k))


def nll(rows: np.ndarray, labels: np.ndarray) -> float:
    return float(-log_softmax(rows, axis=1)[np.arange(len(rows)), labels].mean())


@pytest.mark.parametrize("scale", [0.25, 1, 3, 10])
def test_logits_scaled_by_a_factor_give_it_as_temperature(scale: float) -> None:
    logits = normal(8000, 5, spread=1.5)
    found = best_temperature(log_softmax(scale * logits, axis=1), drawn(logits))
    assert found == pytest.approx(scale, rel=0.06)


@given(st.integers(0, 10_000), st.integers(2, 6), st.floats(0.1, 30), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_the_temperature_is_the_one_that_a_search_finds(seed: int, k: int, scale: float, noise: float) -> None:
    logits = normal(40, k, seed)
    labels = drawn(logits, seed)
    random = np.random.default_rng(seed)
    labels = np.where(random.random(40) < noise, random.integers(0, k, 40), labels)
    rows = log_softmax(scale * logits, axis=1)
    found = best_temperature(rows, labels)
    assert SHARPEST <= found <= SOFTEST
    other = minimize_scalar(lambda s: nll(s * rows, labels), bounds=(1 / SOFTEST, 1 / SHARPEST), method="bounded")
    assert nll(rows / found, labels) <= other.fun + 1e-9
    for near in (found * 0.999, found * 1.001):
        assert not SHARPEST <= near <= SOFTEST or nll(rows / found, labels) <= nll(rows / near, labels) + 1e-13


def test_temperatures_stay_within_their_bounds() -> None:
    right = log_softmax(normal(50, 3), axis=1)
    assert best_temperature(right, right.argmax(axis=1)) == SHARPEST
    assert best_temperature(right, right.argmin(axis=1)) == SOFTEST
    assert best_temperature(np.full((50, 3), -np.log(3)), np.zeros(50, np.int64)) in (SHARPEST, SOFTEST)


def test_dirichlet_finds_the_matrix_and_the_intercept_that_made_the_labels() -> None:
    random = np.random.default_rng(3)
    rows = log_softmax(normal(20_000, 4), axis=1)
    matrix = np.diag([0.5, 1.0, 0.8, 1.2]) + random.normal(0, 0.15, (4, 4))
    intercept = np.array([1.0, -1.0, 0.5, -0.5])
    found = best_dirichlet(rows, drawn(rows @ matrix.T + intercept))
    # What all rows of A or all of b have in common changes no probability.
    wanted, held = (m - m.mean(axis=0) for m in (matrix, np.array(found.matrix)))
    np.testing.assert_allclose(held, wanted, atol=0.08)
    gaps = np.array(found.intercept) - intercept
    np.testing.assert_allclose(gaps - gaps.mean(), 0, atol=0.2)
    truth = log_softmax(rows @ matrix.T + intercept, axis=1)
    assert np.abs(np.exp(found.apply(rows)) - np.exp(truth)).mean() < 0.01


def test_dirichlet_is_at_the_minimum_of_what_it_says_it_minimises() -> None:
    rows, k, n = log_softmax(normal(150, 3), axis=1), 3, 150
    labels = drawn(rows * [0.4, 1, 2])
    found = best_dirichlet(rows, labels)
    start = np.eye(k) / best_temperature(rows, labels)
    precision = np.where(np.eye(k) > 0, 1.0, 9 * k)

    def value(matrix: np.ndarray, intercept: np.ndarray) -> float:
        penalty = (precision * (matrix - start) ** 2).sum() + (intercept**2).sum()
        return nll(rows @ matrix.T + intercept, labels) + penalty / (2 * n)

    matrix, intercept = np.array(found.matrix), np.array(found.intercept)
    best, random = value(matrix, intercept), np.random.default_rng(0)
    for size in (1e-1, 1e-2, 1e-3):
        for _ in range(30):
            assert best <= value(matrix + size * random.normal(size=(k, k)), intercept + size * random.normal(size=k))


def test_one_of_the_classes_too_sure_is_mended_by_dirichlet_and_not_by_a_temperature() -> None:
    logits = normal(3000, 3)
    labels = drawn(logits)
    rows = log_softmax(logits + np.array([2, 0, -1]), axis=1)
    one, whole = (fit_calibration(rows, labels, method, 0) for method in ("temperature", "dirichlet"))
    assert (one.method, whole.method, whole.note) == ("temperature", "dirichlet", "")
    assert one.after is not None
    assert whole.after is not None
    assert whole.after.nll < one.after.nll - 0.1
    assert whole.after.nll == pytest.approx(nll(logits, labels), abs=0.01)


def test_where_dirichlet_does_no_better_it_is_a_temperature() -> None:
    logits = normal(400, 10)
    labels = drawn(logits)
    assert np.bincount(labels).min() >= 20
    found = fit_calibration(log_softmax(3 * logits, axis=1), labels, "dirichlet", 0)
    assert found.method == "temperature"
    assert found.note == "temperature instead of dirichlet, which gives no better likelihood"


@given(
    arrays.arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(2, 5)), elements=st.floats(-200, 0, width=32)),
    st.floats(SHARPEST, SOFTEST),
)
@settings(max_examples=100, deadline=None)
def test_a_temperature_changes_no_order_and_gives_distributions(scores: np.ndarray, temperature: float) -> None:
    rows = log_softmax(scores.astype(np.float64), axis=1)
    out = CalibrationMap(temperature=temperature).apply(rows)
    np.testing.assert_allclose(np.exp(out).sum(axis=1), 1, rtol=1e-12)
    for row, mapped in zip(rows, out, strict=True):
        order = np.argsort(row, kind="stable")
        assert (np.diff(mapped[order]) >= 0).all()
        assert mapped[row.argmax()] == mapped.max()


@pytest.mark.parametrize("whole", [False, True])
def test_a_row_is_mapped_to_the_same_numbers_whatever_it_is_among(whole: bool) -> None:
    matrix = tuple(map(tuple, (np.eye(7) + 0.1 * normal(7, 7)).tolist()))
    held = CalibrationMap(matrix=matrix, intercept=(0.3,) * 7) if whole else CalibrationMap(temperature=1.7)
    rows = log_softmax(normal(300, 7), axis=1).astype(np.float32)
    out = held.apply(rows)
    assert np.array_equal(out, np.concatenate([held.apply(rows[i : i + 1]) for i in range(300)]))
    assert np.array_equal(out[:123], held.apply(rows[:123]))
    if whole:
        expected = log_softmax(rows.astype(np.float64) @ np.array(matrix).T + 0.3, axis=1)
        np.testing.assert_allclose(out, expected, atol=1e-12)


@pytest.mark.parametrize("method", ["temperature", "dirichlet"])
def test_the_smallest_answers_there_are_stay_finite(method: Any) -> None:
    lowest = float(np.finfo(np.float32).min)
    sure = np.where(np.eye(3) > 0, 0.0, lowest)[np.arange(90) % 3].astype(np.float32)
    labels = (np.arange(90) + (np.arange(90) < 30)) % 3
    found = fit_calibration(sure, labels, method, 0)
    assert found.map is not None
    assert np.isfinite(found.map.apply(sure)).all()
    assert found.before is not None
    assert found.before.nll == pytest.approx(-LEAST_LOG_PROB / 3)


@given(st.integers(0, 10_000), st.integers(1, 60), st.integers(2, 40), st.sampled_from([0.3, 1.0, 3.0]))
@settings(max_examples=60, deadline=None)
def test_scores_are_those_of_the_judge_and_of_the_definition(seed: int, n: int, k: int, spread: float) -> None:
    logits = normal(n, k, seed, spread)
    rows, labels = log_softmax(logits, axis=1), drawn(logits / 3, seed)
    found = scores_of(rows, labels)
    assert found.nll == pytest.approx(nll(logits, labels))
    assert found.ece == pytest.approx(judged_calibration(np.exp(rows), labels)[0])


def test_scores_are_measured_on_samples_that_the_fit_did_not_see() -> None:
    """Labels that have nothing to do with the answers of a modest teacher: any map that helps is learned by heart."""
    kept = []
    for seed in range(40):
        rows = log_softmax(normal(25, 4, seed, spread=0.05), axis=1)
        labels = np.random.default_rng(seed + 1000).integers(0, 4, 25)
        found = fit_calibration(rows, labels, "temperature", seed)
        assert found.before is not None
        assert found.after is not None
        assert found.after.nll <= found.before.nll
        seen = nll(rows / best_temperature(rows, labels), labels)
        kept.append(found.method != "identity")
        assert found.method == "identity" or found.after.nll >= seen
    assert np.mean(kept) < 0.4


def test_a_map_that_does_not_help_is_not_kept() -> None:
    logits = normal(400, 4)
    found = fit_calibration(log_softmax(logits, axis=1), drawn(logits, 5), "temperature", 0)
    assert (found.method, found.map, found.samples) == ("identity", None, 400)
    assert found.note == "no temperature map gives a better likelihood"
    assert found.before == found.after
    assert found.before is not None


@pytest.mark.parametrize("method", ["temperature", "dirichlet"])
@pytest.mark.parametrize(
    ("n", "k", "note"),
    [
        (0, 3, "too few held-out samples: 0; 20 are needed"),
        (1, 3, "too few held-out samples: 1; 20 are needed"),
        (19, 3, "too few held-out samples: 19; 20 are needed"),
        (500, 1, "the teacher knows one class only"),
        (0, 1, "the teacher knows one class only"),
    ],
)
def test_too_little_to_fit_on_changes_nothing(method: Any, n: int, k: int, note: str) -> None:
    found = fit_calibration(log_softmax(normal(n, k), axis=1), np.zeros(n, np.int64), method, 0)
    assert (found.method, found.map, found.samples, found.note) == ("identity", None, n, note)
    assert found.before is found.after is None


@pytest.mark.parametrize("method", ["temperature", "dirichlet"])
def test_a_teacher_without_a_mistake_is_left_as_it_is(method: Any) -> None:
    """Sharper is better without end there, and would make the first mistake on the pool a certainty."""
    rows = log_softmax(normal(100, 3), axis=1)
    found = fit_calibration(rows, rows.argmax(axis=1), method, 0)
    assert (found.method, found.map) == ("identity", None)
    assert "too few mistakes" in found.note


def test_one_class_alone_among_the_samples() -> None:
    rows = log_softmax(normal(60, 3), axis=1)
    for method in ("temperature", "dirichlet"):
        found = fit_calibration(rows, np.zeros(60, np.int64), method, 0)  # type: ignore[arg-type]
        assert found.method in ("identity", "temperature")
        assert found.map is None or found.map.temperature is not None


def test_dirichlet_needs_samples_of_every_class_and_not_too_many_classes() -> None:
    logits = normal(200, 3)
    labels = np.where(drawn(logits) == 2, 0, drawn(logits))
    labels[:19] = 2
    rows = log_softmax(5 * logits, axis=1)
    found = fit_calibration(rows, labels, "dirichlet", 0)
    assert found.method == "temperature"
    assert found.note == (
        "temperature instead of dirichlet, which needs 20 held-out samples of every class; of one there are 19"
    )
    assert found.map == fit_calibration(rows, labels, "temperature", 0).map
    many = normal(300, 201)
    found = fit_calibration(log_softmax(3 * many, axis=1), drawn(many), "dirichlet", 0)
    assert "takes 200 classes at most, not 201" in found.note


def test_the_same_seed_gives_the_same_fit() -> None:
    logits = normal(100, 3)
    rows, labels = log_softmax(4 * logits, axis=1).astype(np.float32), drawn(logits)
    assert fit_calibration(rows, labels, "dirichlet", 1) == fit_calibration(rows, labels, "dirichlet", 1)
    first, other = (fit_calibration(rows, labels, "temperature", seed) for seed in (1, 2))
    assert first.map == other.map
    assert first.after != other.after


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": float("nan")},
        {"temperature": 0.0},
        {"temperature": 21.0},
        {"temperature": 1.0, "matrix": [[1.0]], "intercept": [0.0]},
        {"matrix": [[1.0, 0.0]], "intercept": [0.0]},
        {"matrix": [[1.0, 0.0], [0.0, 1.0]], "intercept": [0.0]},
        {"matrix": [[float("inf")]], "intercept": [0.0]},
        {"matrix": [[1.0]], "intercept": []},
    ],
)
def test_what_is_no_map_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        CalibrationMap.model_validate(fields)
