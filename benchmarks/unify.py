"""Claim: CE unifies at least 1.5 million samples a minute on two cores, and 100 times as fast as SciPy does one by one.

10 sites that know 30 random classes of 100 each; 20,000 samples; noisy but consistent teachers (q = softmax of
Normal(0, 2.5^2), each site answers with q on its classes plus noise on the logits). Time runs from float32 answers in
memory to float32 labels in memory. SciPy minimises the same objective with its analytic gradient, to a gradient of
1e-8, on some of the samples. Every method of `consilience.server.unify` is timed alongside; so is CE with
coverage from all sites, and from every other one: the truth's mass on a site's classes, with the same noise on its
logit.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits

from consilience.server.unify import METHODS, UnifiedLabels, unify, unify_sums
from harness import options, show

TOLERANCE = 1e-8
SLOW = ("mf-p", "mf-lv")

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Task:
    """Answers (n, k) and coverage (n,) of every site, its class set, and L."""

    answers: list[NDArray[np.float32]]
    coverage: list[NDArray[np.float32]]
    class_sets: list[NDArray[np.int64]]
    num_classes: int


def log_softmax(logits: FloatArray) -> FloatArray:
    """Return log-probabilities over the last axis."""
    shifted: FloatArray = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def make_task(samples: int, sites: int = 10, known: int = 30, classes: int = 100, noise: float = 0.5) -> Task:
    """Draw class sets until every class is known to some site, then truth and answers."""
    random = np.random.default_rng(0)
    while True:
        sets = [random.choice(classes, known, replace=False) for _ in range(sites)]
        if np.unique(np.concatenate(sets)).size == classes:
            break
    truth = random.normal(0.0, 2.5, (samples, classes))
    logits = [truth[:, columns] + noise * random.normal(size=(samples, known)) for columns in sets]
    masses = [np.exp(log_softmax(truth))[:, columns].sum(axis=1) for columns in sets]
    odds = [np.log(mass / (1.0 - mass)) + noise * random.normal(size=samples) for mass in masses]
    return Task(
        [log_softmax(values).astype(np.float32) for values in logits],
        [(1.0 / (1.0 + np.exp(-values))).astype(np.float32) for values in odds],
        sets,
        classes,
    )


def sums_of(task: Task) -> FloatArray:
    """Return the class-wise sums (n, L) that a secure aggregation would give."""
    sums = np.zeros((task.answers[0].shape[0], task.num_classes))
    for answers, columns in zip(task.answers, task.class_sets, strict=True):
        sums[:, columns] += np.exp(log_softmax(answers.astype(np.float64)))
    return sums


class Primal:
    """The CE objective of one sample as a function of L logits, as one would write it for SciPy."""

    def __init__(self, task: Task) -> None:
        sizes = [columns.size for columns in task.class_sets]
        self.columns = np.concatenate(task.class_sets)
        self.starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        self.site = np.repeat(np.arange(len(sizes)), sizes)
        self.classes = task.num_classes

    def _forward(self, u: FloatArray) -> tuple[FloatArray, FloatArray]:
        values = u[self.columns]
        top = np.maximum.reduceat(values, self.starts)
        e = np.exp(values - top[self.site])
        total = np.add.reduceat(e, self.starts)
        return e / total[self.site], top + np.log(total)

    def value(self, u: FloatArray, target: FloatArray) -> tuple[float, FloatArray]:
        """Return the objective and its gradient."""
        probs, levels = self._forward(u)
        sums = np.bincount(self.columns, probs, self.classes)
        return float(levels.sum() - target @ u), np.asarray(sums - target, np.float64)

    def hessian_product(self, u: FloatArray, direction: FloatArray, _: FloatArray) -> FloatArray:
        """Return the Hessian times a direction."""
        probs, _levels = self._forward(u)
        along = direction[self.columns]
        mean = np.add.reduceat(probs * along, self.starts)
        return np.asarray(np.bincount(self.columns, probs * (along - mean[self.site]), self.classes), np.float64)


def scipy_solve(task: Task, target: FloatArray, method: str) -> tuple[float, FloatArray, float]:
    """Return seconds per sample, the labels, and the largest gradient entry that SciPy left."""
    primal = Primal(task)
    scipy: Callable[..., Any] = minimize
    solve = (
        partial(scipy, method="L-BFGS-B", options={"gtol": TOLERANCE, "ftol": 0.0, "maxiter": 5000, "maxfun": 5000})
        if method == "L-BFGS-B"
        else partial(scipy, method=method, hessp=primal.hessian_product, options={"xtol": TOLERANCE})
    )
    began = time.perf_counter()
    with threadpool_limits(1):  # a hundred numbers at a time are no work for two threads
        found = [solve(primal.value, np.zeros(task.num_classes), args=(row,), jac=True).x for row in target]
    seconds = (time.perf_counter() - began) / len(target)
    left = max(float(np.abs(primal.value(u, row)[1]).max()) for u, row in zip(found, target, strict=True))
    return seconds, np.exp(log_softmax(np.array(found))), left


def measure(name: str, run: Callable[[], UnifiedLabels], repeats: int) -> dict[str, Any]:
    """Time a unification several times."""
    labels, times = run(), []
    for _ in range(repeats):
        began = time.perf_counter()
        labels = run()
        times.append(time.perf_counter() - began)
    return {
        "method": name,
        "best_seconds": min(times),
        "median_seconds": statistics.median(times),
        "slowest_seconds": max(times),
        "samples_per_minute": 60.0 * len(labels.probs) / statistics.median(times),
        "mean_iterations": float(labels.iterations.mean()),
        "converged": float(labels.converged.mean()),
        "largest_residual": float(labels.residual.max()),
    }


def main() -> None:
    """Measure, print, write."""
    given = options(__doc__)
    samples, repeats, singles = (300, 2, 5) if given.quick else (20_000, 9, 150)
    task = make_task(samples)
    sums = sums_of(task)
    runs: dict[str, Callable[[], UnifiedLabels]] = {
        method: partial(unify, task.answers, task.class_sets, task.num_classes, method=method) for method in METHODS
    }
    half = [values if site % 2 else None for site, values in enumerate(task.coverage)]
    for name, coverage in (("ce, coverage", task.coverage), ("ce, coverage of half", half)):
        runs[name] = partial(unify, task.answers, task.class_sets, task.num_classes, coverage=coverage)
    runs["ce from sums"] = partial(unify_sums, sums, task.class_sets, task.num_classes)
    measured = [measure(name, run, 2 if name in SLOW else repeats) for name, run in runs.items()]
    show(
        f"10 sites x 30 of 100 classes, {samples:,} samples, {torch.get_num_threads()} threads",
        ["method", "best s", "median s", "slowest s", "samples/min", "Newton steps", "converged", "residual"],
        [list(row.values()) for row in measured],
        {},
        None,
    )
    ours = unify([a[:singles] for a in task.answers], task.class_sets, task.num_classes).probs
    median = next(row["median_seconds"] for row in measured if row["method"] == "ce")
    compared = []
    for method in ("L-BFGS-B", "Newton-CG"):
        each, theirs, left = scipy_solve(task, sums[:singles], method)
        compared.append(
            {
                "method": f"SciPy {method}",
                "samples": singles,
                "seconds_each": each,
                "times_ce": each * samples / median,
                "gradient_left": left,
                "largest_difference": float(np.abs(theirs - ours).max()),
            }
        )
    show(
        "CE, sample by sample",
        ["method", "samples", "s each", "times ce's median", "gradient left", "largest difference"],
        [list(row.values()) for row in compared],
        {"samples": samples, "threads": torch.get_num_threads(), "unify": measured, "scipy": compared},
        given.json,
    )


if __name__ == "__main__":
    main()
