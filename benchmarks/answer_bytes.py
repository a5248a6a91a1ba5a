"""Claim: the demo's student is as good from a twentieth of the bytes that f32 takes.

The embedded job's sites train once a seed, and allow f32. Then one job an encoding asks them about the whole pool, and
some about half of it, drawn at random by the seed; every job trains the same student. All jobs of a seed ask the same
sites, and coarser answers are made of those in f32. Bytes are those of encoded rows, of all sites together. A row is as
good as f32 where its student, on average over seeds, loses at most half a point. What is done is kept in the folder
`--work`, and a second call goes on from there. At full size it ends with 1 where no row is as good for a twentieth.
"""

from __future__ import annotations

import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from images import difference, spread

from consilience.common.progress import Reporter
from consilience.common.settings import Ask, Encoding, Fit, JobSettings, Judge, NpzData, Student, TrainTeacher
from consilience.deploy.simulation import embedded_job, prepare
from harness import add_seeds, options, show
from jobs import by_seed, do_job, students, train_quietly

ENCODINGS: tuple[Encoding, ...] = ("f32", "f16", "u8", "top-3", "top-3-u8", "top-1", "top-1-u8", "votes")
HALVED: tuple[Encoding, ...] = ("f32", "u8", "top-3", "votes")
SHARE = 1 / 20
AS_GOOD = 0.005
"""Loss of accuracy up to which a student counts as good as that of f32."""


def demo(seed: int, *, quick: bool) -> JobSettings:
    """Return the embedded job, small if `quick`; its sites allow f32."""
    job = embedded_job().model_copy(update={"seed": seed})
    assert job.simulation is not None
    policy = job.simulation.policy.model_copy(update={"precision": "f32"})
    simulation = job.simulation.model_copy(update={"policy": policy})
    if quick:
        fit = Fit(epochs=1, precision="f32")
        teachers = (TrainTeacher(kind="train", architecture="cnn3@0.5", fit=fit),)
        simulation = simulation.model_copy(update={"teachers": teachers, "pool_share": 0.1})
        job = job.model_copy(update={"student": Student(architecture="cnn3@0.5", fit=fit)})
    return job.model_copy(update={"simulation": simulation})


def do(settings: JobSettings, run: Path, paths: list[Path]) -> dict[str, Any]:
    """Do a job in the folder `run` with the sites at `paths` and return what it came to."""
    report = do_job(settings, run, paths)
    return {
        "student": report["student"]["accuracy"],
        "estimate": report["quality"]["accuracy"],
        "bytes": sum(site["bytes"] for site in report["sites"]),
        "samples": report["pool"]["size"],
    }


def measure(seed: int, home: Path, *, quick: bool) -> dict[str, Any]:
    """Return what each job of one seed came to, by name."""
    whole = demo(seed, quick=quick)
    assert whole.simulation is not None
    home.mkdir(parents=True, exist_ok=True)
    with Reporter() as reporter:
        paths = prepare(whole.simulation, whole, home, reporter)
    train_quietly(paths)
    held = home / "simulation"
    half = len(np.load(held / "pool-labels.npy")) // 2
    asked = {name: Ask(encoding=name) for name in ENCODINGS}
    asked |= {f"{name}, half": Ask(encoding=name, samples=half) for name in HALVED}
    about = {
        "name": "answer-bytes",
        "simulation": None,
        "pool": held / "pool",
        "judge": Judge(test=NpzData(kind="npz", path=held / "test.npz")),
    }
    return {
        name: do(whole.model_copy(update={**about, "ask": ask}), home / "runs" / name.replace(", ", "-"), paths)
        for name, ask in asked.items()
    }


def main() -> None:
    """Measure what is not measured yet, and show everything."""
    arguments = options(__doc__, add_seeds)
    found = by_seed(arguments, {"seed": partial(measure, quick=arguments.quick)}, students)["seed"]
    base = [each["f32"] for each in found]
    rows, good = [], []
    for name in sorted(found[0], key=lambda name: -found[0][name]["bytes"]):
        these = [each[name] for each in found]
        share = statistics.mean(one["bytes"] / other["bytes"] for one, other in zip(these, base, strict=True))
        lost = [other["student"] - one["student"] for one, other in zip(these, base, strict=True)]
        if statistics.mean(lost) <= AS_GOOD:
            good.append((share, name))
        rows.append(
            (
                name,
                spread([one["student"] for one in these]),
                difference(lost),
                statistics.mean(one["bytes"] for one in these) / 1e3,
                f"1/{1 / share:.3g}",
            )
        )
    share, name = min(good)
    title = f"The fewest bytes of a student as good as that of f32: {name}, 1/{1 / share:.3g}; bar: 1/{1 / SHARE:g}"
    columns = ("answers", "student, %", "less than f32, points", "kB", "of f32")
    show(title, columns, rows, {"seeds": found, "best": {"answers": name, "share": share}}, arguments.json)
    if not arguments.quick and share > SHARE:
        sys.exit(f"{name}: 1/{1 / share:.3g} of the bytes of f32; bar: 1/{1 / SHARE:g}")


if __name__ == "__main__":
    main()
