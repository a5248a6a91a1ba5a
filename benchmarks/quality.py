"""Claim: the accuracy of a student is estimated without a label to 3 points on average, and the interval holds it.

Jobs of three to five sites over several data sets, overlaps and amounts of private data. Each is done once a seed, with
small networks. Then the student's accuracy is estimated from the pool: by the mean confidence of the student and of the
unified labels in the student's class, by the labels sharpened to what sites' answers claim, and to what sites tell of
their held-out images. Errors are to the accuracy on labelled test images, which nothing else sees; an estimate that is
refused has none. `by class` is the mean error of the recall of single classes, by held-out images.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from images import add_data, folders_of, spread
from small_sites import Scenario

from consilience.common.pool import Pool
from consilience.common.settings import Ask, JobSettings, Judge, NpzData
from consilience.server.answered import usable
from consilience.server.contract import RunContract
from consilience.server.learning import StudentModel
from consilience.server.publishing_quality import pool_quality
from consilience.server.stores import stores_about
from harness import options, show
from jobs import by_seed, do_job

FIVE = tuple(tuple(c for c in range(10) if (c // 2 - site) % 5 in (0, 1, 2)) for site in range(5))
THREE = ((0, 1, 2, 3, 4), (3, 4, 5, 6, 7), (6, 7, 8, 9, 0))
ALL = (tuple(range(10)),) * 3


SCENARIOS = {
    "fashion, five sites": Scenario("fashion_mnist", FIVE, 900),
    "fashion, three sites": Scenario("fashion_mnist", THREE, 1_500),
    "fashion, all classes": Scenario("fashion_mnist", ALL, 600),
    "fashion, little data": Scenario("fashion_mnist", FIVE, 240),
    "digits, five sites": Scenario("mnist", FIVE, 600),
    "CIFAR, three sites": Scenario("cifar10", THREE, 2_500),
}
QUICK = {"embedded": Scenario("embedded", ALL, 120, 1, 300, 200)}
WAYS = ("student's confidence", "labels' confidence", "claimed", "held-out")


def measure(scenario: Scenario, seed: int, home: Path, folders: Sequence[Path]) -> dict[str, Any]:
    """Return the figures of one scenario under one seed."""
    paths = scenario.train(seed, home, folders)
    job = JobSettings(
        name="quality",
        seed=seed,
        pool=home / "pool",
        ask=Ask(coverage=False),
        student=scenario.student,
        judge=Judge(test=NpzData(kind="npz", path=home / "test.npz")),
    )
    run = home / "run"
    report = do_job(job, run, paths)
    contract, pool = RunContract.load(run / "contract.json"), Pool.open(home / "pool")
    stores, _ = stores_about(run, job, contract.sites, pool)
    labels, student = np.load(run / "labels" / "q.npy", mmap_mode="r"), StudentModel(run / "student")
    silent = [card.model_copy(update={"holdout_accuracy": None}) for card in contract.sites]
    scores = student.log_probs(pool.take(np.arange(len(pool))))
    confidence = float(np.exp(scores.max(axis=1)).mean())
    found: dict[str, Any] = {"accuracy": report["student"]["accuracy"], "student's confidence": confidence}
    for way, cards in (("claimed", silent), ("held-out", contract.sites)):
        about = (pool, contract.space, stores, cards, labels, student, usable(stores, contract.space), seed)
        told = pool_quality(*about, apart=0, joined=False)
        found[way] = told.model_dump(mode="json")
    found["labels' confidence"] = float(labels[np.arange(len(pool)), scores.argmax(axis=1)].mean())
    classes = {name: c["recall"]["value"] for name, c in found["held-out"]["classes"].items() if c["recall"]}
    found["by class"] = [
        abs(c["recall"] - classes[c["name"]])
        for c in report["student"]["per_class"]
        if c["recall"] is not None and c["name"] in classes
    ]
    return found


def value(figures: dict[str, Any], way: str) -> float | None:
    """Return what a way estimates; None where it says that nothing can be known."""
    told = figures[way]
    if isinstance(told, dict):
        told = None if told["accuracy"] is None else told["accuracy"]["value"]
    return None if told is None else float(told)


def errors(figures: Sequence[dict[str, Any]], way: str) -> list[float]:
    """Return the absolute errors of a way, where it estimates anything."""
    return [abs(told - f["accuracy"]) for f in figures if (told := value(f, way)) is not None]


def mean(values: Sequence[float]) -> str:
    """Return the mean in points."""
    return f"{100 * statistics.mean(values):.1f}" if values else "-"


def main() -> None:
    """Measure what is not measured yet, and show everything."""
    arguments = options(__doc__, add_data)
    scenarios = QUICK if arguments.quick else SCENARIOS
    folders = folders_of(arguments)
    measures = {name: partial(measure, scenario, folders=folders) for name, scenario in scenarios.items()}
    found = by_seed(arguments, measures, lambda f: {"accuracy": f["accuracy"], **{way: value(f, way) for way in WAYS}})
    every = {**found, "all": [f for figures in found.values() for f in figures]}
    rows = []
    for name, figures in every.items():
        told = [(f["accuracy"], f[way]["accuracy"]) for way in WAYS[2:] for f in figures if f[way]["accuracy"]]
        inside = [interval["low"] <= accuracy <= interval["high"] for accuracy, interval in told]
        rows.append(
            (
                name,
                spread([f["accuracy"] for f in figures]),
                *(mean(errors(figures, way)) for way in WAYS),
                f"{sum(inside)} of {len(inside)}",
                mean([e for f in figures for e in f["by class"]]),
            )
        )
    columns = ("job", "accuracy, %", *WAYS, "in interval", "by class")
    title = "Mean absolute error of estimates of accuracy without labels, in points"
    show(title, columns, rows, {"claim": __doc__, "jobs": found}, arguments.json)


if __name__ == "__main__":
    main()
