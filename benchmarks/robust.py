"""Claim: with `unify.robust`, one liar among five sites costs its student at most a point (three owners a class).

Five sites with six of ten classes each, three owners a class, train and answer honestly once. Then the answers of one
site, or of two, are replaced before they are unified: `random`, all their mass on a class drawn anew for every sample;
`flipped`, every class in the place of the next; `constant`, always the first class; `pair`, two classes swapped and all
else honest; `colluding`, two sites flipped alike. The pool, the student, its seed and the order of its batches are the
same with every attack. A second table has the mean accuracy of unified labels on the pool, by its true labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from images import add_data, difference, folders_of, spread
from numpy.typing import NDArray
from small_sites import Scenario

from consilience.common.encoding import encode
from consilience.common.pool import Pool, PoolImages
from consilience.common.progress import Reporter
from consilience.common.protocol import Answer, Question
from consilience.common.settings import Ask, JobSettings, Judge, NpzData, Unify
from consilience.server.answers import AnswerStore
from consilience.server.answers_about import About
from consilience.server.contract import RunContract
from consilience.server.labelling import unify_pool
from consilience.server.learning import ByLoss, StudentModel, learn, soft_label_loss
from consilience.server.stores import stores_about
from harness import options, show
from jobs import by_seed, do_job, students

CLASSES = tuple(tuple(c for c in range(10) if (c // 2 - site) % 5 in (0, 1, 2)) for site in range(5))
"""Site i knows three of five pairs of classes, so that each class has three owners."""
SCENARIO = Scenario("fashion_mnist", CLASSES, 900, epochs=10, test=5_000)
QUICK = Scenario("embedded", CLASSES, 120, epochs=1, pool=300, test=200)
ATTACKS = ("none", "random", "flipped", "constant", "pair", "colluding")
LIARS = (2, 3)
SURE = 0.98
"""Probability that a liar gives to its lie."""


def lie(rows: NDArray[np.float32], attack: str, random: np.random.Generator) -> NDArray[np.float32]:
    """Return what a liar says in place of the log-probabilities (n, k)."""
    n, k = rows.shape
    if attack == "flipped" or attack == "colluding":
        return np.roll(rows, 1, axis=1)
    if attack == "pair":
        return rows[:, [1, 0, *range(2, k)]]
    told = random.integers(0, k, n) if attack == "random" else np.zeros(n, np.int64)
    out = np.full((n, k), np.log((1 - SURE) / (k - 1)), np.float32)
    out[np.arange(n), told] = np.log(SURE)
    return out


def replaced(stores: Sequence[AnswerStore], folder: Path, attack: str, seed: int) -> list[AnswerStore]:
    """Return the stores with those of the liars replaced by others in `folder`."""
    found = list(stores)
    liars = {"none": (), "colluding": LIARS}.get(attack, LIARS[:1])
    for i in liars:
        held = stores[i].about
        about = held.model_copy(update={"encoding": "f32", "site": held.site})
        rows = lie(stores[i].read(0, held.size), attack, np.random.default_rng(seed))
        store = AnswerStore(folder / held.site, About.model_validate(about.model_dump()))
        if not store.complete:
            asked = Question(
                job="lie",
                pool=held.pool,
                start=0,
                stop=held.size,
                encoding="f32",
                teacher=held.teacher,
                policy=held.policy,
            )
            store.append(Answer(asked, encode(rows, "f32"), 0.0))
        found[i] = store
    return found


def measure(scenario: Scenario, seed: int, home: Path, folders: Sequence[Path]) -> dict[str, Any]:
    """Return the figures of one seed."""
    paths, student = scenario.train(seed, home, folders), scenario.student
    job = JobSettings(
        name="robust",
        seed=seed,
        pool=home / "pool",
        ask=Ask(encoding="f16"),
        student=student,
        judge=Judge(test=NpzData(kind="npz", path=home / "test.npz")),
    )
    do_job(job, home / "run", paths)
    pool, contract = Pool.open(home / "pool"), RunContract.load(home / "run" / "contract.json")
    stores, _ = stores_about(home / "run", job, contract.sites, pool)
    space = contract.space
    with np.load(home / "test.npz") as held:
        names = [str(name) for name in held["names"]]
        number = np.array([space.names.index(name) for name in names])
        images, truth = held["x"], number[held["y"]]
    pooled = number[np.load(home / "pool-labels.npy")]
    found: dict[str, Any] = {}
    for attack in ATTACKS:
        told = replaced(stores, home / "lies" / attack, attack, seed)
        for robust in (False, True):
            name = f"{attack}, {'robust' if robust else 'plain'}"
            folder = home / name.replace(", ", "-")
            with Reporter(quiet=True) as reporter:
                settings = Unify(robust=robust)
                labels, about = unify_pool(folder, space, told, contract.sites, settings, reporter)
                lesson = ByLoss(soft_label_loss(labels, 1.0, about.key), student, seed)
                learn(folder / "student", PoolImages(pool), space, lesson, student, seed, reporter, "student")
            right = StudentModel(folder / "student").log_probs(images).argmax(axis=1) == truth
            found[name] = {
                "student": float(right.mean()),
                "labels": float((labels.argmax(axis=1) == pooled).mean()),
                "trust": None if about.trust is None else about.trust.model_dump(mode="json"),
            }
    return found


def main() -> None:
    """Measure what is not measured yet, and show everything."""
    arguments = options(__doc__, add_data)
    scenario = QUICK if arguments.quick else SCENARIO
    found = by_seed(arguments, {"robust": partial(measure, scenario, folders=folders_of(arguments))}, students)[
        "robust"
    ]
    rows = []
    for attack in ATTACKS:
        plain, robust = ([f[f"{attack}, {kind}"] for f in found] for kind in ("plain", "robust"))
        honest = [f["none, plain"]["student"] for f in found]
        rows.append(
            (
                attack,
                spread([f["student"] for f in plain]),
                spread([f["student"] for f in robust]),
                difference([f["student"] - h for f, h in zip(robust, honest, strict=True)]),
                spread([f["labels"] for f in plain]),
                spread([f["labels"] for f in robust]),
            )
        )
    columns = ("attack", "student, plain", "student, robust", "less honest, plain", "labels, plain", "labels, robust")
    title = "Students of five sites, one or two of which lie, %, mean ± standard deviation over seeds"
    show(title, columns, rows, {"claim": __doc__, "seeds": found}, arguments.json)


if __name__ == "__main__":
    main()
