"""Claim: features of 200,000 pool samples from 4 sites are learnt from in less than 1.5 GB of the server's memory.

One tap of 256 values a site, f16, random; images of 32x32x3. Measured is the largest resident size of a process of its
own that does a job's stages from unification on (unify, learn by common features, publish) with the answers of the
sites on disk, as after asking: receiving them is not measured. Numpy, torch and all that the server imports count.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from consilience.common.cards import FeaturesCard, SiteCard, TapCard
from consilience.common.data import ImageData
from consilience.common.encoding import encode, encode_features
from consilience.common.files import sha256
from consilience.common.pool import Pool
from consilience.common.progress import Reporter
from consilience.common.protocol import Answer, Question
from consilience.common.settings import Fit, JobSettings, Student
from consilience.common.settings_file import dump_settings
from consilience.server.answers import AnswerStore
from consilience.server.asking_record import AskingRecord
from consilience.server.contract import RunContract
from consilience.server.job import Job
from consilience.server.stores import feature_stores, stores_about
from harness import options, show

CLASSES = ((0, 1, 2, 3, 4), (3, 4, 5, 6, 7), (6, 7, 8, 9, 0), (1, 3, 5, 7, 9))
VALUES = 256
BLOCK = 4_000
BAR = 1.5e9


def card(site: int) -> SiteCard:
    """Return what a site says of itself."""
    tap = TapCard(
        name="penultimate", layout="", shape=(VALUES,), channels=VALUES, fingerprint=sha256(f"tap {site}".encode())
    )
    return SiteCard(
        name=f"site-{site + 1}",
        classes=tuple(f"class {k}" for k in CLASSES[site]),
        encodings=("f16", "u8", "votes"),
        teacher=sha256(f"teacher {site}".encode()),
        description="random",
        policy="0" * 16,
        features=FeaturesCard(taps=(tap,), encodings=("f16", "u8")),
    )


def fill(store: AnswerStore, job: str, random: np.random.Generator) -> None:
    """Answer everything a store is about, at random."""
    about = store.about
    for start in range(0, about.size, BLOCK):
        stop = min(start + BLOCK, about.size)
        rows = random.standard_normal((stop - start, about.classes)).astype(np.float32)
        if about.kind == "features":
            data = encode_features(rows, "f16")
        else:
            data = encode(rows - np.log(np.exp(rows).sum(axis=1, keepdims=True)), about.encoding)
        named = about.model_dump(include={"pool", "kind", "encoding", "teacher", "policy"})
        store.append(Answer(Question(job=job, start=start, stop=stop, **named), data, 0.0))


def prepare(home: Path, samples: int) -> Path:
    """Make a run's folder as it is once every site has answered."""
    random, run = np.random.default_rng(0), home / "run"
    images = np.lib.format.open_memmap(home / "x.npy", "w+", np.uint8, (samples, 32, 32, 3))
    for start in range(0, samples, BLOCK):
        images[start : start + BLOCK] = random.integers(0, 256, images[start : start + BLOCK].shape, np.uint8)
    Pool.build(ImageData((32, 32, 3), None, (), samples, lambda ids: images[ids]), home / "pool")
    settings = JobSettings(
        name="memory",
        pool=home / "pool",
        student=Student(architecture="cnn3", learning="common-feature", fit=Fit(epochs=1, batch_size=128)),
    )
    run.mkdir()
    dump_settings(settings, run / "job.yaml")
    pool = Pool.open(home / "pool")
    contract = RunContract.build(settings, [card(site) for site in range(len(CLASSES))], (pool.digest,))
    contract.write(run / "contract.json")
    stores, _ = stores_about(run, settings, contract.sites, pool)
    for site, store in zip(contract.sites, stores, strict=True):
        for each in (store, *feature_stores(run, settings, site, pool).values()):
            fill(each, settings.name, random)
    AskingRecord.begin(run / "asking.json", 1.0).end(run / "asking.json", {})
    return run


def arguments_too(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's own options."""
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)


def main() -> None:
    """Do the job in a process of its own, and show what it took."""
    arguments = options(__doc__, arguments_too)
    if arguments.run is not None:
        with Reporter() as reporter:
            Job.open(arguments.run, reporter).do(None, submission=1.0)  # type: ignore[arg-type]  # nobody is asked
        print(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))
        return
    samples = 2_000 if arguments.quick else 200_000
    with tempfile.TemporaryDirectory() as name:
        run = prepare(Path(name), samples)
        held = sum(path.stat().st_size for path in (run / "answers").rglob("*.bin"))
        began = time.perf_counter()
        command = [sys.executable, __file__, "--run", str(run)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        seconds, peak = time.perf_counter() - began, 1024 * int(done.stdout.split()[-2])
    figures = {"samples": samples, "answers_bytes": held, "peak_bytes": peak, "bar_bytes": BAR, "seconds": seconds}
    show(
        f"A job's stages after asking: {samples:,} samples, {len(CLASSES)} sites, one tap of {VALUES} values",
        ("bytes of answers", "peak of memory, GB", "bar, GB", "seconds"),
        [(f"{held:,}", peak / 1e9, BAR / 1e9, seconds)],
        figures,
        arguments.json,
    )
    if not arguments.quick and peak > BAR:
        sys.exit(f"The peak is {peak / 1e9:.2f} GB, above {BAR / 1e9:g}")


if __name__ == "__main__":
    main()
