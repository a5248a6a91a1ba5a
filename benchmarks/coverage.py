"""Claim: sites that know what is not theirs give better labels, above all where no class links them.

Scenarios, each under several seeds: Fashion-MNIST (F: 4,000 private images a site, a pool of 8,000) and CIFAR-10 (C:
6,000 and 15,000) among three sites, whose classes overlap ({0-4}, {3-7}, {6-9, 0}) or not ({0-3}, {4-6}, {7-9});
digits in three styles (`shift`); a pool with 30 % images of no known class (`unknown`); all sites know all classes
(`complete`); F-overlap with students, and the oracle, trained three times as long (`patient`), and with teachers
trained a third as long (`hasty`). In each a student is learned without coverage (`plain`), with it (`coverage`), and,
in the first four, directly from answers and coverage (`direct`). A seed decides which images are private and which are
the pool, initial weights and the order of training; none is picked. What is done is kept in the folder `--work`; a
second call goes on from there.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from baselines import FAMILIES, NAMES, score_by_family, score_pool
from images import Images, Labels, Source, add_data, folders_of, joined, read, save, shuffled, spread, write_pools
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from consilience.common.pool import Pool
from consilience.common.preprocessing import resize
from consilience.common.settings import (
    Ask,
    Coverage,
    CoverageFit,
    Fit,
    JobSettings,
    Judge,
    NpzData,
    Policy,
    SiteSettings,
    Student,
    TrainTeacher,
    Unify,
)
from consilience.common.settings_file import dump_settings, load_settings
from consilience.server.contract import RunContract
from consilience.server.judge import calibration
from consilience.server.learning import StudentModel
from consilience.server.stores import stores_about
from consilience.server.unify.sharpen import EXPONENTS, sharpened
from harness import options, show
from jobs import by_seed, do_job, train_quietly

OVERLAP = ((0, 1, 2, 3, 4), (3, 4, 5, 6, 7), (6, 7, 8, 9, 0))
DISJOINT = ((0, 1, 2, 3), (4, 5, 6), (7, 8, 9))
ALL = (tuple(range(10)),) * 3
VARIANTS = ("plain", "coverage", "direct")
LEARNED = Coverage()
LEVELS = ("share told", "true share", "log-loss")
"""Of a site's coverage over the pool; log-loss in nats."""
STRANGERS = "of no known class"
OTHER = 0.1
"""Prior weight of "no known class" in the scenario that has such images."""


@dataclass(frozen=True)
class Sizes:
    """Images of a scenario, and epochs."""

    private: int
    pool: int
    test: int = 10_000
    teachers: int = 60
    """Epochs of a teacher: with its fewer images it then sees about as many in all as a student does."""
    students: int = 20
    """Epochs of a student, and of the oracle."""
    coverage: Coverage = LEARNED
    mirror: bool = True

    def fit(self, epochs: int) -> Fit:
        """Return how a network is trained for so many epochs."""
        return Fit(epochs=epochs, mirror=self.mirror)


@dataclass(frozen=True)
class Scenario:
    """Where images come from and who knows what."""

    data: str
    classes: tuple[tuple[int, ...], ...]
    sizes: Sizes
    teachers: tuple[str, ...] = ("cnn3", "resnet8", "vgg6")
    student: str = "resnet8"
    variants: tuple[str, ...] = VARIANTS


F, C = Sizes(4_000, 8_000), Sizes(6_000, 15_000)
SCENARIOS = {
    "F-overlap": Scenario("fashion_mnist", OVERLAP, F),
    "F-disjoint": Scenario("fashion_mnist", DISJOINT, F),
    "C-overlap": Scenario("cifar10", OVERLAP, C),
    "C-disjoint": Scenario("cifar10", DISJOINT, C),
    "shift": Scenario("digits", OVERLAP, Sizes(2_000, 6_000, 6_000, mirror=False), variants=VARIANTS[:2]),
    "unknown": Scenario("fashion_mnist+usps", OVERLAP, F, variants=VARIANTS[:2]),
    "complete": Scenario("fashion_mnist", ALL, F, variants=VARIANTS[:2]),
    "patient": Scenario("fashion_mnist", OVERLAP, replace(F, students=60), variants=VARIANTS[:2]),
    "hasty": Scenario("fashion_mnist", OVERLAP, replace(F, teachers=20), variants=VARIANTS[:2]),
}
QUICK = Scenario(
    "embedded",
    DISJOINT,
    Sizes(
        440,
        400,
        200,
        1,
        1,
        Coverage(architecture="cnn3", fit=CoverageFit(epochs=1, pretrain=1, batch_size=64, precision="f32")),
    ),
    ("cnn3@0.5", "resnet8@0.25", "cnn3@0.5"),
    "cnn3@0.5",
    VARIANTS[:2],
)


def styles(split: str, folders: Sequence[Path], random: np.random.Generator) -> list[Source]:
    """Return digits as MNIST, USPS and inverted MNIST have them, 28 x 28."""
    mnist, labels, _ = read("mnist", split, folders)
    half = random.permutation(len(mnist))
    first, second = half[: len(half) // 2], half[len(half) // 2 :]
    usps, theirs, _ = read("usps", split, folders)
    return [
        Source(mnist[first], labels[first], random),
        Source(resize(usps[..., None], (28, 28)), theirs, random),
        Source(255 - mnist[second], labels[second], random),
    ]


def share_out(
    scenario: Scenario, folders: Sequence[Path], random: np.random.Generator
) -> tuple[list[tuple[Images, Labels]], tuple[Images, Labels], tuple[Images, Labels], list[str]]:
    """Return the sites' images, the pool's, the test images, and class names."""
    sizes, every = scenario.sizes, range(10)
    if scenario.data == "digits":
        sources, tests = styles("train", folders, random), styles("test", folders, random)
        sites = [s.take(c, sizes.private) for s, c in zip(sources, scenario.classes, strict=True)]
        pool, test = (
            joined(s.take(every, sizes.pool // 3) for s in sources),
            joined(s.take(every, sizes.test // 3) for s in tests),
        )
        return sites, shuffled(pool, random), test, [str(k) for k in every]
    name, _, strangers = scenario.data.partition("+")
    images, labels, names = read(name, "train", folders)
    source = Source(images, labels, random)
    pool = source.take(every, sizes.pool)
    sites = [source.take(c, sizes.private) for c in scenario.classes]
    images, labels, _ = read(name, "test", folders)
    test = Source(images, labels, random).take(every, sizes.test)
    if strangers:
        others, _, _ = read(strangers, "train", folders)
        count = round(len(pool[0]) * 0.3 / 0.7)
        chosen = random.permutation(len(others))[:count]
        pool = joined([pool, (resize(others[chosen][..., None], pool[0].shape[1:3]), np.full(count, len(names)))])
        names = [*names, STRANGERS]
    return sites, shuffled(pool, random), test, names


def prepare(scenario: Scenario, seed: int, home: Path, folders: Sequence[Path]) -> list[Path]:
    """Make the pool, the test set and the sites' folders; returns the sites' files."""
    random = np.random.default_rng(seed)
    sites, pool, test, names = share_out(scenario, folders, random)
    write_pools(home, pool, test, names)
    fit = scenario.sizes.fit(scenario.sizes.teachers)
    paths = []
    for k, part in enumerate(sites):
        path = home / f"site-{k + 1}" / "site.yaml"
        settings = SiteSettings(
            name=f"site-{k + 1}",
            data=save(path.parent / "private.npz", part, names),
            teacher=TrainTeacher(kind="train", architecture=scenario.teachers[k], fit=fit),
            policy=Policy(holdout_accuracy=True, coverage="f16"),
            coverage=scenario.sizes.coverage,
            pools=(home / "pool", home / "test-pool"),
            state=path.parent / "state",
            seed=1000 * seed + k,
        )
        dump_settings(settings, path)
        paths.append(path)
    return paths


def job(scenario: Scenario, seed: int, home: Path, variant: str, other: float) -> JobSettings:
    """Return the job of one variant; only the one with coverage trains the oracle too."""
    return JobSettings(
        name=variant,
        seed=seed,
        pool=home / "pool",
        ask=Ask(coverage=variant != "plain"),
        unify=Unify(other=other if variant != "plain" else 0.0),
        student=Student(
            architecture=scenario.student,
            learning="direct-ce" if variant == "direct" else "soft-labels",
            fit=scenario.sizes.fit(scenario.sizes.students),
        ),
        judge=Judge(
            test=NpzData(kind="npz", path=home / "test.npz"),
            test_pool=home / "test-pool",
            pool_labels=home / "pool-labels.npy" if variant == "coverage" else None,
        ),
    )


def measure(name: str, scenario: Scenario, seed: int, home: Path, folders: Sequence[Path]) -> dict[str, Any]:
    """Return the figures of one scenario under one seed."""
    home.mkdir(parents=True, exist_ok=True)
    paths = prepare(scenario, seed, home, folders)
    other = OTHER if name == "unknown" else 0.0
    train_quietly(paths)
    reports = {v: do_job(job(scenario, seed, home, v, other), home / "runs" / v, paths) for v in scenario.variants}
    full, truth = reports["coverage"], np.load(home / "pool-labels.npy")
    return {
        "students": {v: report["student"]["accuracy"] for v, report in reports.items()},
        "estimates": {v: (report["quality"] or {}).get("accuracy") for v, report in reports.items()},
        "calibration_errors": {v: report["student"]["calibration_error"] for v, report in reports.items()},
        "unified": {v: (r["baselines"]["unified_ensemble"] or {}).get("accuracy") for v, r in reports.items()},
        "pool_labels": {v: right_on_pool(home / "runs" / v, truth) for v in ("plain", "coverage")},
        "sureness": sureness(home, truth, full["unify"]["exponent"] or 1.0),
        "naive": full["baselines"]["naive"]["accuracy"],
        "best_site": full["baselines"]["best_site"]["accuracy"],
        "oracle": (full["baselines"]["oracle"] or {}).get("accuracy"),
        "coverage_auroc": [site["coverage_auroc"] for site in full["sites"]],
        "offsets": [site["coverage"]["offset"] for site in full["sites"]],
        "levels": levels(home, truth, scenario.classes),
        "baseline_auroc": baselines(scenario, paths, truth, seed),
        "ceiling": ceiling(home, truth),
        "own_classes": [
            {
                "site": site["teacher_accuracy"],
                "student": site["student_accuracy"],
                "student_restricted": site["student_accuracy_restricted"],
                "oracle_restricted": oracle,
            }
            for site, oracle in zip(full["sites"], oracle_on(home, scenario.classes), strict=True)
        ],
    }


def oracle_on(home: Path, classes: Sequence[Sequence[int]]) -> list[float]:
    """Return how often the oracle is right on the test images of each site's classes, with these to choose from."""
    oracle = StudentModel(home / "runs" / "coverage" / "oracle")
    with np.load(home / "test.npz") as test:
        images, truth, names = test["x"], test["y"], list(test["names"])
    rows = np.concatenate([oracle.log_probs(images[at : at + 500]) for at in range(0, len(images), 500)])
    places = [[oracle.labels.index(names[c]) for c in own] for own in classes]
    return [
        float((np.array(own)[rows[mine][:, columns].argmax(axis=1)] == truth[mine]).mean())
        for own, columns in zip(classes, places, strict=True)
        if (mine := np.isin(truth, own)).any()
    ]


def ceiling(home: Path, truth: Labels) -> float:
    """Return how well labels do that a logistic regression learns from the same answers and coverage *and true labels*.

    Cross-validated over the pool. No product can do this; it says how much the answers hold for any way of unifying.
    """
    answers, coverage = told(home)
    given = [np.clip(each[:, None], 1e-3, 1 - 1e-3) for each in coverage if each is not None]
    held = np.concatenate([*(np.maximum(part, -14) for part in answers), *(np.log(c / (1 - c)) for c in given)], axis=1)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    return float(cross_val_score(model, held, truth, cv=3).mean())


def told(home: Path) -> tuple[list[NDArray[np.float32]], list[NDArray[np.float32] | None]]:
    """Return the sites' answers (n, k) on the pool, and their coverage (n,), None of a site that gave none."""
    run, pool = home / "runs" / "coverage", Pool.open(home / "pool")
    sites, settings = RunContract.load(run / "contract.json").sites, load_settings(run / "job.yaml", JobSettings)
    answers, coverage = stores_about(run, settings, sites, pool)
    return (
        [store.read(0, len(pool)) for store in answers],
        [store.read(0, len(pool))[:, 0] if store else None for store in coverage],
    )


def levels(home: Path, truth: Labels, classes: Sequence[Sequence[int]]) -> list[dict[str, float] | None]:
    """Return which share of the pool coverage says is the site's, which share is, and its log-loss, site by site."""
    found: list[dict[str, float] | None] = []
    for given, own in zip(told(home)[1], classes, strict=True):
        mine = np.isin(truth, own)
        if given is None:
            found.append(None)
        else:
            loss = float(log_loss(mine, given.astype(np.float64), labels=[False, True]))
            values = (float(given.mean(dtype=np.float64)), float(mine.mean()), loss)
            found.append(dict(zip(LEVELS, values, strict=True)))
    return found


def right_on_pool(run: Path, truth: Labels) -> float:
    """Return how many of a run's unified labels are right, among the pool's samples of known classes."""
    labels = np.load(run / "labels" / "q.npy", mmap_mode="r")
    known = truth < labels.shape[1]
    return float((labels.argmax(axis=1) == truth)[known].mean())


def sureness(home: Path, truth: Labels, exponent: float) -> dict[str, float]:
    """Return the exponent that labels were made surer by, the best one by the pool's *true labels*, and what it gives.

    Calibration errors are of the labels on the pool's samples of known classes: as the solver made them, and used.
    """
    labels = np.load(home / "runs" / "coverage" / "labels" / "q.npy")
    labels, truth = labels[truth < labels.shape[1]], truth[truth < labels.shape[1]]
    made, n = sharpened(labels, 1 / exponent), np.arange(len(truth))

    def error(probs: NDArray[np.float32]) -> float:
        return calibration(probs.astype(np.float64), truth)[0]

    def surprise(tried: float) -> float:
        return float(-np.log(np.maximum(sharpened(made, tried)[n, truth], 1e-9)).mean())

    best = float(min(EXPONENTS, key=surprise))
    return {"exponent": exponent, "best": best, "error_made": error(made), "error_used": error(labels)}


def baselines(scenario: Scenario, paths: list[Path], truth: Labels, seed: int) -> dict[str, list[float | None]]:
    """Return each baseline's and other family's AUROC of "mine" on the pool, site by site.

    None where all of the pool is, or the site abstains.
    """
    found: dict[str, list[float | None]] = {name: [] for name in (*FAMILIES, *NAMES)}
    for path, classes in zip(paths, scenario.classes, strict=True):
        mine = np.isin(truth, classes)
        scores: dict[str, NDArray[np.float64] | None] = dict(score_pool(path, seed))
        scores |= {family: score_by_family(path, family) for family in FAMILIES}
        for name, scored in scores.items():
            found[name].append(None if mine.all() or scored is None else float(roc_auc_score(mine, scored)))
    return found


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean over sites, None where one is not known."""
    known = [value for value in values if value is not None]
    return statistics.mean(known) if len(known) == len(values) else None


def gap_closed(figures: Sequence[dict[str, Any]]) -> Iterator[float]:
    """Yield the share of the way from the plain student to the oracle that coverage goes, seed by seed."""
    for each in figures:
        plain, covered, oracle = each["students"]["plain"], each["students"]["coverage"], each["oracle"]
        if oracle is not None and oracle > plain:
            yield (covered - plain) / (oracle - plain)


def beaten(figures: Sequence[dict[str, Any]]) -> str:
    """Say at how many sites student and oracle are better on the site's classes, with these to choose from."""
    held = [site for each in figures for site in each["own_classes"]]
    counts = [sum(s[kind] > s["site"] for s in held) for kind in ("student_restricted", "oracle_restricted")]
    return f"{counts[0]}, {counts[1]} of {len(held)}"


def arguments_too(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's own options."""
    add_data(parser)
    parser.add_argument("--only", nargs="*", choices=sorted(SCENARIOS), default=list(SCENARIOS))


def main() -> None:
    """Measure what is not measured yet, and show everything."""
    arguments = options(__doc__, arguments_too)
    scenarios = {"quick": QUICK} if arguments.quick else {name: SCENARIOS[name] for name in arguments.only}
    folders = folders_of(arguments)
    measures = {name: partial(measure, name, scenario, folders=folders) for name, scenario in scenarios.items()}
    found = by_seed(arguments, measures, lambda figures: figures["students"])
    rows = [
        (
            name,
            *(spread([f["students"].get(v) for f in figures]) for v in VARIANTS),
            spread([f["oracle"] for f in figures]),
            spread(list(gap_closed(figures))),
            spread([f["calibration_errors"]["coverage"] for f in figures]),
            spread([f["ceiling"] for f in figures]),
            beaten(figures),
        )
        for name, figures in found.items()
    ]
    columns = ("", *VARIANTS, "oracle", "gap closed", "ECE", "ceiling", "sites beaten, by oracle")
    title = "Students without and with coverage, %, mean ± standard deviation over seeds"
    show(title, columns, rows, {"scenarios": found}, arguments.json)
    ranked = [
        (
            name,
            spread([mean(f["coverage_auroc"]) for f in figures]),
            # figures that were kept before a column was added lack it
            *(spread([mean(f["baseline_auroc"].get(other, [None])) for f in figures]) for other in (*FAMILIES, *NAMES)),
        )
        for name, figures in found.items()
    ]
    columns = ("", "network", *FAMILIES, *NAMES)
    show('AUROC of "mine" over the pool, mean over sites, %', columns, ranked, {}, None)
    sure = [
        (
            name,
            *(
                spread([f["sureness"][kind] for f in figures])
                for kind in ("exponent", "best", "error_made", "error_used")
            ),
        )
        for name, figures in found.items()
    ]
    about_labels = ("", "exponent", "best by true labels", "calibration error before", "after")
    show("How sure labels with coverage are made, %", about_labels, sure, {}, None)
    of_sites = [
        (
            name,
            *(spread([site[kind] for f in figures for site in f.get("levels", []) if site]) for kind in LEVELS),
            *(spread([f.get("pool_labels", {}).get(v) for f in figures]) for v in VARIANTS[:2]),
        )
        for name, figures in found.items()
    ]
    of_level = (f"{kind}, sites and seeds" for kind in LEVELS)
    about_level = ("", *of_level, "labels right, plain", "with coverage")
    show("What coverage says of the pool, and labels of the pool, %", about_level, of_sites, {}, None)


if __name__ == "__main__":
    main()
