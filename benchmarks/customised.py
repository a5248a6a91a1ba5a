"""Claim: students of chosen labels are smaller than one of all, and no worse made by filtered amalgamation than by KD.

Three sites label canvases of one to four Fashion-MNIST objects, each by five labels, of which neighbours share some;
private images, pool and test images are made of objects of their own. Wanted are four labels that two sites know, one
of which both do (`two sites`), three of which two sites share two (`shared`), and one of each site (`one each`). Per
seed and wanted labels the same architecture learns from the same pool by filtered amalgamation, sites lending their
blocks (Ye et al., IJCAI 2019), its branches begun by these or at random; from the unified soft labels of the wanted
labels, KD; and from the same with a last block and a head of its own for what is wanted of each site. Students of all
labels, by KD and filtered, are judged by the wanted ones. Told are average precisions on the same test images, for
the teachers too.

All see the pool as often, and filtered amalgamation a tenth of it less: its epochs are those of each block and of the
joint phase, KD's the sum. One more student has KD's epochs in the joint phase, after those of blocks, and the rate of
`filtered`: it says whether epochs are what is missing. Each other method has one rate, of four, for the whole student;
blocks by themselves learn by a tenth of it. It is the one under which students of nine tenths of the pool rank
the rest most as the unified labels do, under the first seed: by the mean of Spearman's correlation over wanted labels,
the first of the choices of labels for all. No label of the pool or the test images is seen there.
"""

from __future__ import annotations

import re
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from composed import compose
from images import Images, Labels, add_data, difference, folders_of, read, save, spread, write_pools
from numpy.typing import NDArray
from scipy import stats
from torch import nn

from consilience.client.teacher import load_any
from consilience.client.teacher.multi_calibrated import CalibratedMulti
from consilience.common.data import open_data
from consilience.common.epochs import EpochRecord
from consilience.common.errors import StudentError
from consilience.common.label_scores import average_precision
from consilience.common.labels import LabelSpace
from consilience.common.nets import default_device
from consilience.common.nets.blocks import skeleton
from consilience.common.pool import Pool, PoolImages
from consilience.common.preprocessing import ImageRows
from consilience.common.progress import Reporter
from consilience.common.settings import (
    Filtered,
    Fit,
    JobSettings,
    NpzData,
    Policy,
    SiteSettings,
    Student,
    Tail,
    TrainTeacher,
)
from consilience.common.settings_file import dump_settings, load_settings
from consilience.server.learning import BuildStudent, ByLoss, StudentModel, learn
from consilience.server.student.filtered_student import BranchAbout, FilteredStudent, StudentAbout
from consilience.server.student.soft_multi import SoftMultiLabels
from harness import options, show
from jobs import by_seed, do_job, train_quietly

FILTERED, RANDOM, KD, HEADS = "filtered", "filtered, random branches", "KD", "KD, separate heads"
LONGER = "filtered, KD's epochs at the end"
ALL_KD, ALL_FILTERED = "KD, all labels", "filtered, all labels"
CUSTOMISED, FULL = (FILTERED, RANDOM, KD, HEADS, LONGER), (ALL_KD, ALL_FILTERED)
CHOSEN_ON = 0.1
"""Share of the pool by which the rate is chosen."""
BLOCK_SHARE = 0.1
"""Peak learning rate of each block's own training, over that of the whole student."""
CHANNELS = 1


@dataclass(frozen=True)
class Scenario:
    """Who knows which labels, which are wanted, and how much there is to learn from, for how long."""

    data: str
    sites: tuple[tuple[int, ...], ...]
    wanted: Mapping[str, tuple[int, ...]]
    network: str = "cnn3@0.5"
    private: int = 4_000
    pool: int = 4_000
    test: int = 4_000
    teacher_epochs: int = 20
    block_epochs: int = 4
    joint_epochs: int = 12
    rates: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0)
    """Peak learning rates that each method has the choice of, for the whole student."""

    @property
    def epochs(self) -> int:
        """Of a student that learns all at once."""
        return skeleton(self.network, 1).count * self.block_epochs + self.joint_epochs


SCENARIO = Scenario(
    "fashion_mnist",
    ((0, 1, 2, 3, 4), (3, 4, 5, 6, 7), (7, 8, 9, 0, 1)),
    {"two sites": (2, 4, 5, 6), "shared": (0, 1, 8), "one each": (2, 6, 9)},
)
QUICK = replace(
    SCENARIO,
    data="embedded",
    wanted={"two sites": (2, 4, 5, 6)},
    private=150,
    pool=150,
    test=150,
    teacher_epochs=1,
    block_epochs=1,
    joint_epochs=1,
    rates=(0.1,),
)


@dataclass(frozen=True)
class Home:
    """A seed's files: the sites', its pools, and the runs on one of these, with folders `runs`."""

    path: Path
    seed: int
    sites: tuple[Path, ...]
    names: tuple[str, ...]

    def on(self, part: str) -> Home:
        """Return the same for runs on the part of the pool in the folder `part`."""
        return replace(self, path=self.path / part)


@dataclass(frozen=True)
class Heads(ByLoss):
    """The lesson of a loss of the scores, for a network of `about`."""

    about: StudentAbout

    @property
    def fingerprint(self) -> str:
        """The loss's, and what the network is made of."""
        return f"{self.loss.fingerprint} {self.about.model_dump_json()}"

    def teach(
        self, build: BuildStudent, images: ImageRows, folder: Path, reporter: Reporter, name: str
    ) -> tuple[nn.Module, list[EpochRecord]]:
        """See `Lesson.teach`."""
        return super().teach(lambda: FilteredStudent(self.about, self.seed), images, folder, reporter, name)


def separate_heads(scenario: Scenario, wanted: Sequence[int]) -> StudentAbout:
    """Return the description of a network with a last block and a head for what is wanted of each site."""
    branches = tuple(
        BranchAbout(
            task=f"site-{at + 1}",
            block=skeleton(scenario.network, 1).count - 1,
            architecture=scenario.network,
            classes=own,
            filters=0,
        )
        for at, known in enumerate(scenario.sites)
        if (own := tuple(place for place, label in enumerate(wanted) if label in known))
    )
    return StudentAbout(architecture=scenario.network, channels=CHANNELS, classes=len(wanted), branches=branches)


def canvases(objects: tuple[Images, Labels], names: Sequence[str], count: int, seed: int) -> tuple[Images, Labels]:
    """Return canvases of two by two objects at half their size, and their labels (count, L)."""
    images, labels = objects
    height, width = images.shape[1] // 2, images.shape[2] // 2
    halved = images.reshape(len(images), height, 2, width, 2, CHANNELS).mean(axis=(2, 4)).astype(np.uint8)
    found, told, _ = compose(halved, labels, names, count, seed, shift=1)
    return found, told.astype(np.int64)


def prepare(scenario: Scenario, seed: int, path: Path, folders: Sequence[Path]) -> Home:
    """Make the pools, the test set and the sites' folders, and train the teachers; what is there stays."""
    images, labels, names = read(scenario.data, "train", folders)
    *own, rest = np.array_split(np.random.default_rng(seed).permutation(len(images)), len(scenario.sites) + 1)
    pool = canvases((images[rest], labels[rest]), names, scenario.pool, 10 * seed + 8)
    test = canvases(read(scenario.data, "test", folders)[:2], names, scenario.test, 10 * seed + 9)
    write_pools(path, pool, test, names)
    kept = round(scenario.pool * (1 - CHOSEN_ON))
    for name, part in (("learned", slice(kept)), ("chosen-on", slice(kept, None))):
        write_pools(path / name, (pool[0][part], pool[1][part]), (test[0][:1], test[1][:1]), names)
    sites = []
    for at, (known, held) in enumerate(zip(scenario.sites, own, strict=True)):
        private = canvases((images[held], labels[held]), names, scenario.private, 10 * seed + at)
        folder = path / f"site-{at + 1}"
        labelled = save(folder / "private.npz", (private[0], private[1][:, known]), [names[label] for label in known])
        fit = Fit(epochs=scenario.teacher_epochs, precision="f32")
        settings = SiteSettings(
            name=folder.name,
            data=labelled,
            teacher=TrainTeacher(kind="train", labels="multi", architecture=scenario.network, fit=fit),
            policy=Policy(tail=Tail(allow="blocks")),
            pools=tuple(path / name for name in ("pool", "learned/pool", "chosen-on/pool")),
            state=folder / "state",
            seed=1000 * seed + at,
        )
        dump_settings(settings, folder / "site.yaml")
        sites.append(folder / "site.yaml")
    train_quietly(sites)
    return Home(path, seed, tuple(sites), tuple(names))


def student(scenario: Scenario, method: str, classes: tuple[str, ...], rate: float) -> Student:
    """Return the student of a job, with the epochs that its method has."""
    filtered = method in (FILTERED, RANDOM, LONGER, ALL_FILTERED)
    return Student(
        architecture=scenario.network,
        learning="filtered" if filtered else "soft-labels",
        classes=classes,
        filtered=Filtered(
            epochs=scenario.block_epochs,
            learning_rate=BLOCK_SHARE * rate,
            branches="random" if method == RANDOM else "teacher",
        ),
        fit=Fit(
            epochs=scenario.joint_epochs if filtered and method != LONGER else scenario.epochs,
            learning_rate=rate,
            precision="f32",
        ),
    )


def made(scenario: Scenario, method: str, wanted: Sequence[int], rate: float, home: Home) -> StudentModel:
    """Return the student of the labels `wanted` by a method, from the pool of `home`; one that is there stays."""
    classes = tuple(home.names[label] for label in wanted)
    about = f"{method} {' '.join(map(str, wanted))} {rate:g}"
    name = re.sub("[^a-z0-9]+", "-", about.lower())
    run, settings = home.path / "runs" / name, student(scenario, method, classes, rate)
    if method == HEADS:
        _with_heads(scenario, wanted, settings, home, run / "student")
    else:
        job = JobSettings(name=name, seed=home.seed, pool=home.path / "pool", student=settings)
        do_job(job, run, list(home.sites))
    return StudentModel(run / "student")


def _with_heads(scenario: Scenario, wanted: Sequence[int], settings: Student, home: Home, folder: Path) -> None:
    names, probs = unified(scenario, home)
    assert settings.classes is not None
    columns = [names.index(name) for name in settings.classes]
    lesson = Heads(
        SoftMultiLabels(probs, default_device(), fingerprint="unified", classes=columns),
        settings,
        home.seed,
        separate_heads(scenario, wanted),
    )
    space = LabelSpace(settings.classes, ("heads",), (tuple(range(len(columns))),), multi=True)
    images = PoolImages(Pool.open(home.path / "pool"))
    with Reporter() as reporter:
        learn(folder, images, space, lesson, settings, home.seed, reporter, "separate heads")


def unified(scenario: Scenario, home: Home) -> tuple[list[str], NDArray[np.float32]]:
    """Return the unified labels (n, L) of the pool of `home`, and their names, by a job whose student nobody needs."""
    job = JobSettings(
        name="labels",
        seed=home.seed,
        pool=home.path / "pool",
        student=Student(architecture=scenario.network, fit=Fit(epochs=1, precision="f32")),
    )
    run = home.path / "runs" / job.name
    names = do_job(job, run, list(home.sites))["labels"]["names"]
    probs: NDArray[np.float32] = np.load(run / "labels" / "q.npy", mmap_mode="r")
    return names, probs


def alike(
    scenario: Scenario, method: str, wanted: Sequence[int], rate: float, home: Home, told: Mapping[str, NDArray[Any]]
) -> float:
    """Return how alike a student of nine tenths of the pool ranks the rest, as the labels of the rest `told` by name.

    It is the mean over labels of Spearman's correlation; -1 where a rate is too high to learn by.
    """
    try:
        found = made(scenario, method, wanted, rate, home.on("learned"))
    except StudentError as error:
        print(f"{method}, rate {rate:g}: {error.message}", file=sys.stderr)
        return -1.0
    pool = Pool.open(home.path / "chosen-on" / "pool")
    scores = found.log_probs(pool.read(0, len(pool)))
    ranks = [
        float(stats.spearmanr(own, told[name]).statistic) if np.ptp(own) else -1.0
        for own, name in zip(scores.T, found.labels, strict=True)
    ]
    return statistics.mean(ranks)


def choose(scenario: Scenario, seed: int, path: Path, folders: Sequence[Path]) -> dict[str, dict[str, float]]:
    """Return for each method how alike its students rank, by rate."""
    home = prepare(scenario, seed, path, folders)
    names, probs = unified(scenario, home.on("chosen-on"))
    told = dict(zip(names, np.array(probs).T, strict=True))
    first = next(iter(scenario.wanted.values()))
    every = range(len(home.names))
    return {
        method: {
            str(rate): alike(scenario, method, every if method in FULL else first, rate, home, told)
            for rate in scenario.rates
        }
        for method in (*CUSTOMISED, *FULL)
        if method != LONGER
    }


def precisions(
    truth: NDArray[np.int8], scores: NDArray[Any], labels: Sequence[str], names: Sequence[str]
) -> dict[str, float]:
    """Return the average precision of each label, of scores (m, k) for `labels` and truth (m, L) for `names`."""
    found = {}
    for at, label in enumerate(labels):
        held = average_precision(truth[:, names.index(label)], scores[:, at])
        assert held is not None, f"no test image has {label}"
        found[label] = held
    return found


def measure(
    scenario: Scenario, seed: int, path: Path, folders: Sequence[Path], agreed: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """Return the figures of one seed."""
    home = prepare(scenario, seed, path, folders)
    test = open_data(NpzData(kind="npz", path=path / "test.npz"))
    images, truth = test.read(), test.need_many("the test")
    rates = {method: float(max(held, key=lambda rate: held[rate])) for method, held in agreed.items()}
    rates[LONGER] = rates[FILTERED]

    def judged(method: str, wanted: Sequence[int]) -> dict[str, Any]:
        model = made(scenario, method, wanted, rates[method], home)
        about = model.model.about if isinstance(model.model, FilteredStudent) else None
        return {
            "ap": precisions(truth, model.log_probs(images), model.labels, home.names),
            "parameters": sum(parameter.numel() for parameter in model.model.parameters()),
            "branches": [each.block for each in about.branches] if about else [],
        }

    teachers = {}
    for site in home.sites:
        teacher = load_any(load_settings(site, SiteSettings))
        assert isinstance(teacher, CalibratedMulti)
        teachers[site.parent.name] = precisions(truth, teacher.log_odds(images), teacher.classes, home.names)
    return {
        "names": home.names,
        "rates": rates,
        "teachers": teachers,
        "full": {method: judged(method, range(len(home.names))) for method in FULL},
        "customised": {
            name: {method: judged(method, wanted) for method in CUSTOMISED} for name, wanted in scenario.wanted.items()
        },
    }


def mean(ap: Mapping[str, float], labels: Sequence[str]) -> float:
    """Return the mean average precision over some labels."""
    return statistics.mean(ap[label] for label in labels)


def students(figures: dict[str, Any], name: str) -> dict[str, Any]:
    """Return every student that is judged by the wanted labels `name`."""
    return {**figures["customised"][name], **figures["full"]}


def rows_of(figures: Sequence[dict[str, Any]], name: str, labels: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the rows of one choice of labels: teachers, then students."""
    rows = [
        (
            site,
            *(
                spread([each["teachers"][site][label] for each in figures]) if label in known else ""
                for label in labels
            ),
            *[""] * 4,
        )
        for site, known in figures[0]["teachers"].items()
        if not set(labels).isdisjoint(known)
    ]
    for method in (*CUSTOMISED, *FULL):
        held = [students(each, name)[method] for each in figures]
        blocks = [" ".join(map(str, each["branches"])) for each in held]
        rows.append(
            (
                method,
                *(spread([each["ap"][label] for each in held]) for label in labels),
                spread([mean(each["ap"], labels) for each in held]),
                "" if method == KD else less(figures, name, labels, method, KD),
                f"{statistics.mean(each['parameters'] for each in held):,.0f}",
                ", ".join(f"{times} x {which}" for which, times in Counter(blocks).items() if which),
            )
        )
    return rows


def less(figures: Sequence[dict[str, Any]], name: str, labels: Sequence[str], one: str, other: str) -> str:
    """Return how much higher the mean average precision of one student is than that of another, seed by seed."""
    told = [students(each, name) for each in figures]
    return difference([mean(each[one]["ap"], labels) - mean(each[other]["ap"], labels) for each in told])


def less_teachers(figures: Sequence[dict[str, Any]], name: str, labels: Sequence[str], method: str) -> str:
    """Return how much higher a student's mean average precision is than the teachers', seed by seed.

    A label that several teachers know has the mean of theirs.
    """
    told = []
    for each in figures:
        own = {label: [held[label] for held in each["teachers"].values() if label in held] for label in labels}
        taught = mean({label: statistics.mean(held) for label, held in own.items()}, labels)
        told.append(mean(students(each, name)[method]["ap"], labels) - taught)
    return difference(told)


def main() -> None:
    """Measure what is not measured yet, and show everything."""
    arguments = options(__doc__, add_data)
    scenario, folders = QUICK if arguments.quick else SCENARIO, folders_of(arguments)
    chosen = by_seed(arguments, {"rates": partial(choose, scenario, folders=folders)}, lambda told: told, seeds=1)
    measures = {"customised": partial(measure, scenario, folders=folders, agreed=chosen["rates"][0])}
    found = by_seed(arguments, measures, lambda told: told["customised"])["customised"]
    for name, wanted in scenario.wanted.items():
        labels = [found[0]["names"][label] for label in wanted]
        columns = ("", *labels, "mean", "less KD (95 %)", "parameters", "branches leave after block")
        show(f"{name}: average precision, %, {len(found)} seeds", columns, rows_of(found, name, labels), {}, None)
    pairs = ((FILTERED, HEADS), (FILTERED, ALL_KD), (FILTERED, ALL_FILTERED), (FILTERED, RANDOM))
    rows = []
    for name, wanted in scenario.wanted.items():
        labels = [found[0]["names"][label] for label in wanted]
        paired = (less(found, name, labels, *pair) for pair in pairs)
        rows.append((name, less_teachers(found, name, labels, FILTERED), *paired))
    columns = ("wanted", "less the teachers", *(f"less {other}" for _, other in pairs))
    figures = {"claim": __doc__, "rates": chosen["rates"][0], "seeds": found}
    show(
        "Filtered, branches of the teachers' blocks: paired differences in points (95 %)",
        columns,
        rows,
        figures,
        arguments.json,
    )


if __name__ == "__main__":
    main()
