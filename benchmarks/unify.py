"""How fast sites' answers become unified labels, against a SciPy solve sample by sample.

Prints a table; `--json FILE` writes the figures, `--quick` takes a size that a test can afford. Teachers are
noisy but consistent: q = softmax of Normal(0, 2.5^2), and each site answers with q on its classes plus noise on
the logits. Answers are float32 in memory; the time ends with all probabilities in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize

from consilience.server.unify import METHODS, Method, unify, unify_sums

FloatArray = npt.NDArray[np.float64]
TOLERANCE = 1e-8


@dataclass(frozen=True)
class Task:
    """Answers (n, k) per site over random class sets that together cover all classes."""

    answers: list[npt.NDArray[np.float32]]
    class_sets: list[npt.NDArray[np.int64]]
    num_classes: int


def make_task(samples: int, sites: int, known: int, classes: int, noise: float, seed: int) -> Task:
    """Draw class sets until every class is known to some site."""
    random = np.random.default_rng(seed)
    while True:
        sets = [random.choice(classes, known, replace=False) for _ in range(sites)]
        if np.unique(np.concatenate(sets)).size == classes:
            break
    truth = random.normal(0.0, 2.5, (samples, classes))
    answers = [
        log_softmax(truth[:, columns] + noise * random.normal(size=(samples, known))).astype(np.float32)
        for columns in sets
    ]
    return Task(answers, sets, classes)


def log_softmax(logits: FloatArray) -> FloatArray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


class Primal:
    """The CE objective of one sample in the L logits u, as one would write it for SciPy."""

    def __init__(self, task: Task) -> None:
        self.columns = np.concatenate(task.class_sets)
        self.starts = np.concatenate([[0], np.cumsum([s.size for s in task.class_sets])[:-1]])
        self.site = np.repeat(np.arange(len(task.class_sets)), [s.size for s in task.class_sets])
        self.classes = task.num_classes

    def target(self, task: Task, row: int) -> FloatArray:
        logits = [a[row].astype(np.float64) for a in task.answers]
        probs = np.concatenate([np.exp(log_softmax(x)) for x in logits])
        return np.bincount(self.columns, weights=probs, minlength=self.classes)

    def _site_probs(self, u: FloatArray) -> tuple[FloatArray, FloatArray]:
        values = u[self.columns]
        top = np.maximum.reduceat(values, self.starts)
        e = np.exp(values - top[self.site])
        total = np.add.reduceat(e, self.starts)
        return e / total[self.site], top + np.log(total)

    def value(self, u: FloatArray, target: FloatArray) -> tuple[float, FloatArray]:
        probs, levels = self._site_probs(u)
        gradient = np.bincount(self.columns, weights=probs, minlength=self.classes) - target
        return float(levels.sum() - target @ u), gradient

    def hessian_product(self, u: FloatArray, direction: FloatArray, _: FloatArray) -> FloatArray:
        probs, _levels = self._site_probs(u)
        along = direction[self.columns]
        mean = np.add.reduceat(probs * along, self.starts)
        return np.bincount(self.columns, weights=probs * (along - mean[self.site]), minlength=self.classes)


def scipy_solve(task: Task, rows: int, method: str) -> tuple[float, FloatArray, float]:
    """Seconds per sample, the probabilities, and the largest gradient entry that was left."""
    primal = Primal(task)
    targets = [primal.target(task, row) for row in range(rows)]
    options = {
        "L-BFGS-B": {"gtol": TOLERANCE, "ftol": 0.0, "maxiter": 5000, "maxfun": 5000, "maxcor": 30},
        "Newton-CG": {"xtol": 1e-10, "maxiter": 200},
    }[method]
    product = primal.hessian_product if method == "Newton-CG" else None
    out, left = [], 0.0
    start = time.perf_counter()
    for target in targets:
        found = minimize(
            primal.value, np.zeros(task.num_classes), (target,), method, jac=True, hessp=product, options=options
        )
        out.append(found.x)
    seconds = time.perf_counter() - start
    for u, target in zip(out, targets, strict=True):
        left = max(left, float(np.abs(primal.value(u, target)[1]).max()))
    return seconds / rows, np.exp(log_softmax(np.array(out))), left


def measure(task: Task, method: Method | str, repeats: int) -> dict[str, float | str | int]:
    samples = task.answers[0].shape[0]
    if method == "ce from sums":
        sums = np.zeros((samples, task.num_classes))
        for answers, columns in zip(task.answers, task.class_sets, strict=True):
            sums[:, columns] += np.exp(log_softmax(answers.astype(np.float64)))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        if method == "ce from sums":
            labels = unify_sums(sums, task.class_sets, task.num_classes)
        else:
            labels = unify(task.answers, task.class_sets, task.num_classes, method=method)  # type: ignore[arg-type]
        times.append(time.perf_counter() - start)
    median = statistics.median(times)
    return {
        "method": str(method),
        "samples": samples,
        "repeats": repeats,
        "best_seconds": min(times),
        "median_seconds": median,
        "slowest_seconds": max(times),
        "samples_per_minute": 60.0 * samples / median,
        "mean_iterations": float(labels.iterations.mean()),
        "converged": float(labels.converged.mean()),
        "largest_residual": float(labels.residual.max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    samples, repeats, baseline = (500, 2, 10) if arguments.quick else (20_000, 9, 150)
    task = make_task(samples, 10, 30, 100, 0.5, arguments.seed)
    print(f"10 sites x 30 random of 100 classes, {samples} samples, {torch.get_num_threads()} threads")
    print(f"{'method':<14}{'best s':>9}{'median s':>10}{'slowest s':>11}{'samples/min':>14}{'steps':>7}{'conv.':>8}{'residual':>10}")
    rows = []
    for method in (*METHODS, "ce from sums"):
        slow = method in ("mf-p", "mf-lv")
        row = measure(task, method, min(repeats, 3) if slow else repeats)
        rows.append(row)
        print(
            f"{method:<14}{row['best_seconds']:>9.3f}{row['median_seconds']:>10.3f}{row['slowest_seconds']:>11.3f}"
            f"{row['samples_per_minute']:>14,.0f}{row['mean_iterations']:>7.1f}{row['converged']:>8.4f}"
            f"{row['largest_residual']:>10.1e}"
        )
    ours = next(row for row in rows if row["method"] == "ce")
    probs = unify([a[:baseline] for a in task.answers], task.class_sets, task.num_classes).probs
    comparisons = []
    for name in ("L-BFGS-B", "Newton-CG"):
        each, theirs, left = scipy_solve(task, baseline, name)
        ratio = each * samples / float(ours["median_seconds"])
        difference = float(np.abs(theirs - probs).max())
        comparisons.append(
            {
                "method": name,
                "measured_samples": baseline,
                "seconds_per_sample": each,
                "extrapolated_seconds": each * samples,
                "ratio_to_ce": ratio,
                "largest_gradient_left": left,
                "largest_difference": difference,
            }
        )
        print(
            f"SciPy {name} on {baseline} samples: {1e3 * each:.2f} ms each, {each * samples:.0f} s for all: "
            f"{ratio:.0f} x the time of ce; gradient left {left:.0e}, largest difference {difference:.0e}"
        )
    if arguments.json:
        figures = {
            "machine": {"processor": platform.processor() or platform.machine(), "cpus": os.cpu_count(), "torch": torch.__version__},
            "threads": torch.get_num_threads(),
            "seed": arguments.seed,
            "unify": rows,
            "scipy": comparisons,
        }
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
