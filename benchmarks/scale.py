"""Claim: unifying a million samples takes 2.5 times as long as reading their answers and writing their labels.

10 sites that know 300 of 1,000 classes each (100 of them its own, the others drawn), 1,000,000 samples, answers in f16
as a run's answer stores hold them; written are labels/q.npy, (n, L) float32, and its diagnostics, by the unify stage of
a job. In the same run: the time of reading the same files once and writing a file as large as q.npy once, in pieces of
4 MiB. Both begin with nothing in the disk's cache, end when the disk has everything, and are processes of their own,
which tell their largest resident size; they take turns, `--rounds` times. Answers are those of noisy but consistent
teachers, 8,192 different samples again and again, which changes nothing for either.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from consilience.common.encoding import encode
from consilience.common.files import RowWriter, create_array
from consilience.common.labels import LabelSpace
from consilience.common.progress import Reporter
from consilience.common.protocol import Answer, Question
from consilience.common.settings import Unify
from consilience.server.answers import About, AnswerStore
from consilience.server.labelling import unify_pool
from harness import options, show

SITES, CLASSES, KNOWN = 10, 1000, 300
RECORD, PIECE = 8192, 2**22
TIMES, MEMORY = 2.5, 3e9


def class_sets(sites: int, classes: int, known: int) -> list[NDArray[np.int64]]:
    """Return a set a site; every class is known to one site at least."""
    random, own = np.random.default_rng(0), []
    for part in np.array_split(random.permutation(classes), sites):
        others = np.setdiff1d(np.arange(classes), part)
        own.append(np.sort(np.concatenate([part, random.choice(others, known - len(part), replace=False)])))
    return own


def space_of(sets: list[NDArray[np.int64]], classes: int) -> LabelSpace:
    """Return the label space of class sets."""
    names = [f"class-{k}" for k in range(classes)]
    return LabelSpace.build({f"site-{i:02}": [names[k] for k in s] for i, s in enumerate(sets)}, order=names)


def store_of(folder: Path, space: LabelSpace, site: int, samples: int) -> AnswerStore:
    """Open a site's store."""
    name = space.sites[site]
    about = About(
        site=name,
        pool="0" * 64,
        size=samples,
        teacher="0" * 64,
        policy="0" * 16,
        encoding="f16",
        classes=len(space.class_sets[site]),
    )
    return AnswerStore(folder / "answers" / name, about)


def fill(folder: Path, space: LabelSpace, samples: int) -> None:
    """Answer everything, record by record."""
    random = np.random.default_rng(1)
    truth = random.normal(0.0, 2.5, (min(RECORD, samples), len(space))).astype(np.float32)
    for site, columns in enumerate(space.class_sets):
        logits = truth[:, columns] + 0.5 * random.standard_normal((len(truth), len(columns)), np.float32)
        data = encode(log_softmax(logits, axis=1).astype(np.float32), "f16")
        store = store_of(folder, space, site, samples)
        width = store.about.row_bytes
        named = store.about.model_dump(include={"pool", "kind", "encoding", "teacher", "policy"})
        for start in range(0, samples, RECORD):
            stop = min(start + RECORD, samples)
            question = Question(job="scale", start=start, stop=stop, **named)
            store.append(Answer(question, data[: (stop - start) * width], 0.0))


def forget(folder: Path) -> None:
    """Take a folder's files out of the disk's cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def just_files(folder: Path, samples: int) -> None:
    """Read every answer and write as much as there will be of labels."""
    for path in sorted((folder / "answers").rglob("answers.bin")):
        with path.open("rb", buffering=0) as file:
            while file.read(PIECE):
                pass
    path = folder / "written" / "q.npy"
    array = create_array(path, np.float32, (samples, CLASSES))
    writer, rows = RowWriter(path, array), PIECE // (4 * CLASSES)
    block = np.full((rows, CLASSES), 1 / CLASSES, np.float32)
    for start in range(0, samples, rows):
        ids = np.arange(start, min(start + rows, samples))
        writer.put(ids, block[: len(ids)])
    writer.close()


def serve(kind: str, folder: Path, samples: int) -> None:
    """Do one of the two, and print what it took."""
    space = space_of(class_sets(SITES, CLASSES, KNOWN), CLASSES)
    told: dict[str, Any] = {}
    began, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    if kind == "files":
        just_files(folder, samples)
    else:
        stores = [store_of(folder, space, site, samples) for site in range(SITES)]
        with Reporter(quiet=True) as reporter:
            _, notes = unify_pool(folder / "labels", space, stores, (), Unify(), reporter)
        told = {"not_converged": notes.not_converged, "steps": notes.mean_iterations}
    told["seconds"], done = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    told["user"], told["system"] = done.ru_utime - used.ru_utime, done.ru_stime - used.ru_stime
    print(json.dumps({**told, "memory": done.ru_maxrss * 1024}))


def measured(kind: str, folder: Path, samples: int, threads: int) -> dict[str, Any]:
    """Do one of the two in a process of its own, with an empty cache, and remove what it wrote."""
    forget(folder)
    command = [sys.executable, __file__, "--serve", kind, "--folder", str(folder), "--samples", str(samples)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    for path in ("labels/q.npy", "labels/diagnostics.json", "written/q.npy"):
        (folder / path).unlink(missing_ok=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def arguments_too(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's own options."""
    parser.add_argument("--samples", type=int, help="default 1,000,000, which takes 14 GB of disk")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each row")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where there is room; by default the temporary folder")
    parser.add_argument("--serve", choices=("files", "unify"), help=argparse.SUPPRESS)


def main() -> None:
    """Measure both, and show them."""
    given = options(__doc__, arguments_too)
    samples = given.samples or (2_000 if given.quick else 1_000_000)
    if given.serve:
        serve(given.serve, given.folder, samples)
        return
    found: dict[str, list[dict[str, Any]]] = {"files": [], "unify": []}
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        fill(folder, space_of(class_sets(SITES, CLASSES, KNOWN), CLASSES), samples)
        for _ in range(1 if given.quick else given.rounds):
            for kind, held in found.items():
                held.append(measured(kind, folder, samples, given.threads))
    seconds = {kind: median(each["seconds"] for each in held) for kind, held in found.items()}
    times = [ours["seconds"] / plain["seconds"] for plain, ours in zip(*found.values(), strict=True)]
    memory = max(each["memory"] for each in found["unify"])
    rows = [
        (
            what,
            seconds[kind],
            " ".join(f"{each['seconds']:.1f}" for each in found[kind]),
            median(each["user"] for each in found[kind]),
            median(each["system"] for each in found[kind]),
            max(each["memory"] for each in found[kind]) / 1e9,
        )
        for kind, what in (("files", "read answers, write q"), ("unify", "unify"))
    ]
    columns = ("", "seconds", "each", "processor, s", "in the kernel, s", "peak memory, GB")
    title = f"{samples:,} samples, {SITES} sites x {KNOWN} of {CLASSES:,} classes, {given.threads} threads"
    show(title, columns, rows, {"samples": samples, "rows": found, "times": times}, given.json)
    print(f"times: {' '.join(f'{each:.2f}' for each in times)}", file=sys.stderr)
    if not given.quick and (median(times) > TIMES or memory > MEMORY):
        sys.exit(1)


if __name__ == "__main__":
    main()
