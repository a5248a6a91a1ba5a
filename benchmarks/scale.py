"""Claims: unifying a million samples takes at most 2.5 times as long as reading answers and writing labels, and 3 GB;
100,000 classes take time in proportion to samples, and 2 GB.

First table. 10 sites that know 300 of 1,000 classes each (100 of them its own, the others drawn), 1,000,000 samples,
answers in f16 as a run's answer stores hold them; written are labels/q.npy, (n, L) float32, and its diagnostics, by the
unify stage of a job. In the same run: the time of reading the same files once and writing a file as large as q.npy
once, in pieces of 4 MiB. Both begin with nothing in the disk's cache, end when the disk has everything, and are
processes of their own, which tell their largest resident size; they take turns, `--rounds` times. Answers are those of
noisy but consistent teachers, 8,192 different samples again and again, which changes nothing for either.

Second table. 20 sites that know 10,000 of 100,000 classes each, in 200 groups of 500 (10 of its own, 10 of others),
50,000 samples and parts of them, the 100 largest classes of each answer with what the others have together (top-100);
written are the 100 likeliest classes of each label, as for a student of knowledge concentration. No row over all
classes is made on the way. Sizes are processes of their own.
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
from consilience.server.answers import AnswerStore
from consilience.server.answers_about import About
from consilience.server.labelling import unify_pool
from consilience.server.labelling_top import unify_pool_top
from harness import options, show, write

SITES, CLASSES, KNOWN = 10, 1000, 300
RECORD, PIECE = 8192, 2**22
TIMES, MEMORY = 2.5, 3e9
MANY_SITES, MANY_CLASSES, GROUP, SENT, KEPT, MANY_MEMORY = 20, 100_000, 500, 100, 100, 2e9


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


def many_space(classes: int) -> LabelSpace:
    """Return the label space of the second table: sites know whole groups of classes."""
    random, groups = np.random.default_rng(0), classes // GROUP
    parts, sets = np.array_split(random.permutation(groups), MANY_SITES), []
    for site, part in enumerate(parts):
        shared = parts[(site + 1) % MANY_SITES][:1]  # with the next one, so that all sites hang together
        others = random.permutation(np.setdiff1d(np.arange(groups), np.concatenate([part, shared])))
        sets.append(np.sort(np.concatenate([part, shared, others])[: max(groups // 10, len(part) + 1)]))
    return space_of([np.concatenate([np.arange(GROUP * g, GROUP * (g + 1)) for g in s]) for s in sets], classes)


def fill_many(folder: Path, space: LabelSpace, samples: int) -> None:
    """Answer everything as top-K: a few classes that are likely at each site, and noise."""
    random = np.random.default_rng(2)
    for site in range(MANY_SITES):
        store = store_of(folder, space, site, samples, f"top-{SENT}")
        known = store.about.classes
        logits = random.standard_normal((min(512, samples), known), np.float32)
        likely = random.integers(known, size=(len(logits), 40))
        np.put_along_axis(logits, likely, random.normal(6.0, 2.0, likely.shape).astype(np.float32), axis=1)
        append_all(store, encode(log_softmax(logits, axis=1).astype(np.float32), f"top-{SENT}"))


def append_all(store: AnswerStore, data: bytes) -> None:
    """Answer everything by the rows of `data`, again and again."""
    named = store.about.model_dump(include={"pool", "kind", "encoding", "teacher", "policy"})
    width = store.about.row_bytes
    step = len(data) // width
    for start in range(0, store.about.size, step):
        stop = min(start + step, store.about.size)
        question = Question(job="scale", start=start, stop=stop, **named)
        store.append(Answer(question, data[: (stop - start) * width], 0.0))


def store_of(folder: Path, space: LabelSpace, site: int, samples: int, encoding: Any = "f16") -> AnswerStore:
    """Open a site's store."""
    name = space.sites[site]
    about = About(
        site=name,
        pool="0" * 64,
        size=samples,
        teacher="0" * 64,
        policy="0" * 16,
        encoding=encoding,
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
        append_all(store_of(folder, space, site, samples), data)


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


def serve(kind: str, folder: Path, samples: int, classes: int) -> None:
    """Do one of these, and print what it took."""
    space = many_space(classes) if kind == "top" else space_of(class_sets(SITES, CLASSES, KNOWN), CLASSES)
    told: dict[str, Any] = {}
    began, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    if kind == "files":
        just_files(folder, samples)
    elif kind == "top":
        stores = [store_of(folder, space, site, samples, f"top-{SENT}") for site in range(MANY_SITES)]
        with Reporter(quiet=True) as reporter:
            _, notes = unify_pool_top(folder / "labels", space, stores, Unify(), KEPT, reporter)
        told = {"not_converged": notes.not_converged, "steps": notes.mean_iterations, "unifying": notes.seconds}
    else:
        stores = [store_of(folder, space, site, samples) for site in range(SITES)]
        with Reporter(quiet=True) as reporter:
            _, notes = unify_pool(folder / "labels", space, stores, (), Unify(), reporter)
        told = {"not_converged": notes.not_converged, "steps": notes.mean_iterations}
    told["seconds"], done = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    told["user"], told["system"] = done.ru_utime - used.ru_utime, done.ru_stime - used.ru_stime
    print(json.dumps({**told, "memory": done.ru_maxrss * 1024}))


def measured(kind: str, folder: Path, samples: int, threads: int, classes: int = 0) -> dict[str, Any]:
    """Do one of these in a process of its own, with an empty cache, and remove what it wrote."""
    forget(folder)
    command = [sys.executable, __file__, "--serve", kind, "--folder", str(folder), "--samples", str(samples)]
    command += ["--classes", str(classes)]
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
    parser.add_argument("--table", choices=("files", "classes"), help="this table alone")
    parser.add_argument("--classes", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--serve", choices=("files", "unify", "top"), help=argparse.SUPPRESS)


def against_files(given: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """Measure the first table and show it; returns its figures, and whether the bars are met."""
    samples = given.samples or (2_000 if given.quick else 1_000_000)
    found: dict[str, list[dict[str, Any]]] = {"files": [], "unify": []}
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        fill(folder, space_of(class_sets(SITES, CLASSES, KNOWN), CLASSES), samples)
        for _ in range(1 if given.quick else given.rounds):
            for kind, held in found.items():
                held.append(measured(kind, folder, samples, given.threads))
    pairs = list(zip(*found.values(), strict=True))
    times = [ours["seconds"] / plain["seconds"] for plain, ours in pairs]
    used = [(ours["user"] + ours["system"]) / (plain["user"] + plain["system"]) for plain, ours in pairs]
    memory = max(each["memory"] for each in found["unify"])
    rows = [
        (
            what,
            median(each["seconds"] for each in found[kind]),
            " ".join(f"{each['seconds']:.1f}" for each in found[kind]),
            median(each["user"] for each in found[kind]),
            median(each["system"] for each in found[kind]),
            max(each["memory"] for each in found[kind]) / 1e9,
        )
        for kind, what in (("files", "read answers, write q"), ("unify", "unify"))
    ]
    rows.append(("times", median(times), " ".join(f"{each:.2f}" for each in times), median(used), "", ""))
    columns = ("", "seconds", "each", "processor, s", "in the kernel, s", "peak memory, GB")
    title = f"{samples:,} samples, {SITES} sites x {KNOWN} of {CLASSES:,} classes, {given.threads} threads"
    show(title, columns, rows, {}, None)
    figures = {"samples": samples, "rows": found, "times": times, "processor_times": used}
    return figures, median(times) <= TIMES and memory <= MEMORY


def many_classes(given: argparse.Namespace) -> tuple[list[dict[str, Any]], bool]:
    """Measure the second table and show it; returns its rows, and whether the bar of memory is met."""
    classes, most = (10_000, 400) if given.quick else (MANY_CLASSES, 50_000)
    found = []
    for samples in (most,) if given.quick else (most // 4, most // 2, most):
        with tempfile.TemporaryDirectory(dir=given.folder) as name:
            fill_many(Path(name), many_space(classes), samples)
            found.append({"samples": samples, **measured("top", Path(name), samples, given.threads, classes)})
    rows = [
        (
            f"{each['samples']:,}",
            each["seconds"],
            1e6 * each["unifying"] / each["samples"],
            each["user"] + each["system"],
            each["memory"] / 1e9,
        )
        for each in found
    ]
    columns = ("samples", "seconds", "microseconds a sample", "processor, s", "peak memory, GB")
    title = f"{MANY_SITES} sites x {classes // 10:,} of {classes:,} classes, top-{SENT}, {given.threads} threads"
    show(title, columns, rows, {}, None)
    return found, max(each["memory"] for each in found) <= MANY_MEMORY


def main() -> None:
    """Measure both tables, and show them."""
    given = options(__doc__, arguments_too)
    if given.serve:
        serve(given.serve, given.folder, given.samples, given.classes)
        return
    figures: dict[str, Any] = {"threads": given.threads}
    met = True
    if given.table != "classes":
        figures["files"], good = against_files(given)
        met = met and good
    if given.table != "files":
        figures["classes"], good = many_classes(given)
        met = met and good
    if given.json:
        write(figures, given.json)
    if not given.quick and not met:
        sys.exit(1)


if __name__ == "__main__":
    main()
