"""Claim: canaries find out a teacher that nothing protects, and behind a mechanism never more than it is accounted for.

One site: five classes of the embedded Fashion-MNIST, 300 images each, and `cnn3`. 200 of the images become canaries:
each gets a wrong label, and a fair coin says whether the teacher learns it. The teacher answers once about each, as its
answers would leave; from the answers it is guessed which were learned. `overfitted` learns by heart (40 epochs, no
augmentation, no decay), `as usual` as the embedded job does; neither has a mechanism. `pate` has 20 records a part and
noise for epsilon 3 over as many answers as there are canaries, `dp-sgd` noise for epsilon 8. `lower` is what the
guesses refute at 95 % and delta 1e-5, `upper` what the accountant says of the same training and answers.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from consilience.client.audit.canaries import CanaryAudit, audit_canaries
from consilience.client.privacy.plan import alternatives
from consilience.common.data import open_data
from consilience.common.settings import DpSgd, EmbeddedData, Fit, NpzData, Pate, SiteSettings, TrainTeacher
from harness import options, show

CLASSES = 5
EPSILON = {"pate": 3.0, "dp-sgd": 8.0}
USUAL = Fit(epochs=12, precision="f32")
FITS = {
    "overfitted": Fit(epochs=40, augment=False, weight_decay=0.0, precision="f32"),
    "as usual": USUAL,
    "pate": Fit(epochs=30, batch_size=16, precision="f32"),
    "dp-sgd": Fit(epochs=20, batch_size=256, augment=False, precision="f32"),
}


def site(folder: Path, images: int) -> SiteSettings:
    """Write private data of `images` a class into the folder, and return a site's settings."""
    data = open_data(EmbeddedData(kind="embedded"))
    labels = data.need_labels("embedded")
    ids = np.concatenate([np.flatnonzero(labels == k)[:images] for k in range(CLASSES)])
    path = folder / "private.npz"
    np.savez(path, x=data.read(ids), y=labels[ids], names=np.array(data.class_names[:CLASSES]))
    return SiteSettings(
        name="site-1",
        data=NpzData(kind="npz", path=path),
        teacher=TrainTeacher(kind="train", architecture="cnn3", fit=USUAL),
        state=folder / "state",
    )


def variant(bare: SiteSettings, name: str, canaries: int, *, quick: bool) -> SiteSettings:
    """Return the settings of one row."""
    fit = FITS[name].model_copy(update={"epochs": 2}) if quick else FITS[name]
    assert bare.teacher.kind == "train"
    teacher = bare.teacher.model_copy(update={"fit": fit, "holdout": 0.0 if name == "overfitted" else 0.1})
    settings = bare.model_copy(update={"teacher": teacher})
    if name not in EPSILON:
        return settings
    settings = settings.model_copy(update={"calibration": "off"})
    kind: type[Pate | DpSgd] = DpSgd
    if name == "pate":
        records = len(open_data(bare.data).need_labels("private")) if bare.data else 0
        parts = Pate(mechanism="pate", parts=max(2, records // 20), sigma=1.0)
        settings, kind = settings.model_copy(update={"privacy": parts}), Pate
    planned = alternatives(settings, EPSILON[name], canaries)
    chosen = next(one.settings for one in planned if isinstance(one.settings, kind) and not one.configured)
    return settings.model_copy(update={"privacy": chosen})


def row(name: str, found: list[CanaryAudit]) -> tuple[str, ...]:
    """Return one line of the table."""
    uppers = [one.upper for one in found if one.upper is not None]
    lowers = " ".join(f"{one.lower:.2f}" for one in found)
    return (
        name,
        lowers,
        f"{max(uppers):.2f}" if uppers else "none",
        f"{statistics.mean(one.auc for one in found):.3f}",
        " ".join(f"{one.correct}/{one.guesses}" for one in found),
        "" if not uppers else "yes" if all(one.holds for one in found) else "NO",
    )


def arguments_too(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's own options."""
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=sorted(FITS), default=list(FITS))


def main() -> None:
    """Audit every row under every seed."""
    arguments = options(__doc__, arguments_too)
    images, canaries = (30, 20) if arguments.quick else (300, 200)
    found: dict[str, list[CanaryAudit]] = {name: [] for name in arguments.only}
    with tempfile.TemporaryDirectory() as name:
        bare = site(Path(name), images)
        settings = {name: variant(bare, name, canaries, quick=arguments.quick) for name in found}
        for seed in range(1 if arguments.quick else arguments.seeds):
            for name, each in found.items():
                each.append(audit_canaries(settings[name], canaries=canaries, seed=seed))
                print(f"{name}, seed {seed}: {each[-1]}", file=sys.stderr)
    figures: dict[str, Any] = {name: [one.model_dump(mode="json") for one in each] for name, each in found.items()}
    columns = ("", "lower, per seed", "upper", "AUC", "right guesses", "lower <= upper")
    title = f"Epsilon by {canaries} canaries, {arguments.seeds if not arguments.quick else 1} seeds"
    show(title, columns, [row(name, each) for name, each in found.items()], {"audits": figures}, arguments.json)


if __name__ == "__main__":
    main()
