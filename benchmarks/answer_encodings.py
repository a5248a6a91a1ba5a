"""Claim: answers in 8 bits cost nothing measurable, and the three largest of five classes next to nothing.

The embedded job's teachers answer once, in f32. Their answers are then encoded, decoded and unified in each encoding,
by `ce` and by `sd`, and the labels compared with the pool's true ones and, for `ce`, with those of f32. The second
table compares steps for bytes: uniform or square, over a reach of R below the row's largest log-probability (or below
0), or in the root of p.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from consilience.common.encoding import decode, encode, row_bytes
from consilience.common.files import read_json
from consilience.common.labels import LabelSpace
from consilience.common.progress import Reporter
from consilience.common.settings import Ask, Fit, JobSettings, Student
from consilience.deploy.simulation import embedded_job, simulate
from consilience.server.answers import AnswerStore
from consilience.server.answers_about import About
from consilience.server.unify import unify
from harness import options, show

ENCODINGS = ("f32", "f16", "u8", "top-3", "top-3-u8", "top-2", "top-1", "top-1-u8", "votes")
Rows = NDArray[np.float64]


def small(job: JobSettings, quick: bool) -> JobSettings:
    """Return the job in f32 with a student that takes no time."""
    student = Student(architecture="cnn3", fit=Fit(epochs=1, precision="f32"))
    job = job.model_copy(update={"ask": Ask(encoding="f32"), "student": student})
    assert job.simulation is not None
    policy = job.simulation.policy.model_copy(update={"precision": "f32"})
    simulation = job.simulation.model_copy(update={"policy": policy})
    if quick:
        teachers = tuple(t.model_copy(update={"fit": student.fit}) for t in simulation.teachers[:1])
        simulation = simulation.model_copy(update={"teachers": teachers, "pool_share": 0.1})
    return job.model_copy(update={"simulation": simulation})


def answered(run: Path) -> tuple[LabelSpace, list[NDArray[np.float32]], NDArray[np.int64]]:
    """Return label space, every site's answers about the pool, and the pool's true labels."""
    report = read_json(run / "report.json")
    contract = read_json(run / "contract.json")
    space = LabelSpace.build({site["name"]: site["classes"] for site in contract["sites"]})
    answers = []
    for site in space.sites:
        folder = run / "answers" / site / report["pool"]["digest"][:12]
        store = AnswerStore(folder, About.model_validate(read_json(folder / "about.json")))
        answers.append(store.read(0, store.about.size))
    with np.load(run / "simulation" / "test.npz") as test:
        known = np.array([space.names.index(str(name)) for name in test["names"]])
    return space, answers, known[np.load(run / "simulation" / "pool-labels.npy")]


def steps(rows: Rows, levels: Rows, *, absolute: bool = False) -> Rows:
    """Return rows whose distance to their largest (to 0 if `absolute`) is the nearest of `levels`, normalised."""
    below = -rows if absolute else rows.max(axis=1, keepdims=True) - rows
    return normalised(-levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, below)])


def roots(rows: Rows) -> Rows:
    """Return rows with the root of each probability in steps of 1/255."""
    return normalised(2 * np.log(np.maximum(np.rint(255 * np.exp(rows / 2)), 0.25) / 255))


def normalised(rows: Rows) -> Rows:
    """Return log-probabilities that sum to 1."""
    return rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))


def main() -> None:
    arguments = options(__doc__)
    with tempfile.TemporaryDirectory() as name, Reporter() as reporter:
        run = Path(name) / "run"
        simulate(small(embedded_job(), arguments.quick), run, reporter)
        space, answers, truth = answered(run)

    figures: dict[str, dict[str, float]] = {}
    exact = unify(answers, space.class_sets, len(space)).probs
    for encoding in ENCODINGS:
        sent = [decode(encode(rows, encoding), len(rows), rows.shape[1], encoding) for rows in answers]
        labels = unify(sent, space.class_sets, len(space)).probs
        mixed = unify(sent, space.class_sets, len(space), method="sd").probs
        figures[encoding] = {
            "bytes": sum(row_bytes(rows.shape[1], encoding) for rows in answers) / len(answers),
            "accuracy": float((labels.argmax(axis=1) == truth).mean()),
            "accuracy_sd": float((mixed.argmax(axis=1) == truth).mean()),
            "as_f32": float((labels.argmax(axis=1) == exact.argmax(axis=1)).mean()),
            "distance": float(np.abs(labels - exact).sum(axis=1).mean() / 2),
        }
    rows = [
        (e, f["bytes"], f"{f['accuracy']:.1%}", f"{f['accuracy_sd']:.1%}", f"{f['as_f32']:.1%}", f"{f['distance']:.4f}")
        for e, f in figures.items()
    ]
    columns = ("encoding", "bytes a sample", "labels right", "by sd", "same class as f32", "distance to f32")
    show(f"Unified labels of {len(truth):,} samples, {len(answers)} sites", columns, rows, {}, None)

    even, squares = np.arange(256) / 255, (np.arange(256) / 255) ** 2
    every = [normalised(rows.astype(np.float64)) for rows in answers]
    tried = {
        "uniform, R = 16 below 0": [steps(rows, 16 * even, absolute=True) for rows in every],
        "uniform, R = 16": [steps(rows, 16 * even) for rows in every],
        "square, R = 16": [steps(rows, 16 * squares) for rows in every],
        "square, R = 24 below 0": [steps(rows, 24 * squares, absolute=True) for rows in every],
        "square, R = 24 (u8)": [steps(rows, 24 * squares) for rows in every],
        "square, R = 32": [steps(rows, 32 * squares) for rows in every],
        "root of p": [roots(rows) for rows in every],
    }
    errors: dict[str, dict[str, float]] = {}
    for name, found in tried.items():
        pairs = list(zip(every, found, strict=True))
        errors[name] = {
            "p": max(float(np.abs(np.exp(a) - np.exp(b)).max()) for a, b in pairs),
            "log_p": max(float(np.abs(a - b)[a > np.log(1e-6)].max()) for a, b in pairs),
            "divergence": float(np.mean([(np.exp(a) * (a - b)).sum(axis=1).mean() for a, b in pairs])),
        }
    rows = [(name, f"{e['p']:.4f}", f"{e['log_p']:.3f}", f"{e['divergence']:.1e}") for name, e in errors.items()]
    columns = ("steps of a byte", "largest error of p", "of log p, p > 1e-6", "mean KL divergence")
    everything = {"encodings": figures, "steps": errors}
    show("Ways to make a byte of a log-probability", columns, rows, everything, arguments.json)


if __name__ == "__main__":
    main()
