"""Claim: CE's labels are those of every other solver of the same objective, to 1e-6 where that converges, and faster.

10 sites that know 30 of 100 classes each, as in unify.py. SciPy (L-BFGS-B, Newton-CG) and Hunter's minorise-maximise
steps (all samples at once, 500 and 5,000 of them) take the class-wise sums; choix takes counted choices, so answers
are made counts for it, at least one a class, and ours the same counts as weights and shares. Seconds are those of one
sample, in one process and one thread; differences are of labels, and counted where the solver's gradient is below 1e-6.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import choix
import numpy as np
import torch
from numpy.typing import NDArray
from unify import Primal, Task, log_softmax, make_task, scipy_solve, sums_of

from consilience.server.unify import unify
from harness import options, show

FloatArray = NDArray[np.float64]
COUNTED, CONVERGED, SAME = 200, 1e-6, 1e-6


def membership(task: Task) -> FloatArray:
    """Return (N, L) ones where a site knows a class."""
    known = np.zeros((len(task.class_sets), task.num_classes))
    for site, columns in enumerate(task.class_sets):
        known[site, columns] = 1.0
    return known


def minorise_maximise(task: Task, target: FloatArray, sweeps: int) -> tuple[float, FloatArray, float]:
    """Return seconds a sample, labels and the largest gradient left of q_l <- W_l / sum of 1 / q(L_i)."""
    known = membership(task)
    began = time.perf_counter()
    labels = np.full(target.shape, 1.0 / task.num_classes)
    for _ in range(sweeps):
        labels = target / ((1.0 / (labels @ known.T)) @ known)
        labels /= labels.sum(axis=1, keepdims=True)
    seconds = (time.perf_counter() - began) / len(target)
    primal = Primal(task)
    left = max(float(np.abs(primal.value(np.log(q), w)[1]).max()) for q, w in zip(labels, target, strict=True))
    return seconds, labels, left


def counts_of(task: Task, samples: int) -> list[NDArray[np.int64]]:
    """Return (samples, k) counts of choices a site."""
    return [1 + np.rint(COUNTED * np.exp(a[:samples].astype(np.float64))).astype(np.int64) for a in task.answers]


def by_choix(task: Task, counts: list[NDArray[np.int64]], method: str) -> tuple[float, FloatArray, float]:
    """Return seconds a sample, labels and the largest gradient left, of the sites' shares, by a solver of choix."""
    solve: Callable[..., Any] = getattr(choix, method)
    seconds, found, left = 0.0, [], 0.0
    for row in range(len(counts[0])):
        choices = [
            (int(columns[k]), np.delete(columns, k))
            for columns, count in zip(task.class_sets, counts, strict=True)
            for k in range(columns.size)
            for _ in range(count[row, k])
        ]
        began = time.perf_counter()
        u = solve(task.num_classes, choices, max_iter=10_000, tol=1e-10)
        seconds += time.perf_counter() - began
        found.append(np.exp(log_softmax(u)))
        gradient = np.zeros(task.num_classes)
        for columns, count in zip(task.class_sets, counts, strict=True):
            gradient[columns] += count[row].sum() * np.exp(log_softmax(u[columns])) - count[row]
        left = max(left, float(np.abs(gradient).max()) / COUNTED)
    return seconds / len(found), np.array(found), left


def ours(task: Task, samples: int, counts: list[NDArray[np.int64]] | None = None) -> tuple[float, FloatArray]:
    """Return seconds a sample and labels of all of `samples` at once; of counts one by one, for weights differ."""
    began = time.perf_counter()
    if counts is None:
        labels = unify([a[:samples] for a in task.answers], task.class_sets, task.num_classes).probs
        return (time.perf_counter() - began) / samples, labels.astype(np.float64)
    rows = []
    for row in range(samples):
        given = [np.log(c[row] / c[row].sum())[None] for c in counts]
        weights = [int(c[row].sum()) for c in counts]
        rows.append(unify(given, task.class_sets, task.num_classes, weights=weights).probs[0])
    return (time.perf_counter() - began) / samples, np.array(rows, np.float64)


def main() -> None:
    """Measure, print, write."""
    given = options(__doc__)
    torch.set_num_threads(1)
    many, few, fewest = (200, 4, 1) if given.quick else (20_000, 100, 5)
    task = make_task(many)
    target = sums_of(task)
    seconds, labels = ours(task, many)
    rows: list[dict[str, Any]] = [{"solver": "ours", "samples": many, "seconds_each": seconds}]
    runs: list[tuple[str, int, Callable[[], tuple[float, FloatArray, float]]]] = [
        ("SciPy L-BFGS-B", few, partial(scipy_solve, task, target[:few], "L-BFGS-B")),
        ("SciPy Newton-CG", few, partial(scipy_solve, task, target[:few], "Newton-CG")),
        ("MM, 500 steps", few, partial(minorise_maximise, task, target[:few], 500)),
        ("MM, 5,000 steps", few, partial(minorise_maximise, task, target[:few], 5000)),
    ]
    for solver, samples, run in runs:
        each, theirs, left = run()
        rows.append(compared(solver, samples, each, left, theirs, labels[:samples]))
    counts = counts_of(task, fewest)
    each, same = ours(task, fewest, counts)
    rows.append({"solver": "ours, counts", "samples": fewest, "seconds_each": each})
    for method in ("ilsr_top1", "mm_top1"):
        each, theirs, left = by_choix(task, counts, method)
        rows.append(compared(f"choix {method}", fewest, each, left, theirs, same))
    table = [
        (
            row["solver"],
            row["samples"],
            1e6 * row["seconds_each"],
            row["seconds_each"] / seconds,
            row.get("gradient_left", ""),
            row.get("largest_difference", ""),
        )
        for row in rows
    ]
    columns = ("solver", "samples", "microseconds each", "times ours", "gradient left", "largest difference")
    show("CE: 10 sites x 30 of 100 classes, one thread", columns, table, {"samples": many, "rows": rows}, given.json)
    wrong = [r["solver"] for r in rows if r.get("gradient_left", 1) < CONVERGED and r["largest_difference"] > SAME]
    if wrong:
        sys.exit(f"labels differ: {', '.join(wrong)}")


def compared(
    solver: str, samples: int, each: float, left: float, theirs: FloatArray, labels: FloatArray
) -> dict[str, Any]:
    """Return a row of the table."""
    return {
        "solver": solver,
        "samples": samples,
        "seconds_each": each,
        "gradient_left": left,
        "largest_difference": float(np.abs(theirs - labels).max()),
    }


if __name__ == "__main__":
    main()
