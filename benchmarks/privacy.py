"""Claim: none. The embedded job behind each protection, under several seeds: what it costs, and what it hides.

The same sites, images and student in every row; what differs is how the sites' answers leave. `none` is the job as it
is. `u8` and `top-3` are other encodings, `secure sum` lets out sums over sites alone: none of the three is differential
privacy. `pate` answers about the pool at epsilon 3, `dp-sgd` trains for epsilon 8, both for a record at delta 1e-5.

Settings follow from these rules, and nothing was chosen by its result on any image. Noise is what `consilience site
plan` asks for. Calibration and the telling of held-out accuracy are off behind a mechanism, which refuses them. Both
mechanisms train `cnn3`, the smallest network at every site: noise on gradients grows with the number of weights, and a
part of the data holds little. `pate` once has 10 records a part, two a class, and once 40, as the plan takes them where
nothing else is said; its networks have 30 epochs with 16 images a batch. `dp-sgd` has 20 epochs with 256 images a batch
and no augmentation. Everything else is the embedded job's.

The membership attack takes the log-probability of an image's true class, as the site lets it out, for a sign that the
teacher learned from that image: AUC between the teacher's training images and test images of the same class, mean over
classes and sites. What is done is kept in the folder `--work`, and a second call goes on from there.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from images import spread
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from consilience.client.audit.answers import told
from consilience.client.privacy import learned_from
from consilience.client.privacy.plan import RECORDS_A_PART, alternatives
from consilience.client.teacher import load_teacher
from consilience.client.teacher.private_samples import present_classes, private_data
from consilience.common.data import open_data
from consilience.common.files import read_json, write_json
from consilience.common.progress import Reporter
from consilience.common.settings import (
    Ask,
    DpSgd,
    Encoding,
    Fit,
    JobPrivacy,
    JobSettings,
    Judge,
    NpzData,
    Pate,
    Policy,
    SiteSettings,
    Student,
    TrainTeacher,
)
from consilience.common.settings_file import dump_settings, load_settings
from consilience.deploy.simulation import embedded_job, prepare, train_site
from harness import add_seeds, options, show
from jobs import do_job

DELTA = 1e-5
PLAIN = "plain"


@dataclass(frozen=True)
class Protection:
    """One row: how answers leave."""

    mechanism: str = PLAIN
    encoding: Encoding = "f16"
    sums: bool = False
    epsilon: float | None = None
    records_a_part: int = 0

    @property
    def sites(self) -> str:
        """Rows of one name have the same sites, teachers included."""
        return f"{self.mechanism}-{self.records_a_part}" if self.records_a_part else self.mechanism


PROTECTIONS = {
    "none": Protection(),
    "u8": Protection(encoding="u8"),
    "top-3": Protection(encoding="top-3"),
    "secure sum": Protection(sums=True),
    "pate, 10 a part": Protection("pate", epsilon=3, records_a_part=10),
    "dp-sgd": Protection("dp-sgd", epsilon=8),
    "pate, 40 a part": Protection("pate", epsilon=3, records_a_part=RECORDS_A_PART),
}
QUICK = ("u8", "secure sum")
PART_FIT: dict[str, Any] = {"epochs": 30, "batch_size": 16}
DP_FIT: dict[str, Any] = {"epochs": 20, "batch_size": 256, "augment": False}


def job(seed: int, *, quick: bool) -> JobSettings:
    """Return the embedded job, small if `quick`; its sites have keys."""
    made = embedded_job().model_copy(update={"seed": seed, "privacy": JobPrivacy(secure_sum=True)})
    assert made.simulation is not None
    if not quick:
        return made
    teachers = (TrainTeacher(kind="train", architecture="cnn3", fit=Fit(epochs=1, precision="f32")),)
    student = Student(architecture="cnn3", fit=Fit(epochs=1, precision="f32"))
    simulation = made.simulation.model_copy(update={"teachers": teachers, "pool_share": 0.1})
    return made.model_copy(update={"simulation": simulation, "student": student})


def make_sites(protection: Protection, whole: JobSettings, home: Path, *, quick: bool) -> list[Path]:
    """Make the sites in HOME/simulation, behind the mechanism, and train them; returns their files."""
    home.mkdir(parents=True, exist_ok=True)
    assert whole.simulation is not None
    with Reporter() as reporter:
        paths = prepare(whole.simulation, whole, home, reporter)
        samples = len(np.load(home / "simulation" / "pool-labels.npy"))
        for path in paths:
            settings = load_settings(path, SiteSettings)
            if protection.mechanism != settings.privacy.mechanism and protection.mechanism != PLAIN:
                dump_settings(protected(settings, protection, samples, quick=quick), path)
            train_site(path, reporter)
    return paths


def protected(settings: SiteSettings, protection: Protection, samples: int, *, quick: bool) -> SiteSettings:
    """Return the site's settings with the mechanism, and as much noise as the plan asks for."""
    assert settings.teacher.kind == "train"
    fit = {} if quick else PART_FIT if protection.mechanism == "pate" else DP_FIT
    teacher = settings.teacher.model_copy(
        update={"architecture": "cnn3", "fit": settings.teacher.fit.model_copy(update=fit)}
    )
    bare = settings.model_copy(update={"teacher": teacher, "policy": Policy(), "calibration": "off"})
    assert protection.epsilon is not None
    if protection.records_a_part:
        learned = round(len(private_data(settings)) * (1 - teacher.holdout))
        parts = 2 if quick else max(2, learned // protection.records_a_part)
        bare = bare.model_copy(update={"privacy": Pate(mechanism="pate", parts=parts, sigma=1.0, delta=DELTA)})
    planned = alternatives(bare, protection.epsilon, samples, DELTA)
    kind = Pate if protection.mechanism == "pate" else DpSgd
    chosen = next(one.settings for one in planned if isinstance(one.settings, kind) and not one.configured)
    return bare.model_copy(update={"privacy": chosen})


def do(protection: Protection, name: str, whole: JobSettings, home: Path, paths: list[Path]) -> dict[str, Any]:
    """Do the job with these sites and return its report. The row `none` brings the baselines, which ask for more."""
    held, first = home / "simulation", name == "none"
    settings = whole.model_copy(
        update={
            "name": name.replace(" ", "-").replace(",", ""),
            "simulation": None,
            "pool": held / "pool",
            "ask": Ask(encoding=protection.encoding),
            "privacy": JobPrivacy(secure_sum=protection.sums),
            "judge": Judge(
                test=NpzData(kind="npz", path=held / "test.npz"),
                test_pool=held / "test-pool" if first else None,
                pool_labels=held / "pool-labels.npy" if first else None,
            ),
        }
    )
    return do_job(settings, home / "runs" / settings.name, paths)


def answering(settings: SiteSettings, encoding: Encoding) -> Callable[[NDArray[np.uint8]], NDArray[np.float64]]:
    """Return what gives (n, K) log-probabilities as they leave the site and arrive."""
    teacher, size = load_teacher(settings), settings.batch_size

    def answer(images: NDArray[np.uint8]) -> NDArray[np.float64]:
        parts = []
        for first in range(0, len(images), size):
            parts.append(told(teacher, images[first : first + size], settings.policy, encoding))
        return np.concatenate(parts).astype(np.float64)

    return answer


def attack(protection: Protection, paths: list[Path], test: Path) -> tuple[float, float]:
    """Return the attack's AUC, mean over sites and their classes, and how often answers about test images are right.

    In secure sums what arrives is the sum of probabilities, class by class, of the sites that know it.
    """
    sites = [load_settings(path, SiteSettings) for path in paths]
    answers = [answering(settings, protection.encoding) for settings in sites]
    classes = [present_classes(private_data(settings))[1] for settings in sites]
    shown = open_data(NpzData(kind="npz", path=test))
    names = np.array(shown.class_names)[shown.need_labels("test")]
    aucs, right = [], []
    for at, settings in enumerate(sites):
        data = private_data(settings)
        labels, own = present_classes(data)
        learned, _ = learned_from(settings, data)
        others = np.flatnonzero(np.isin(names, own))
        images = np.concatenate([data.read(learned), shown.read(others)])
        true = np.concatenate([labels[learned], [own.index(name) for name in names[others]]])
        rows = answers[at](images)
        if protection.sums:
            total = np.exp(rows)
            for other in (k for k in range(len(sites)) if k != at):
                theirs = np.exp(answers[other](images))
                for column, name in enumerate(own):
                    if name in classes[other]:
                        total[:, column] += theirs[:, classes[other].index(name)]
            rows = np.log(np.maximum(total, 1e-30))
        scores, member = rows[np.arange(len(true)), true], np.arange(len(true)) < len(learned)
        aucs += [float(roc_auc_score(member[true == k], scores[true == k])) for k in range(len(own))]
        right.append(float(np.mean(rows[~member].argmax(axis=1) == true[~member])))
    return statistics.mean(aucs), statistics.mean(right)


def measure(name: str, protection: Protection, seed: int, home: Path, *, quick: bool) -> dict[str, Any]:
    """Return the figures of one row under one seed."""
    whole = job(seed, quick=quick)
    paths = make_sites(protection, whole, home / protection.sites, quick=quick)
    report = do(protection, name, whole, home / protection.sites, paths)
    auc, right = attack(protection, paths, home / protection.sites / "simulation" / "test.npz")
    given = [site["guarantee"] for site in report["sites"]]
    samples = report["pool"]["size"]
    return {
        "student": report["student"]["accuracy"],
        # the row `none` also asks about the test images
        "bytes": sum(site["bytes"] / site["answers"] * samples for site in report["sites"]),
        "samples": samples,
        "epsilon": max(one["epsilon"] for one in given) if all(given) else None,
        "mechanisms": [one["mechanism"] if one else None for one in given],
        "auc": auc,
        "answers_right": right,
        "naive": report["baselines"]["naive"]["accuracy"],
        "oracle": report["baselines"]["oracle"]["accuracy"],
    }


def arguments_too(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's own options."""
    add_seeds(parser, seeds=3)
    parser.add_argument("--only", nargs="*", choices=sorted(PROTECTIONS), default=list(PROTECTIONS))


def main() -> None:
    """Measure what is not measured yet, and show everything."""
    arguments = options(__doc__, arguments_too)
    names = QUICK if arguments.quick else arguments.only
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as temporary:
        work = (arguments.work or Path(temporary)).resolve() / ("quick" if arguments.quick else ".")
        for seed in range(1 if arguments.quick else arguments.seeds):  # seed by seed: a part says something of all
            for name in names:
                done = work / f"{name.replace(' ', '-')}-{seed}.json"
                if not done.exists():
                    home = work / f"seed-{seed}"
                    write_json(done, measure(name, PROTECTIONS[name], seed, home, quick=arguments.quick))
                found[name].append(read_json(done))
                print(f"{name}, seed {seed}: {found[name][-1]}", file=sys.stderr)
    rows = [
        (
            name,
            spread([f["student"] for f in figures]),
            f"{statistics.mean(f['bytes'] for f in figures):,.0f}",
            "none" if figures[0]["epsilon"] is None else f"{max(f['epsilon'] for f in figures):.3g}",
            spread([f["auc"] for f in figures]),
            spread([f["answers_right"] for f in figures]),
        )
        for name, figures in found.items()
    ]
    columns = ("", "student", "bytes", "epsilon", "attack's AUC", "answers right")
    title = "The embedded job behind each protection, %, mean ± standard deviation over seeds"
    if full := found.get("none"):
        title += f"; naive {spread([f['naive'] for f in full])}, oracle {spread([f['oracle'] for f in full])}"
    show(title, columns, rows, {"protections": found, "delta": DELTA}, arguments.json)


if __name__ == "__main__":
    main()
