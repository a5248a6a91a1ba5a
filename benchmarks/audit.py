"""Claim: the audit finds out a teacher that learned by heart; against one that did not, it finds what chance finds.

`by heart`: 200 images of noise with random labels of three classes, `cnn3`, of which 120 are learned over 12 epochs
without augmentation, so that only memory can know a label. The rows below it are the same site with less said, noise, a
mechanism, or with one epoch at a rate too small to learn anything. The last rows are the embedded job's three sites.
Each is attacked by the loss and by the likelihood ratio with eight shadows, as `consilience site audit` does, and as
answers leave: in `f32` for the sites of noise, which tells the most, and as the embedded job's sites let them. The
sites of noise are also asked a thousand times about a pool of 64 images, and the answers averaged: `error` is the mean
distance to what the teacher says without noise. A seed changes the images, the labels, what is held out, and the
training.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from consilience.client.audit.auditing import SHADOWS, audit_site
from consilience.client.audit.averaging import Averaging
from consilience.client.audit.lira import LEAST_SHADOWS
from consilience.client.audit.membership import Membership
from consilience.client.privacy import train_private
from consilience.client.site import Site
from consilience.client.teacher import load_teacher
from consilience.common.data import from_arrays
from consilience.common.pool import Pool
from consilience.common.progress import Reporter
from consilience.common.seeds import derive
from consilience.common.settings import (
    Fit,
    NpzData,
    OutputNoise,
    Pate,
    Policy,
    SiteSettings,
    TrainTeacher,
)
from consilience.common.settings_file import load_settings
from consilience.deploy.simulation import embedded_job, prepare
from harness import options, show

BARE = "by heart, f32"
BY_HEART = Fit(epochs=12, batch_size=16, learning_rate=0.05, augment=False, precision="f32")
CHANGES: dict[str, dict[str, Any]] = {
    BARE: {},
    "votes": {"policy": Policy(precision="votes")},
    "cap 0.5, one decimal": {"policy": Policy(precision="f32", cap=0.5, decimals=1)},
    "output-noise, sigma 2": {"privacy": OutputNoise(mechanism="output-noise", sigma=2.0)},
    "pate, 4 parts, sigma 3": {"privacy": Pate(mechanism="pate", parts=4, sigma=3.0)},
    "one epoch at 1e-4": {"fit": BY_HEART.model_copy(update={"epochs": 1, "learning_rate": 1e-4, "batch_size": 64})},
}
QUICK = (BARE, "votes")


def of_noise(folder: Path, name: str, seed: int) -> SiteSettings:
    """Return the settings of a site of noise in the folder, changed as the row says."""
    random = np.random.default_rng(seed)
    labels = random.choice(3, 200, p=[0.6, 0.3, 0.1])
    path = folder / "private.npz"
    folder.mkdir(parents=True)
    np.savez(path, x=random.integers(0, 256, (200, 8, 8, 1), np.uint8), y=labels, names=np.array(["a", "b", "c"]))
    asked = random.integers(0, 256, (64, 8, 8, 1), np.uint8)
    Pool.build(from_arrays(asked, None, (), where="audit"), folder / "pool")
    changes = dict(CHANGES[name])
    teacher = TrainTeacher(kind="train", architecture="cnn3", fit=changes.pop("fit", BY_HEART), holdout=0.4)
    settings = SiteSettings(
        name="site-1",
        data=NpzData(kind="npz", path=path),
        teacher=teacher,
        calibration="off",
        policy=Policy(precision="f32"),
        pools=(folder / "pool",),
        state=folder / "state",
        seed=derive(seed, "audited site"),
    )
    return settings.model_copy(update=changes)


def of_job(folder: Path, seed: int) -> Iterator[tuple[str, SiteSettings]]:
    """Yield the embedded job's sites, by name and network, without their pool, which no attack here asks about."""
    job = embedded_job().model_copy(update={"seed": seed})
    assert job.simulation is not None
    with Reporter() as reporter:
        paths = prepare(job.simulation, job, folder, reporter)
    for path in paths:
        settings = load_settings(path, SiteSettings)
        assert settings.teacher.kind == "train"
        yield f"{settings.name} ({settings.teacher.architecture})", settings.model_copy(update={"pools": ()})


def audited(settings: SiteSettings, folder: Path, shadows: int) -> tuple[dict[str, Membership], Averaging | None]:
    """Train a site's teacher and return what both attacks on members find, and averaging where there is a pool."""
    train_private(settings)
    site = Site(settings, load_teacher(settings))
    try:
        found = audit_site(site, folder, shadows)
    finally:
        site.close()
    assert found.loss is not None
    assert found.shadows is not None, found.left_out
    return {"loss": found.loss, "ratio": found.shadows}, found.averaging


def told(found: list[Membership]) -> tuple[str, str]:
    """Return the mean area with its spread, and each seed's with its interval."""
    areas = [one.auc for one in found]
    spread = f" ± {100 * statistics.stdev(areas):.1f}" if len(areas) > 1 else ""
    each = ", ".join(f"{100 * one.auc:.0f} ({100 * one.low:.0f}-{100 * one.high:.0f})" for one in found)
    return f"{100 * statistics.mean(areas):.1f}{spread}", each


def arguments_too(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's own options."""
    parser.add_argument("--seeds", type=int, default=3)


def main() -> None:
    """Audit every row under every seed."""
    arguments = options(__doc__, arguments_too)
    seeds, shadows = (1, LEAST_SHADOWS) if arguments.quick else (arguments.seeds, SHADOWS)
    found: dict[str, list[dict[str, Membership]]] = {}
    averaged: dict[str, list[Averaging]] = {}
    with tempfile.TemporaryDirectory() as name:
        for seed in range(seeds):
            home = Path(name) / str(seed)
            sites = [
                (row, of_noise(home / f"noise-{k}", row, seed))
                for k, row in enumerate(QUICK if arguments.quick else CHANGES)
            ]
            if not arguments.quick:
                sites += of_job(home / "job", seed)
            for k, (row, settings) in enumerate(sites):
                each, averaging = audited(settings, home / f"shadows-{k}", shadows)
                found.setdefault(row, []).append(each)
                averaged.setdefault(row, []).extend([] if averaging is None else [averaging])
                print(f"{row}, seed {seed}: {told([each['loss']])[1]}, {told([each['ratio']])[1]}", file=sys.stderr)
    rows = [
        (row, *told([one["loss"] for one in each]), *told([one["ratio"] for one in each]))
        for row, each in found.items()
    ]
    figures = {
        row: [{attack: one.model_dump(mode="json", exclude={"roc"}) for attack, one in both.items()} for both in each]
        for row, each in found.items()
    }
    columns = ("", "loss, %", "per seed (95 %)", "ratio, %", "per seed (95 %)")
    title = f"Pairs told apart, {seeds} seeds, {shadows} shadows"
    averages = {
        row: [{"repetitions": one.repetitions, "errors": one.errors} for one in each] for row, each in averaged.items()
    }
    show(title, columns, rows, {"shadows": shadows, "rows": figures, "averaging": averages}, arguments.json)
    noisy = [
        (row, *(statistics.mean(one.errors[n] for one in each) for n in (1, each[0].repetitions)))
        for row, each in averaged.items()
        if each
    ]
    show("Error of answers", ("", "after one", "mean of a thousand"), noisy, {}, None)


if __name__ == "__main__":
    main()
