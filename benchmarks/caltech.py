"""Question: does one student match teachers on other backbones, on the classes that each of them knows?

Caltech-101 without its background and without Faces_easy, the same photographs as Faces: 100 classes, of which a seed
gives 50 to each of two sites. The sites' teachers are frozen EfficientNet-Lite0 and Lite1 with linear heads, learned
from private images, hosted as callables whose `penultimate` features take part. The student is a frozen Lite2
(`--student lite0`: the first teacher's backbone) with a head that learns from 40 % of the training images (`--pool`:
another share, the rest being the sites'), unlabelled: from soft labels alone (KD) or in a common space of features too
(CFL; Luo et al., IJCAI 2019), each with and without the sites' coverage; `oracle` is the same student that learns from
the pool's true labels. A student's accuracy on a site's test images is told over all 100 classes, as it is used, and
over that site's 50, which is what its teacher has to choose from.

Heads' strength is chosen by private images held out, on which sites also calibrate and learn coverage. The student's
peak learning rate is the one, of two, under which it agrees best with the unified labels of a tenth of the pool that
it did not learn from, under the first seed, each method for itself; the oracle has KD's. Test labels decide nothing.
Images are not augmented, so that what frozen backbones give for each is computed once and remembered
(benchmarks/lite.py). A seed decides classes, which images are private, held out or the pool, initial weights and order.
Differences are paired by seed, with 95 % intervals by Student's t.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lite
import numpy as np
from images import Images, Labels, add_data, difference, folders_of, read, save, spread, write_pools
from sklearn.linear_model import LogisticRegression

from consilience.client.teacher import calibrate_teacher
from consilience.common.files import read_json, write_json
from consilience.common.pool import Pool
from consilience.common.progress import Reporter
from consilience.common.settings import (
    Ask,
    CallableTeacher,
    Coverage,
    Features,
    Fit,
    JobSettings,
    Judge,
    Limits,
    NpzData,
    Policy,
    Preprocessing,
    Reduction,
    SiteSettings,
    Student,
)
from consilience.common.settings_file import dump_settings
from consilience.deploy.simulation import train_site
from consilience.server.learning import StudentModel
from harness import options, show
from jobs import do_job

LEFT_OUT = ("Faces_easy", "BACKGROUND_Google")
BACKBONES = ("lite0", "lite1")
"""Of the sites' teachers."""
METHODS = ("KD", "CFL", "KD, coverage", "CFL, coverage")
RATES = (0.02, 0.1)
"""Peak learning rates that each method has the choice of."""
POOL, HELD_OUT, CHOSEN_ON = 40, 0.2, 0.1
"""Percent of the training images; shares: of private images, of the pool that the rate is chosen by."""
WAYS = ("over_all", "over_own")
"""Classes that a student has the choice of: all, or a site's alone."""
STRENGTHS = (0.001, 0.01, 0.1)
"""C of a teacher's logistic regression."""
AS_LITE = Preprocessing(mean=(127 / 255,), std=(128 / 255,))
Part = tuple[Images, Labels]


def slug(text: str) -> str:
    """Return a name for a job and a folder."""
    return text.lower().replace(",", "").replace(" ", "-").replace(".", "-")


def kept(split: str, arguments: argparse.Namespace) -> tuple[Part, list[str]]:
    """Return a split's images of the classes that take part, labels from 0, and the classes' names."""
    images, labels, names = read("caltech101", split, folders_of(arguments))
    classes = [at for at, name in enumerate(names) if name not in LEFT_OUT]
    wanted = np.isin(labels, classes)
    if arguments.quick:
        classes = classes[:10]
        wanted = np.zeros(len(labels), np.bool_)
        wanted[[at for c in classes for at in np.flatnonzero(labels == c)[:20]]] = True
    return (images[wanted], np.searchsorted(classes, labels[wanted])), [names[at] for at in classes]


def shared_out(labels: Labels, random: np.random.Generator, share: float) -> tuple[Labels, Labels]:
    """Return ids (n,) of `share` of each class, rounded, and of the rest, both in random order."""
    first = np.zeros(len(labels), np.bool_)
    for label in np.unique(labels):
        ids = random.permutation(np.flatnonzero(labels == label))
        first[ids[: round(share * len(ids))]] = True
    return random.permutation(np.flatnonzero(first)), random.permutation(np.flatnonzero(~first))


def head(backbone: str, learned: Part, held_out: Part, cache: Path) -> lite.Teacher:
    """Return a teacher: logistic regression on the backbone's features, as strong as does best on images held out."""
    x, others = (lite.remember(backbone, part[0], cache).astype(np.float64) for part in (learned, held_out))
    mean, deviation = x.mean(axis=0), x.std(axis=0) + 1e-6
    fitted = [LogisticRegression(C=c, max_iter=300).fit((x - mean) / deviation, learned[1]) for c in STRENGTHS]
    best = max(fitted, key=lambda model: model.score((others - mean) / deviation, held_out[1]))
    weights = best.coef_.T / deviation[:, None]
    return lite.Teacher(backbone, weights.astype(np.float32), (best.intercept_ - mean @ weights).astype(np.float32))


def prepare(seed: int, home: Path, work: Path, arguments: argparse.Namespace) -> list[Path]:
    """Make pools, test set and sites, whose teachers `lite` then has by name; returns the sites' files."""
    random = np.random.default_rng(seed)
    (images, labels), names = kept("train", arguments)
    pool, private = shared_out(labels, random, arguments.pool / 100)
    write_pools(home, (images[pool], labels[pool]), kept("test", arguments)[0], names)
    cut = round(len(pool) * (1 - CHOSEN_ON))
    for name, ids in (("learned", pool[:cut]), ("chosen-on", pool[cut:])):
        write_pools(home / name, (images[ids], labels[ids]), (images[:1], labels[:1]), names)
    paths = []
    for at, classes in enumerate(np.split(random.permutation(len(names)), len(BACKBONES))):
        own = private[np.isin(labels[private], classes)]
        classes = np.sort(classes)
        numbered = np.searchsorted(classes, labels[own])
        held_out, learned = shared_out(numbered, random, HELD_OUT)
        parts = [(images[own[ids]], numbered[ids]) for ids in (learned, held_out)]
        called = f"site_{at + 1}_of_{seed}"
        setattr(lite, called, head(BACKBONES[at], parts[0], parts[1], work / "features"))
        own_names = [names[c] for c in classes]
        path = home / f"site-{at + 1}" / "site.yaml"
        settings = SiteSettings(
            name=f"site-{at + 1}",
            data=save(path.parent / "held-out.npz", parts[1], own_names),
            teacher=CallableTeacher(
                kind="callable", callable=f"lite:{called}", classes=tuple(own_names), preprocessing=AS_LITE
            ),
            policy=Policy(
                features=Features(taps={"penultimate": Reduction()}, bytes=2**40),
                coverage="f16",
                limits=Limits(per_job=None, per_month=None, lifetime=None),
            ),
            coverage=Coverage(family="outputs"),
            pools=tuple(home / name for name in ("pool", "test-pool", "learned/pool", "chosen-on/pool")),
            state=path.parent / "state",
            seed=1000 * seed + at,
        )
        dump_settings(settings, path)
        calibrate_teacher(settings)
        with Reporter() as reporter:
            train_site(path, reporter)
        paths.append(path)
    return paths


def job(method: str, rate: float, seed: int, pool: Path, arguments: argparse.Namespace, **more: Any) -> JobSettings:
    """Return a method's job."""
    return JobSettings(
        name=slug(method),
        seed=seed,
        pool=pool,
        ask=Ask(coverage=method.endswith("coverage")),
        student=Student(
            architecture=f"python:lite:{arguments.student}",
            learning="common-feature" if method.startswith("CFL") else "soft-labels",
            preprocessing=AS_LITE,
            fit=Fit(epochs=2 if arguments.quick else 30, learning_rate=rate, augment=False, precision="f32"),
        ),
        **more,
    )


def agreement(method: str, rate: float, home: Path, paths: list[Path], arguments: argparse.Namespace) -> float:
    """Return how often a student agrees with unified labels, with or without coverage, of images it has not seen."""
    asked = job(
        slug("asked" + method.removeprefix("KD").removeprefix("CFL")), 0.01, 0, home / "chosen-on" / "pool", arguments
    )
    asked = asked.model_copy(
        update={"ask": Ask(coverage=method.endswith("coverage")), "student": Student(architecture="cnn3", fit=QUICKLY)}
    )
    do_job(asked, home / "choosing" / asked.name, paths)
    unified = np.load(home / "choosing" / asked.name / "labels" / "q.npy", mmap_mode="r").argmax(axis=1)
    run = home / "choosing" / slug(f"{method} {rate}")
    do_job(job(method, rate, 0, home / "learned" / "pool", arguments), run, paths)
    pool = Pool.open(home / "chosen-on" / "pool")
    found = StudentModel(run / "student").log_probs(pool.read(0, len(pool))).argmax(axis=1)
    return float((found == unified).mean())


QUICKLY = Fit(epochs=1, precision="f32", augment=False)


def scored(folder: Path, test: Part, names: list[str], sites: Sequence[list[str]]) -> dict[str, Any]:
    """Return a student's accuracy on all test images, and on each site's over all classes and over the site's."""
    model = StudentModel(folder)
    order = [model.labels.index(name) for name in names]
    log_probs, labels = model.log_probs(test[0])[:, order], test[1]
    right = log_probs.argmax(axis=1) == labels
    told: dict[str, Any] = {"all": float(right.mean()), "sites": []}
    told["by_class"] = float(np.mean([right[labels == c].mean() for c in np.unique(labels)]))
    for own in sites:
        classes = np.array([names.index(name) for name in own])
        mine = np.isin(labels, classes)
        among = classes[log_probs[mine][:, classes].argmax(axis=1)] == labels[mine]
        told["sites"].append({"over_all": float(right[mine].mean()), "over_own": float(among.mean())})
    return told


def measure(
    seed: int, home: Path, paths: list[Path], rates: dict[str, float], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Return the figures of one seed."""
    test, names = kept("test", arguments)
    teachers = [getattr(lite, f"site_{at + 1}_of_{seed}") for at in range(len(paths))]
    sites = [read_site(path) for path in paths]
    told: dict[str, Any] = {"rates": rates, "students": {}, "ensembles": {}, "teachers": []}
    for teacher, own in zip(teachers, sites, strict=True):
        classes = np.array([names.index(name) for name in own])
        mine = np.isin(test[1], classes)
        scores = np.concatenate([teacher(lite.normalised(x).numpy()) for x in np.array_split(test[0][mine], 20)])
        told["teachers"].append(float((classes[scores.argmax(axis=1)] == test[1][mine]).mean()))
    for method in METHODS:
        judge = Judge(
            test=NpzData(kind="npz", path=home / "test.npz"),
            test_pool=home / "test-pool",
            pool_labels=home / "pool-labels.npy" if method == "KD" else None,
        )
        run = home / "runs" / slug(f"{arguments.student} {method}")
        report = do_job(job(method, rates[method], seed, home / "pool", arguments, judge=judge), run, paths)
        told["students"][method] = scored(run / "student", test, names, sites)
        kinds = ("naive", "unified_ensemble")
        told["ensembles"][method] = {kind: report["baselines"][kind]["accuracy"] for kind in kinds}
        told["coverage_auroc"] = [site["coverage_auroc"] for site in report["sites"]]
        if method == "KD":
            told["students"]["oracle"] = scored(run / "oracle", test, names, sites)
        shutil.rmtree(run / "answers", ignore_errors=True)
    return told


def read_site(path: Path) -> list[str]:
    """Return the classes of a site."""
    with np.load(path.parent / "held-out.npz") as held:
        return [str(name) for name in held["names"]]


def students(figures: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return the rows of accuracies."""
    rows: list[tuple[str, ...]] = []
    for at, backbone in enumerate(BACKBONES):
        blank = ("",) * (2 * at + 1)
        rows.append((f"teacher {at + 1} ({backbone})", *blank, spread([f["teachers"][at] for f in figures])))
    for method in (*METHODS, "oracle"):
        each = [f["students"][method] for f in figures]
        cells = [spread([e["sites"][at][key] for e in each]) for at in range(2) for key in WAYS]
        gains = ""
        if method.startswith("CFL"):
            plain = method.replace("CFL", "KD")
            gains = difference([f["students"][method]["all"] - f["students"][plain]["all"] for f in figures])
        rows.append((method, *cells, spread([e["all"] for e in each]), gains))
    for called, method, kind in (
        ("naive ensemble", "KD", "naive"),
        ("unified labels", "KD", "unified_ensemble"),
        ("unified labels, coverage", "KD, coverage", "unified_ensemble"),
    ):
        rows.append((called, "", "", "", "", spread([f["ensembles"][method][kind] for f in figures])))
    return [(*row, *("",) * (7 - len(row))) for row in rows]


def against_teachers(figures: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return the rows of students less teachers, paired by seed."""
    return [
        (
            method,
            *(
                difference([f["students"][method]["sites"][at][key] - f["teachers"][at] for f in figures])
                for at in range(2)
                for key in WAYS
            ),
        )
        for method in (*METHODS, "oracle")
    ]


def arguments_too(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's own options."""
    add_data(parser)
    parser.add_argument("--student", choices=("lite2", "lite0"), default="lite2", help="the student's backbone")
    parser.add_argument("--pool", type=int, default=POOL, metavar="PERCENT", help="of the training images")


def main() -> None:
    """Measure what is not measured yet, and show everything."""
    arguments = options(__doc__, arguments_too)
    figures: list[dict[str, Any]] = []
    scenario = arguments.student if arguments.pool == POOL else f"{arguments.student}-pool-{arguments.pool}"
    with tempfile.TemporaryDirectory() as temporary:
        work = (arguments.work or Path(temporary)).resolve()
        images = [kept(split, arguments)[0][0] for split in ("train", "test")]
        for backbone in {*BACKBONES, arguments.student}:
            for part in images:
                lite.remember(backbone, part, work / "features")
        for seed in range(1 if arguments.quick else arguments.seeds):
            done, chosen = (work / f"{scenario}-{name}.json" for name in (seed, "rates"))
            if not done.exists():
                home = work / f"{scenario}-{seed}"
                paths = prepare(seed, home, work, arguments)
                if not chosen.exists():
                    of = {m: {str(r): agreement(m, r, home, paths, arguments) for r in RATES} for m in METHODS}
                    write_json(chosen, of)
                agreed = read_json(chosen)
                rates = {m: float(max(held, key=lambda rate, held=held: held[rate])) for m, held in agreed.items()}
                write_json(done, measure(seed, home, paths, rates, arguments))
                shutil.rmtree(home)
            figures.append(read_json(done))
            print(f"seed {seed}: {figures[-1]['teachers']} {figures[-1]['students']}", file=sys.stderr)
    places = ("site 1's, of 100", "of 50", "site 2's, of 100", "of 50")
    title = f"student on {arguments.student}, {arguments.pool} % as pool: {len(figures)} seeds, mean ± deviation"
    show(title, ("accuracy, %", *places, "all", "CFL over KD (95 %)"), students(figures), {}, None)
    told = {"student": arguments.student, "pool": arguments.pool, "seeds": figures}
    title = "students less teachers on the teachers' classes, points (95 %)"
    show(title, ("", *places), against_teachers(figures), told, arguments.json)


if __name__ == "__main__":
    main()
