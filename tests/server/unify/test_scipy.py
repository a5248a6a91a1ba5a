"""SciPy on the same objectives, written out in all their unknowns: 200 random connected problems per method."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import choix
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import least_squares, minimize

from consilience.server.unify import unify

FloatArray = NDArray[np.float64]
Draw = Callable[..., Any]
SAMPLES = 4
SEEDS = range(50)


def softmax(logits: FloatArray) -> FloatArray:
    e = np.exp(logits - logits.max())
    return e / e.sum()


def cross_entropy(problem: Any, row: int) -> FloatArray:
    """The minimiser of sum_i w_i CE(p_i, softmax of u over L_i), by SciPy's exact trust region."""
    probs = [p[row] for p in problem.probs]

    def value(u: FloatArray) -> tuple[float, FloatArray]:
        total, gradient = 0.0, np.zeros_like(u)
        for s, p, w in zip(problem.class_sets, probs, problem.weights, strict=True):
            q = softmax(u[s])
            total -= w * p @ np.log(q)
            gradient[s] += w * (q - p)
        return total, gradient

    def hessian(u: FloatArray) -> FloatArray:
        out = np.full((u.size, u.size), 1.0 / u.size)
        for s, w in zip(problem.class_sets, problem.weights, strict=True):
            q = softmax(u[s])
            out[np.ix_(s, s)] += w * (np.diag(q) - np.outer(q, q))
        return out

    u = np.zeros(problem.num_classes)
    u = minimize(value, u, jac=True, hess=hessian, method="trust-exact", options={"gtol": 1e-9}).x
    for _ in range(3):  # SciPy stops where values stop falling; the gradient is good for a few steps more
        u = u - np.linalg.solve(hessian(u), value(u)[1])
    return softmax(u)


def test_ce(draw: Draw) -> None:
    for seed in SEEDS:
        problem = draw(seed, SAMPLES)
        found = unify(problem.logits, problem.class_sets, weights=problem.weights)
        assert found.converged.all()
        for row in range(SAMPLES):
            np.testing.assert_allclose(found.probs[row], cross_entropy(problem, row), atol=1e-6, err_msg=str(seed))


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_mf_lf(draw: Draw, ridge: float) -> None:
    for seed in SEEDS:
        problem = draw(seed, SAMPLES)
        found = unify(problem.logits, problem.class_sets, method="mf-lf", weights=problem.weights, regularisation=ridge)
        classes, sites = problem.num_classes, len(problem.class_sets)
        rows = []
        for i, (s, w) in enumerate(zip(problem.class_sets, problem.weights, strict=True)):
            for column in s:
                rows.append(np.sqrt(w) * (np.eye(classes + sites)[column] + np.eye(classes + sites)[classes + i]))
        rows += [np.sqrt(ridge) * row for row in np.eye(classes, classes + sites)]
        matrix = np.array(rows)
        for row in range(SAMPLES):
            scaled = [np.sqrt(w) * z[row] for z, w in zip(problem.logits, problem.weights, strict=True)]
            given = np.concatenate([*scaled, np.zeros(classes)])
            u = np.asarray(np.linalg.lstsq(matrix, given, rcond=1e-12)[0][:classes], np.float64)
            np.testing.assert_allclose(found.probs[row], softmax(u), atol=1e-6, err_msg=str(seed))


class Factorisation:
    """min sum_i w_i ||z_i - u v_i - c_i||^2 + ridge (||u||^2 + ||v||^2), v >= 0, for scipy.optimize.least_squares.

    Without offsets, c = 0 and u >= 0.
    """

    def __init__(self, problem: Any, data: list[FloatArray], ridge: float, offsets: bool) -> None:
        self.sites, self.classes, self.ridge, self.offsets = len(data), problem.num_classes, ridge, offsets
        self.site = np.repeat(np.arange(self.sites), [z.size for z in data])
        self.column = np.concatenate(problem.class_sets)
        self.z = np.concatenate(data)
        self.root = np.sqrt(problem.weights[self.site])
        free, bound = np.full(self.classes, -np.inf), np.zeros(self.classes)
        self.lower = np.concatenate(
            [free if offsets else bound, np.zeros(self.sites), np.full(self.sites if offsets else 0, -np.inf)]
        )

    def split(self, x: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        u, v, c = x[: self.classes], x[self.classes : self.classes + self.sites], x[self.classes + self.sites :]
        return u, v, c if self.offsets else np.zeros(self.sites)

    def residuals(self, x: FloatArray) -> FloatArray:
        u, v, c = self.split(x)
        fit = self.root * (self.z - u[self.column] * v[self.site] - c[self.site])
        return np.concatenate([fit, np.sqrt(self.ridge) * u, np.sqrt(self.ridge) * v])

    def jacobian(self, x: FloatArray) -> FloatArray:
        u, v, _ = self.split(x)
        entries, both = self.z.size, self.classes + self.sites
        out = np.zeros((entries + both, x.size))
        index = np.arange(entries)
        out[index, self.column] = -self.root * v[self.site]
        out[index, self.classes + self.site] = -self.root * u[self.column]
        if self.offsets:
            out[index, both + self.site] = -self.root
        out[entries + np.arange(both), np.arange(both)] = np.sqrt(self.ridge)
        return out

    def solve(self, u: FloatArray, v: FloatArray, c: FloatArray) -> tuple[float, FloatArray, FloatArray]:
        start = np.concatenate([u, v, c if self.offsets else c[:0]])
        found = least_squares(
            self.residuals,
            np.maximum(start, self.lower + 1e-12),
            self.jacobian,
            bounds=(self.lower, np.inf),
            xtol=1e-14,
            ftol=1e-14,
            gtol=1e-13,
            x_scale="jac",
            max_nfev=400,
        )
        u, v, _ = self.split(found.x)
        return 2 * float(found.cost), u, v


def check_not_beaten(
    fit: Factorisation,
    ours: FloatArray,
    start: tuple[FloatArray, FloatArray, FloatArray],
    label: Callable[..., Any],
    seed: int,
) -> None:
    """SciPy from our labels must stay there, and from random starts find nothing lower."""
    value, u, v = fit.solve(*start)
    np.testing.assert_allclose(label(u, v), ours, atol=1e-4, err_msg=f"seed {seed}")
    random = np.random.default_rng(seed)
    size = np.sqrt((fit.z**2).mean())
    sign = random.normal(size=fit.classes) if fit.offsets else random.uniform(0.1, 1, fit.classes)
    other, u, v = fit.solve(size * sign, random.uniform(0.2, 2, fit.sites), np.zeros(fit.sites))
    scale = float((fit.z**2).sum())
    assert other >= value - 1e-7 * scale, f"seed {seed}: {other} < {value}"
    if other <= value + 1e-11 * scale:
        np.testing.assert_allclose(label(u, v), ours, atol=1e-4, err_msg=f"seed {seed}")


def test_mf_p(draw: Draw) -> None:
    for problem, row, seed, ours in _each(draw, "mf-p"):
        probs = [p[row] for p in problem.probs]
        fit = Factorisation(problem, probs, 0.0, offsets=False)
        v = np.array([p @ ours[s] / (ours[s] @ ours[s]) for p, s in zip(probs, problem.class_sets, strict=True)])
        check_not_beaten(fit, ours, (ours, v, 0 * v), lambda u, _: u / u.sum(), seed)


def test_mf_lv(draw: Draw) -> None:
    for problem, row, seed, ours in _each(draw, "mf-lv"):
        data = [z[row] - z[row].mean() for z in problem.logits]
        ridge = 1e-4 * float(np.mean(np.concatenate(data) ** 2))
        fit = Factorisation(problem, data, ridge, offsets=True)
        u = np.log(ours) - np.log(ours).mean()
        centred = [u[s] - u[s].mean() for s in problem.class_sets]
        v = np.array([max(0.0, z @ x / (x @ x)) for z, x in zip(data, centred, strict=True)])
        c = -v * np.array([u[s].mean() for s in problem.class_sets])
        gauge = (u @ u / (v @ v)) ** 0.25

        def label(u: FloatArray, v: FloatArray) -> FloatArray:
            return softmax(u * np.exp(np.log(v[v > 1e-6 * v.max()]).mean()))

        check_not_beaten(fit, ours, (u / gauge, v * gauge, c), label, seed)


def _each(draw: Draw, method: Any) -> Iterator[tuple[Any, int, int, FloatArray]]:
    for seed in SEEDS:
        problem = draw(seed, SAMPLES)
        found = unify(problem.logits, problem.class_sets, method=method, weights=problem.weights)
        assert found.converged.all(), f"seed {seed}"
        for row in range(SAMPLES):
            yield problem, row, SAMPLES * seed + row, found.probs[row].astype(np.float64)


def test_ce_is_luce_choice() -> None:
    """Choices among subsets, counted: choix's maximum likelihood is CE with the counts as weights."""
    random = np.random.default_rng(0)
    sets = [np.array([0, 1, 2, 3]), np.array([2, 3, 4]), np.array([0, 4, 5]), np.array([1, 5])]
    counts = [random.integers(1, 30, s.size) for s in sets]
    choices = [
        (int(s[k]), tuple(int(x) for x in np.delete(s, k)))
        for s, n in zip(sets, counts, strict=True)
        for k in range(s.size)
        for _ in range(n[k])
    ]
    expected = softmax(choix.ilsr_top1(6, choices, max_iter=1000, tol=1e-12))
    found = unify([np.log(n / n.sum())[None] for n in counts], sets, weights=[int(n.sum()) for n in counts])
    np.testing.assert_allclose(found.probs[0], expected, atol=1e-6)
