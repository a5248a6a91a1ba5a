"""Claim: none. The embedded job under several seeds: every contender, mean and spread, no seed picked.

A seed changes everything that is random: which images are private and which are pool, the networks' initial weights,
the order of training. The test images are the same 1,000.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

from consilience.common.files import read_json
from consilience.common.progress import Reporter
from consilience.deploy.simulation import embedded_job, simulate
from harness import options, show

CONTENDERS = ("naive", "best_site", "hard_vote", "max_confidence", "unified_ensemble")


def main() -> None:
    arguments = options(__doc__)
    job = embedded_job()
    seeds = range(1) if arguments.quick else range(5)
    scores: dict[str, list[float]] = {name: [] for name in (*CONTENDERS, "student", "oracle")}
    seconds = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as name, Reporter() as reporter:
            began = time.perf_counter()
            simulate(job.model_copy(update={"seed": seed}), Path(name) / "run", reporter)
            seconds.append(time.perf_counter() - began)
            report = read_json(Path(name) / "run" / "report.json")
        for contender in (*CONTENDERS, "oracle"):
            scores[contender].append(report["baselines"][contender]["accuracy"])
        scores["student"].append(report["student"]["accuracy"])
    rows = []
    for contender, values in scores.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        each = " ".join(f"{value:.1%}" for value in values)
        rows.append((contender.replace("_", " "), f"{statistics.mean(values):.1%} ± {spread:.1%}", each))
    figures = {"scores": scores, "seconds": seconds, "seeds": list(seeds)}
    took = f"{min(seconds):.0f} to {max(seconds):.0f} s a run"
    show(f"The embedded job, {len(seeds)} seeds, {took}", ("", "accuracy", "per seed"), rows, figures, arguments.json)


if __name__ == "__main__":
    main()
