"""Claim: a step of distillation takes at most 1.10 times as long as a supervised step of the same student.

Distillation: soft labels (n, L) float32, a batch's rows read from a memory-mapped file, cross-entropy to them.
Supervised: labels (n,) in memory. The same network, images, order and loop, in f32; one epoch of each in turn, the
first of the two changing. A step's seconds are those of the epoch's record, over its steps.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import numpy as np

from consilience.common.nets import Loss, Supervised, build, default_device, train
from consilience.common.preprocessing import Images
from consilience.common.settings import Fit, Preprocessing
from consilience.server.student.soft_labels import SoftLabels
from harness import options, show

BATCH = 64


def step_seconds(architecture: str, classes: int, images: Images, loss: Loss) -> float:
    """Return the seconds a step takes, over one epoch."""
    model = build(architecture, classes=classes, channels=images.shape[-1], seed=0)
    fit = Fit.model_validate({"epochs": 1, "batch_size": BATCH, "precision": "f32", "learning_rate": 0.01})
    (record,) = train(model, images, loss, fit, Preprocessing(), seed=0, folder=None)
    return record.seconds / (len(images) // BATCH)


def main() -> None:
    arguments = options(__doc__)
    samples, pairs = (256, 2) if arguments.quick else (1_920, 11)
    cases = [("cnn3", 10)] if arguments.quick else [("cnn3", 10), ("cnn3", 100), ("resnet8", 10)]
    rows, figures = [], {}
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (samples, 32, 32, 3), np.uint8)
    with tempfile.TemporaryDirectory() as name:
        for architecture, classes in cases:
            path = Path(name) / f"q-{classes}.npy"
            np.save(path, random.dirichlet(np.ones(classes), samples).astype(np.float32))
            losses: dict[str, Loss] = {
                "supervised": Supervised(random.integers(0, classes, samples), default_device()),
                "soft labels": SoftLabels(np.load(path, mmap_mode="r"), default_device()),
            }
            taken: dict[str, list[float]] = {kind: [] for kind in losses}
            for pair in range(pairs + 1):
                for kind in list(losses)[:: 1 if pair % 2 else -1]:
                    seconds = step_seconds(architecture, classes, images, losses[kind])
                    if pair:  # the first warms up
                        taken[kind].append(seconds)
            ratios = [soft / hard for hard, soft in zip(taken["supervised"], taken["soft labels"], strict=True)]
            case = {
                "supervised_ms": 1e3 * min(taken["supervised"]),
                "soft_labels_ms": 1e3 * min(taken["soft labels"]),
                "ratio": statistics.median(ratios),
                "ratio_lowest": min(ratios),
                "ratio_highest": max(ratios),
            }
            figures[f"{architecture}, {classes} classes"] = case
            rows.append((f"{architecture}, {classes} classes", *case.values()))
    columns = ("student", "supervised ms (best)", "soft labels ms (best)", "ratio (median)", "lowest", "highest")
    title = f"A step of {BATCH} images of 32x32x3, {pairs} pairs of {samples // BATCH} steps; bar: 1.10"
    show(title, columns, rows, figures, arguments.json)


if __name__ == "__main__":
    main()
