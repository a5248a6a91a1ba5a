"""Claim: a student that also learns from the teachers' features is no worse than one that learns from labels alone.

`same`: two ResNet-20 of five CIFAR-10 classes each, one layout: labels alone (KD), layer-wise amalgamation alone, the
joint phase alone by squared error to the concatenated scores, layer-wise amalgamation before that phase, which is the
paper's own method (Shen et al., AAAI 2019), and before one with unified labels. `different`: VGG-6, ResNet-8 and a
MobileNet, whose classes overlap ({0-4}, {3-7}, {6-9, 0}): labels alone, common-feature learning (Luo et al., IJCAI
2019) of vectors, of the last maps, and of vectors with one of its terms left out: without soft targets nothing teaches
the scores, and without MMD it is KD, so that there is no such row. In both the same student learns from the pool's true
labels (`oracle`). All have the same student, pool, schedule and number of epochs; layer-wise
amalgamation and the joint phase share them, half each.

The rate of each method is the one, of two, under which a student agrees best with the unified labels of a tenth of the
pool that it did not learn from, under the first seed: no label of the pool or the test images is seen there. It is the
peak of the joint phase or of the whole, and layers, whose rate is constant, learn by half of it; scores by squared
error take three tenths of the first and a tenth of the other, as in every job. A rate by which a training fails agrees
with nothing. The oracle has KD's rate: by that choice it cannot have one of its own. A seed decides which images are
private and which are the pool, initial weights and the order of training; none is picked. The difference to KD is
paired by seed, with its 95 % interval by Student's t. What is done is kept in the folder `--work`, and a second call
goes on from there.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from images import Images, Labels, Source, add_data, difference, folders_of, read, save, spread, write_pools
from numpy.typing import NDArray

from consilience.common.errors import StudentError
from consilience.common.nets import build
from consilience.common.nets.taps import taps
from consilience.common.pool import Pool
from consilience.common.settings import (
    Ask,
    CommonFeature,
    CommonSpace,
    Features,
    Fit,
    JobSettings,
    Judge,
    LayerWise,
    Limits,
    NpzData,
    Policy,
    Reduction,
    SiteSettings,
    Student,
    TrainTeacher,
)
from consilience.common.settings_file import dump_settings
from consilience.server.learning import StudentModel
from harness import options, show
from jobs import by_seed, do_job, train_quietly

RATES = (0.03, 0.1)
"""Peak learning rates that each method has the choice of; of concatenated scores three tenths count."""
CHOSEN_ON = 0.1
"""Share of the pool by which the rate is chosen."""
MANY = Limits(per_job=None, per_month=None, lifetime=None)


@dataclass(frozen=True)
class Scenario:
    """Who knows what, by which network; images and epochs; the student and its ways of learning."""

    data: str
    classes: tuple[tuple[int, ...], ...]
    teachers: tuple[str, ...]
    student: str
    methods: tuple[str, ...]
    private: int = 6_000
    pool: int = 8_000
    test: int = 10_000
    epochs: int = 16


SCENARIOS = {
    "same": Scenario(
        "cifar10",
        ((0, 1, 2, 3, 4), (5, 6, 7, 8, 9)),
        ("resnet20", "resnet20"),
        "resnet20@1.25",
        ("KD", "layer-wise", "joint, concatenated", "layer-wise + joint, concatenated", "layer-wise + joint"),
    ),
    "different": Scenario(
        "cifar10",
        ((0, 1, 2, 3, 4), (3, 4, 5, 6, 7), (6, 7, 8, 9, 0)),
        ("vgg6", "resnet8", "mobilenet-small"),
        "resnet8",
        ("KD", "CFL", "CFL, maps", "CFL, no reconstruction", "CFL, no soft targets"),
    ),
}
QUICK = {
    "same": replace(
        SCENARIOS["same"],
        data="embedded",
        teachers=("cnn3@0.5", "cnn3@0.5"),
        student="cnn3@0.6",
        methods=("KD", "layer-wise + joint"),
        private=100,
        pool=100,
        test=100,
        epochs=2,  # one for layers, one for the joint phase
    ),
    "different": replace(
        SCENARIOS["different"],
        data="embedded",
        teachers=("cnn3@0.5", "resnet8@0.5", "cnn3@0.5"),
        student="cnn3@0.5",
        methods=("KD", "CFL, maps"),
        private=100,
        pool=100,
        test=100,
        epochs=1,
    ),
}
TERMS = {"reconstruction": "reconstruction", "soft targets": "soft"}


def student(scenario: Scenario, method: str, rate: float) -> Student:
    """Return how the student learns by a method."""
    layer_wise, epochs = LayerWise(), scenario.epochs
    of_layers = rate / 2  # constant, where the others' rise to their peak and fall: about as much in all
    target: Literal["unified", "concatenated"] = "concatenated" if method.endswith("concatenated") else "unified"
    if method == "layer-wise":
        layer_wise = LayerWise(epochs=epochs, learning_rate=of_layers, joint=False)
    elif method.startswith("joint"):
        layer_wise = LayerWise(layers=False, target=target)
    elif method.startswith("layer-wise + joint"):
        layer_wise = LayerWise(epochs=epochs // 2, learning_rate=of_layers, target=target)
        epochs -= epochs // 2
    return Student(
        architecture=scenario.student,
        learning="soft-labels" if method == "KD" else "common-feature" if method.startswith("CFL") else "layer-wise",
        fit=Fit(epochs=epochs, learning_rate=rate),
        layer_wise=layer_wise,
        common_feature=common(scenario, method),
    )


def common(scenario: Scenario, method: str) -> CommonFeature:
    """Return where student and sites meet by a method, and which terms count; for another, what there is without."""
    if method == "CFL, maps":
        last = [taps(build(name, classes=2, channels=3, seed=0))[-2].name for name in scenario.teachers]
        sites = {f"site-{at + 1}": name for at, name in enumerate(last)}
        return CommonFeature(spaces=(CommonSpace(sites=sites),))
    term = TERMS.get(method.partition(", no ")[2])
    return CommonFeature.model_validate({term: 0.0} if term else {})


def prepare(scenario: Scenario, seed: int, home: Path, folders: Sequence[Path]) -> list[Path]:
    """Make the pools, the test set and the sites' folders; returns the sites' files."""
    random = np.random.default_rng(seed)
    images, labels, names = read(scenario.data, "train", folders)
    source = Source(images, labels, random)
    pool = source.take(range(10), scenario.pool)
    order = random.permutation(len(pool[0]))
    pool = pool[0][order], pool[1][order]
    sites = [source.take(classes, scenario.private) for classes in scenario.classes]
    images, labels, _ = read(scenario.data, "test", folders)
    write_pools(home, pool, Source(images, labels, random).take(range(10), scenario.test), names)
    kept = round(len(pool[0]) * (1 - CHOSEN_ON))
    for name, part in (("learned", slice(kept)), ("chosen-on", slice(kept, None))):
        write_pools(home / name, (pool[0][part], pool[1][part]), (pool[0][:1], pool[1][:1]), names)
    pools = tuple(home / name for name in ("pool", "test-pool", "learned/pool", "chosen-on/pool"))
    return [write_site(scenario, k, part, names, pools, home, seed) for k, part in enumerate(sites)]


def write_site(
    scenario: Scenario,
    at: int,
    private: tuple[Images, Labels],
    names: list[str],
    pools: tuple[Path, ...],
    home: Path,
    seed: int,
) -> Path:
    """Write a site's file and private data."""
    path = home / f"site-{at + 1}" / "site.yaml"
    fit = Fit(epochs=scenario.epochs)
    settings = SiteSettings(
        name=f"site-{at + 1}",
        data=save(path.parent / "private.npz", private, names),
        teacher=TrainTeacher(kind="train", architecture=scenario.teachers[at], fit=fit),
        policy=Policy(features=Features(taps={"*": Reduction(), "penultimate": Reduction()}, bytes=2**40), limits=MANY),
        pools=pools,
        state=path.parent / "state",
        seed=1000 * seed + at,
    )
    dump_settings(settings, path)
    return path


def do(scenario: Scenario, method: str, rate: float, seed: int, home: Path, paths: list[Path]) -> dict[str, Any]:
    """Do a method's job and return its report; the answers go, features take gigabytes."""
    settings = JobSettings(
        name=method.replace(" ", "-").replace(",", "").replace("+", "and").lower(),
        seed=seed,
        pool=home / "pool",
        ask=Ask(features="u8"),
        student=student(scenario, method, rate),
        judge=Judge(
            test=NpzData(kind="npz", path=home / "test.npz"),
            test_pool=home / "test-pool",
            pool_labels=home / "pool-labels.npy" if method == "KD" else None,
        ),
    )
    run = home / "runs" / settings.name
    report = do_job(settings, run, paths)
    shutil.rmtree(run / "answers", ignore_errors=True)
    return report


def of_features(told: dict[str, Any] | None) -> dict[str, Any]:
    """Return what a report tells of features, which may be why students differ; of losses the first and the last."""
    held = told or {}
    layers = [{**layer, "losses": [layer["losses"][0], layer["losses"][-1]]} for layer in held.get("layers", ())]
    spaces = [{name: space[name] for name in ("width", "size", "missed", "still")} for space in held.get("spaces", ())]
    return {"layers": layers, "spaces": spaces}


def unified(seed: int, home: Path, paths: list[Path]) -> NDArray[np.intp]:
    """Return the classes of the images that rates are chosen on, as the sites' answers say; by a job of their own."""
    plain = Student(architecture="cnn3", fit=Fit(epochs=1))
    asked = JobSettings(name="chosen-on", seed=seed, pool=home / "chosen-on" / "pool", student=plain)
    do_job(asked, home / "runs" / "chosen-on", paths)
    found: NDArray[np.intp] = np.load(home / "runs" / "chosen-on" / "labels" / "q.npy", mmap_mode="r").argmax(axis=1)
    return found


def agreement(
    scenario: Scenario, method: str, rate: float, seed: int, home: Path, paths: list[Path], labels: NDArray[np.intp]
) -> float:
    """Return how often a student of nine tenths of the pool agrees with the unified labels of the rest; 0 for a rate by
    which it does not learn at all."""
    name = f"{method}-{rate:g}".replace(" ", "-").replace(",", "").replace("+", "and").replace(".", "-").lower()
    settings = JobSettings(
        name=name,
        seed=seed,
        pool=home / "learned" / "pool",
        ask=Ask(features="u8"),
        student=student(scenario, method, rate),
    )
    run = home / "choosing" / name
    try:
        do_job(settings, run, paths)
    except StudentError as error:
        print(f"{method} at {rate:g}: {error}", file=sys.stderr)
        return 0.0
    finally:
        shutil.rmtree(run / "answers", ignore_errors=True)
    pool = Pool.open(home / "chosen-on" / "pool")
    found = StudentModel(run / "student").log_probs(pool.read(0, len(pool))).argmax(axis=1)
    return float((found == labels).mean())


def choose(scenario: Scenario, seed: int, home: Path, folders: Sequence[Path]) -> dict[str, dict[str, float]]:
    """Return each method's agreement under each rate."""
    paths = prepare(scenario, seed, home, folders)
    train_quietly(paths)
    labels = unified(seed, home, paths)
    return {
        method: {str(rate): agreement(scenario, method, rate, seed, home, paths, labels) for rate in RATES}
        for method in scenario.methods
    }


def measure(
    scenario: Scenario, seed: int, home: Path, folders: Sequence[Path], agreed: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """Return the figures of one scenario under one seed."""
    paths = prepare(scenario, seed, home, folders)
    train_quietly(paths)
    rates = {method: float(max(held, key=lambda rate: held[rate])) for method, held in agreed.items()}
    reports = {m: do(scenario, m, rates[m], seed, home, paths) for m in scenario.methods}
    told = reports["KD"]["baselines"]
    for path in paths:
        shutil.rmtree(path.parent / "state" / "released", ignore_errors=True)
    return {
        "students": {method: report["student"]["accuracy"] for method, report in reports.items()},
        "features": {method: of_features(report["amalgamation"]) for method, report in reports.items()},
        "rates": rates,
        "naive": told["naive"]["accuracy"],
        "unified": told["unified_ensemble"]["accuracy"],
        "oracle": told["oracle"]["accuracy"],
        "best_site": told["best_site"]["accuracy"],
        "bytes": {
            m: sum(site["bytes"] + (site["features"] or {"bytes": 0})["bytes"] for site in report["sites"])
            for m, report in reports.items()
        },
    }


def to_kd(figures: Sequence[dict[str, Any]], method: str) -> list[float]:
    """Return the differences to KD, seed by seed."""
    return [each["students"][method] - each["students"]["KD"] for each in figures]


def arguments_too(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's own options."""
    add_data(parser)
    parser.add_argument("--only", nargs="*", choices=sorted(SCENARIOS), default=list(SCENARIOS))


def main() -> None:
    """Measure what is not measured yet, and show everything."""
    arguments = options(__doc__, arguments_too)
    scenarios = QUICK if arguments.quick else {name: SCENARIOS[name] for name in arguments.only}
    folders = folders_of(arguments)
    choices = {f"{name} rates": partial(choose, scenario, folders=folders) for name, scenario in scenarios.items()}
    chosen = by_seed(arguments, choices, lambda agreed: agreed, seeds=1)
    measures = {
        name: partial(measure, scenario, folders=folders, agreed=chosen[f"{name} rates"][0])
        for name, scenario in scenarios.items()
    }
    found = by_seed(arguments, measures, lambda figures: figures["students"])
    for name, figures in found.items():
        rows = [
            (
                method,
                spread([f["students"][method] for f in figures]),
                "" if method == "KD" else difference(to_kd(figures, method)),
                f"{figures[0]['rates'][method]:g}",
                f"{statistics.mean(f['bytes'][method] for f in figures):,.0f}",
            )
            for method in scenarios[name].methods
        ]
        rows += [(k, spread([f[k] for f in figures]), "", "", "") for k in ("naive", "best_site", "unified")]
        rows.append(("oracle", spread([f["oracle"] for f in figures]), "", f"{figures[0]['rates']['KD']:g} (KD's)", ""))
        columns = ("", "accuracy, %", "difference to KD (95 %)", "rate (layers: half)", "bytes")
        show(f"{name}: {len(figures)} seeds, mean ± standard deviation", columns, rows, {}, None)
    show("", (), (), {"scenarios": found}, arguments.json)


if __name__ == "__main__":
    main()
