"""Claim: sites that answer on groups of classes make the student of fine sites better.

Three fine sites know single classes and have 600 private images each: `specialists` know four tops, three kinds of
shoes, and the three classes that are left, and share none; `overlapping` ones know five or six of the ten classes
each. Two more sites have 1,800 images of all ten classes, for such labels are cheap (`small` ones 600), but label them
by groups: `upper` for the tops, `shoes`, and the three classes as they are. Per seed the same pool, student and order
of batches, from: the fine sites alone; the coarse ones beside them; the same with the coarse sites' images labelled
finely; and the pool's true labels. `labels` is the accuracy of unified labels on the pool, `estimated` the student's
accuracy as reports tell it without labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from images import add_data, difference, folders_of, save, spread
from small_sites import Scenario

from consilience.common.data import open_data
from consilience.common.settings import Ask, JobSettings, Judge, Labels, NpzData, SiteSettings
from consilience.common.settings_file import dump_settings, load_settings
from consilience.deploy.partition_groups import coarsened
from harness import options, show
from jobs import by_seed, do_job, students, train_quietly

GROUPS = {"upper": (0, 2, 4, 6), "shoes": (5, 7, 9)}
ALL = tuple(range(10))
FINE = {
    "specialists": ((0, 2, 4, 6), (5, 7, 9), (1, 3, 8)),
    "overlapping": ((0, 1, 2, 3, 4, 6), (3, 5, 7, 8, 9), (0, 2, 4, 5, 6, 8)),
}
"""What fine sites know; the coarse ones come after them."""
SCENARIOS = {
    name if coarse > 600 else f"{name}, small": Scenario(
        "fashion_mnist", (*FINE[name], ALL, ALL), (600, 600, 600, coarse, coarse), epochs=10, test=5_000
    )
    for name, coarse in (("specialists", 1_800), ("overlapping", 1_800), ("overlapping", 600))
}
QUICK = {"specialists": Scenario("embedded", (*FINE["specialists"], ALL, ALL), 120, epochs=1, pool=300, test=200)}
ALONE, BESIDE, LABELLED, TRUE = "fine sites alone", "coarse sites beside", "these with fine labels", "true labels"


def coarse_twin(path: Path) -> Path:
    """Train a site with the images of the one at `path`, labelled by groups; returns its file."""
    settings = load_settings(path, SiteSettings)
    assert settings.data is not None
    name = f"{settings.name}-coarse"
    folder = path.parent.with_name(name)
    data = coarsened(open_data(settings.data), GROUPS)
    held = save(folder / "private.npz", (data.read(), data.need_labels(name)), list(data.class_names))
    twin = settings.model_copy(update={"name": name, "data": held, "state": folder / "state", "key": folder / "key"})
    dump_settings(twin, folder / "site.yaml")
    train_quietly([folder / "site.yaml"])
    return folder / "site.yaml"


def measure(scenario: Scenario, seed: int, home: Path, folders: Sequence[Path]) -> dict[str, Any]:
    """Return the figures of one seed."""
    paths = scenario.train(seed, home, folders)
    fine = paths[:3]
    twins = [coarse_twin(path) for path in paths[3:]]
    with np.load(home / "test.npz") as held:
        names = [str(name) for name in held["names"]]
    truth = np.load(home / "pool-labels.npy")
    found: dict[str, Any] = {}
    for name, sites in ((ALONE, fine), (BESIDE, fine + twins), (LABELLED, paths)):
        groups = (
            {group: tuple(names[c] for c in classes) for group, classes in GROUPS.items()} if name == BESIDE else {}
        )
        job = JobSettings(
            name="groups",
            seed=seed,
            pool=home / "pool",
            labels=Labels(groups=groups),
            ask=Ask(coverage=False),
            student=scenario.student,
            judge=Judge(
                test=NpzData(kind="npz", path=home / "test.npz"),
                pool_labels=home / "pool-labels.npy" if name == LABELLED else None,
            ),
        )
        run = home / name.replace(" ", "-")
        report = do_job(job, run, sites)
        order = [report["labels"]["names"].index(each) for each in names]
        right = np.load(run / "labels" / "q.npy").argmax(axis=1) == np.asarray(order)[truth]
        estimated = report["quality"]["accuracy"]
        found[name] = {
            "student": report["student"]["accuracy"],
            "estimated": None if estimated is None else estimated["value"],
            "interval": None if estimated is None else [estimated["low"], estimated["high"]],
            "labels": float(right.mean()),
            "sites": {site["name"]: site["teacher_accuracy"] for site in report["sites"]},
            "converged": report["unify"]["converged"],
            "seconds": report["unify"]["seconds"],
        }
        if name == LABELLED:
            found[TRUE] = {"student": report["baselines"]["oracle"]["accuracy"], "labels": 1.0}
    return found


def main() -> None:
    """Measure what is not measured yet, and show everything."""
    arguments = options(__doc__, add_data)
    scenarios = QUICK if arguments.quick else SCENARIOS
    folders = folders_of(arguments)
    measures = {name: partial(measure, scenario, folders=folders) for name, scenario in scenarios.items()}
    found = by_seed(arguments, measures, students)
    rows = [
        (
            name,
            who,
            spread([f[who]["student"] for f in figures]),
            "" if who == ALONE else difference([f[who]["student"] - f[ALONE]["student"] for f in figures]),
            spread([f[who].get("estimated") for f in figures]),
            spread([f[who]["labels"] for f in figures]),
        )
        for name, figures in found.items()
        for who in (ALONE, BESIDE, LABELLED, TRUE)
    ]
    columns = ("fine sites", "student of", "student", "more than fine sites alone", "estimated", "labels")
    title = "Students of fine and coarse sites, accuracy in %, mean ± standard deviation over seeds"
    show(title, columns, rows, {"claim": __doc__, "scenarios": found}, arguments.json)


if __name__ == "__main__":
    main()
