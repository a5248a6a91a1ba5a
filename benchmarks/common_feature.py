"""Claim: a step of common-feature learning takes at most 1.6 times as long as a step of the same student from labels.

Met where vectors meet, missed where maps do; the exit status is that of vectors.

Labels: soft labels as in benchmarks/student.py. Common features: the same, and a common space with two sites' features,
read row by row from their stores: of `penultimate`, vectors of 128 values at the sites, and of the last maps, 64
channels of 8 x 8, whose networks convolve, as they are and averaged to 4 x 4. The same images, order and loop, in f32;
an epoch of each in turn, the order changing. A step's seconds are those of the epoch's record, over its steps.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from consilience.common.cards import TapCard
from consilience.common.encoding import encode_features
from consilience.common.files import sha256
from consilience.common.nets import Loss, build, default_device, train
from consilience.common.nets.tapped import tap_shapes
from consilience.common.preprocessing import Images
from consilience.common.protocol import Answer, Question
from consilience.common.settings import Fit, Preprocessing
from consilience.server.answers import AnswerStore
from consilience.server.answers_about import About
from consilience.server.student.common_feature import Weights
from consilience.server.student.learn_common import CommonLoss, CommonStudent, Space
from consilience.server.student.site_taps import SiteTap
from consilience.server.student.soft_labels import SoftLabels
from harness import options, show

BATCH, SITES, BAR = 64, 2, 1.6
STUDENTS = ("cnn3", "resnet8", "vgg6")
FORMS: dict[str, tuple[tuple[int, ...], int | None]] = {
    "vectors": ((128,), None),
    "maps": ((64, 8, 8), None),
    "maps, size 4": ((64, 8, 8), 4),
}
"""What a site tells, and the size at which maps meet."""
Lesson = Callable[[nn.Module], tuple[nn.Module, Loss]]


def site_tap(folder: Path, site: int, shape: tuple[int, ...], samples: int) -> SiteTap:
    """Return the features of a site, at random, from a store in `folder`."""
    name = f"site-{site}-{len(shape)}"
    card = TapCard(name="tap", layout="", shape=shape, channels=shape[0], fingerprint=sha256(name.encode()))
    named: dict[str, Any] = {"pool": "0" * 64, "teacher": card.fingerprint, "policy": "0" * 16, "encoding": "f16"}
    about = About(site=f"site-{site}", size=samples, kind="features", classes=card.values, **named)
    store = AnswerStore(folder / name, about)
    rows = np.random.default_rng(site).standard_normal((samples, card.values)).astype(np.float32)
    question = Question(job="steps", start=0, stop=samples, kind="features", **named)
    store.append(Answer(question, encode_features(rows, "f16"), 0.0))
    return SiteTap(about.site, card, store)


def lessons(folder: Path, architecture: str, images: Images) -> dict[str, Lesson]:
    """Return what a student may learn from, by name: its model and loss."""
    samples, classes = len(images), 10
    path = folder / "q.npy"
    np.save(path, np.random.default_rng(0).dirichlet(np.ones(classes), samples).astype(np.float32))
    soft = SoftLabels(np.load(path, mmap_mode="r"), default_device())
    shapes = tap_shapes(
        build(architecture, classes=classes, channels=3, seed=0),
        torch.zeros((2, *np.moveaxis(images[:1], 3, 1).shape[1:])),
    )

    def common(kind: str) -> Lesson:
        shape, size = FORMS[kind]
        taps = tuple(site_tap(folder / architecture / kind, site, shape, samples) for site in range(SITES))
        own = [name for name, held in shapes.items() if len(held) == len(shape)][-1]
        space = Space(own, shapes[own], taps, size=size)

        def lesson(network: nn.Module) -> tuple[nn.Module, Loss]:
            whole = CommonStudent(network, [space], Weights(), seed=0)
            return whole, CommonLoss(whole, [space], soft, "", np.arange(samples))

        return lesson

    return {"labels": lambda network: (network, soft), **{kind: common(kind) for kind in FORMS}}


def step_seconds(architecture: str, images: Images, lesson: Lesson) -> float:
    """Return the seconds a step takes, over one epoch."""
    model, loss = lesson(build(architecture, classes=10, channels=3, seed=0))
    fit = Fit.model_validate({"epochs": 1, "batch_size": BATCH, "precision": "f32", "learning_rate": 0.01})
    (record,) = train(model, images, loss, fit, Preprocessing(), seed=0, folder=None)
    return record.seconds / (len(images) // BATCH)


def main() -> None:
    """Time every student, and show the ratios."""
    arguments = options(__doc__)
    samples, pairs = (256, 2) if arguments.quick else (1_920, 7)
    images = np.random.default_rng(0).integers(0, 256, (samples, 32, 32, 3), np.uint8)
    rows, figures = [], {}
    for architecture in STUDENTS[:1] if arguments.quick else STUDENTS:
        with tempfile.TemporaryDirectory() as name:
            ways = lessons(Path(name), architecture, images)
            taken: dict[str, list[float]] = {kind: [] for kind in ways}
            for pair in range(pairs + 1):
                for kind in list(ways)[:: 1 if pair % 2 else -1]:
                    seconds = step_seconds(architecture, images, ways[kind])
                    if pair:  # the first warms up
                        taken[kind].append(seconds)
        ratios = {k: [a / b for a, b in zip(taken[k], taken["labels"], strict=True)] for k in FORMS}
        figures[architecture] = {"labels_ms": 1e3 * min(taken["labels"]), "ratios": ratios}
        told = [f"{statistics.median(r):.2f} ({min(r):.2f} to {max(r):.2f})" for r in ratios.values()]
        rows.append((architecture, f"{1e3 * min(taken['labels']):.1f}", *told))
    title = f"A step of {BATCH} images of 32x32x3 and {SITES} sites' features, to a step from labels; bar: {BAR}"
    show(
        title,
        ("student", "labels, ms (best)", *(f"{k}: ratio (median)" for k in FORMS)),
        rows,
        figures,
        arguments.json,
    )
    slow = [name for name, found in figures.items() if statistics.median(found["ratios"]["vectors"]) > BAR]
    if slow and not arguments.quick:
        sys.exit(f"Above the bar: {', '.join(slow)}")


if __name__ == "__main__":
    main()
