"""Claim: where a part of the pool is asked about, choosing it in rounds is compared with drawing it at random.

Five sites with six of ten classes each, three owners a class, train once a seed. Then one job asks about the whole
pool, and for each budget one job each draws its samples at random and chooses them by uncertainty, by disagreement and
by k-centre, in four rounds; all students have the same settings and seed, and the first round of every choice is drawn
by that seed. All jobs of a seed ask the same sites: answers are kept by them, and are the same whoever asks. A part is
no better than random beyond chance where the interval of `less random`, over seeds, holds 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

from images import add_data, difference, folders_of, spread
from small_sites import Scenario

from consilience.common.settings import Ask, Choose, JobSettings, Judge, NpzData
from harness import options, show
from jobs import by_seed, do_job, students

CLASSES = tuple(tuple(c for c in range(10) if (c // 2 - site) % 5 in (0, 1, 2)) for site in range(5))
"""Site i knows three of five pairs of classes, so that each class has three owners."""
SCENARIO = Scenario("fashion_mnist", CLASSES, 900, epochs=10, pool=12_000, test=5_000)
QUICK = Scenario("embedded", CLASSES, 120, epochs=1, pool=300, test=200)
ROUNDS = 4
BUDGETS, QUICK_BUDGETS = (600, 1_500, 3_000, 6_000), (60, 150)


def jobs_of(budgets: Sequence[int]) -> dict[str, Ask]:
    """Return how each job asks, by name."""
    jobs = {"whole": Ask()}
    for budget in budgets:
        for choose in get_args(Choose):
            rounds = None if choose == "random" else ROUNDS
            jobs[f"{budget} {choose}"] = Ask(samples=budget, choose=choose, rounds=rounds)
    return jobs


def measure(
    scenario: Scenario, budgets: Sequence[int], seed: int, home: Path, folders: Sequence[Path]
) -> dict[str, Any]:
    """Return what each job of one seed came to, by name."""
    paths = scenario.train(seed, home, folders)
    found = {}
    for name, asking in jobs_of(budgets).items():
        job = JobSettings(
            name="choosing",
            seed=seed,
            pool=home / "pool",
            ask=asking,
            student=scenario.student,
            judge=Judge(test=NpzData(kind="npz", path=home / "test.npz")),
        )
        report = do_job(job, home / name.replace(" ", "-"), paths)
        found[name] = {
            "student": report["student"]["accuracy"],
            "bytes": sum(site["bytes"] for site in report["sites"]),
            "samples": report["pool"]["size"],
            "seconds": report["timing"]["ask"],
        }
    return found


def main() -> None:
    """Measure what is not measured yet, and show everything."""
    arguments = options(__doc__, add_data)
    scenario, budgets = (QUICK, QUICK_BUDGETS) if arguments.quick else (SCENARIO, BUDGETS)
    measures = {"choosing": partial(measure, scenario, budgets, folders=folders_of(arguments))}
    found = by_seed(arguments, measures, students)["choosing"]
    rows = []
    for name in jobs_of(budgets):
        budget, _, choose = name.partition(" ")
        told = [f[name]["student"] for f in found]
        random = [f[f"{budget} random"]["student"] for f in found] if choose else told
        rows.append(
            (
                "all" if budget == "whole" else budget,
                choose or "-",
                spread(told),
                difference([a - b for a, b in zip(told, random, strict=True)]) if choose not in ("", "random") else "-",
                difference([a - f["whole"]["student"] for a, f in zip(told, found, strict=True)]) if choose else "-",
                f"{found[0][name]['bytes'] / found[0]['whole']['bytes']:.3f}",
            )
        )
    columns = ("samples", "chosen by", "student", "less random", "less whole", "bytes of the whole's")
    title = "Students of a part of the pool, %, mean ± standard deviation over seeds"
    show(title, columns, rows, {"claim": __doc__, "seeds": found}, arguments.json)


if __name__ == "__main__":
    main()
