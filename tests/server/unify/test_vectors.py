"""Reference vectors: three problems small enough to check by hand, for every method and rule."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from consilience.server.unify import Across, Method, unify

Sets = list[list[int]]
Probs = list[list[float]]

CONNECTED: tuple[Sets, Probs] = ([[0, 1, 2], [2, 3, 4], [1, 3]], [[0.7, 0.2, 0.1], [0.5, 0.3, 0.2], [0.6, 0.4]])
DISJOINT: tuple[Sets, Probs] = ([[0, 1], [2, 3, 4]], [[0.9, 0.1], [0.6, 0.3, 0.1]])
COMPLETE: tuple[Sets, Probs] = ([[0, 1, 2], [0, 1, 2]], [[0.8, 0.15, 0.05], [0.3, 0.6, 0.1]])

SD_DISJOINT = [0.45, 0.05, 0.30, 0.15, 0.05]
CENTRED_DISJOINT = [0.419636, 0.046626, 0.320242, 0.160121, 0.053374]
BY_SIZE_DISJOINT = [0.36, 0.04, 0.36, 0.18, 0.06]
MEAN_COMPLETE = [0.55, 0.375, 0.075]
CE_CONNECTED = [0.606910, 0.144008, 0.116096, 0.083169, 0.049816]
MF_P_CONNECTED = [0.603250, 0.134144, 0.126652, 0.083812, 0.052143]


def labels(problem: tuple[Sets, Probs], method: Method, **options: Any) -> NDArray[np.float32]:
    sets, probs = problem
    found = unify([np.log([row]) for row in probs], sets, method=method, **options)
    assert found.converged.all()
    return found.probs[0]


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("sd", [0.233333, 0.266667, 0.200000, 0.233333, 0.066667]),
        ("ce", CE_CONNECTED),
        ("mf-p", MF_P_CONNECTED),
        ("mf-lf", [0.618947, 0.154806, 0.101007, 0.079086, 0.046154]),
    ],
)
def test_connected(method: Method, expected: list[float]) -> None:
    np.testing.assert_allclose(labels(CONNECTED, method), expected, atol=1e-6)


def test_connected_with_regularisation() -> None:
    found = labels(CONNECTED, "mf-lf", regularisation=0.01)
    np.testing.assert_allclose(found, [0.612457, 0.156294, 0.102608, 0.080883, 0.047759], atol=1e-6)


def test_objectives_of_the_connected_problem() -> None:
    sets, probs = CONNECTED
    q = labels(CONNECTED, "ce").astype(np.float64)
    cross_entropy = -sum(
        p * np.log(q[column] / q[s].sum())
        for s, row in zip(sets, probs, strict=True)
        for column, p in zip(s, row, strict=True)
    )
    assert cross_entropy == pytest.approx(2.517871, abs=1e-6)
    u = labels(CONNECTED, "mf-p").astype(np.float64)
    v = [np.array(row) @ u[s] / (u[s] @ u[s]) for s, row in zip(sets, probs, strict=True)]
    np.testing.assert_allclose(v, [1.160382, 3.835636, 4.556985], atol=2e-6)
    left = sum(((np.array(row) - u[s] * x) ** 2).sum() for s, row, x in zip(sets, probs, v, strict=True))
    assert left == pytest.approx(0.005289, abs=1e-6)


@pytest.mark.parametrize(
    ("method", "across", "expected"),
    [
        ("sd", "centred", SD_DISJOINT),
        ("sd", "equal", SD_DISJOINT),
        ("ce", "centred", CENTRED_DISJOINT),
        ("ce", "equal", SD_DISJOINT),
        ("ce", "proportional", BY_SIZE_DISJOINT),
        ("mf-p", "equal", SD_DISJOINT),
        ("mf-p", "centred", CENTRED_DISJOINT),
        ("mf-lf", "centred", CENTRED_DISJOINT),
        ("mf-lf", "proportional", BY_SIZE_DISJOINT),
    ],
)
def test_disjoint(method: Method, across: Across, expected: list[float]) -> None:
    np.testing.assert_allclose(labels(DISJOINT, method, across=across), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("sd", MEAN_COMPLETE),
        ("ce", MEAN_COMPLETE),
        ("mf-p", [0.587391, 0.341348, 0.071261]),
        ("mf-lf", [0.569246, 0.348591, 0.082164]),
    ],
)
def test_complete(method: Method, expected: list[float]) -> None:
    np.testing.assert_allclose(labels(COMPLETE, method), expected, atol=1e-6)


def test_regularisation_shrinks_the_geometric_mean() -> None:
    _, probs = COMPLETE
    mean = np.log(probs).mean(axis=0)
    u = 2 / (2 + 0.5) * (mean - mean.mean())
    np.testing.assert_allclose(labels(COMPLETE, "mf-lf", regularisation=0.5), np.exp(u) / np.exp(u).sum(), atol=1e-6)


@pytest.mark.parametrize(("regularisation", "tolerance"), [(1e-6, 2e-3), (1e-4, 0.1)])
def test_variable_scale_finds_sharpness(regularisation: float, tolerance: float) -> None:
    u = np.random.default_rng(3).normal(0, 2, 8)
    sets = [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7]]
    logits = [slope * u[s][None] for slope, s in zip((0.5, 1.0, 2.0), sets, strict=True)]
    found = unify(logits, sets, method="mf-lv", regularisation=regularisation)
    expected = u - np.log(np.exp(u).sum())
    assert found.converged.all()
    np.testing.assert_allclose(np.log(found.probs[0]), expected, atol=tolerance)
    fixed = unify(logits, sets, method="mf-lf")
    assert np.abs(np.log(fixed.probs[0]) - expected).max() > 0.5
