"""Scores for "this image is of one of my classes", to be compared with a network's coverage (used by coverage.py).

Largest probability and energy (Liu et al., NeurIPS 2020) of a teacher's outputs, Mahalanobis distance on its features
(Lee et al., NeurIPS 2018), and the density ratio on its features by KuLSIF (Kanamori et al., Machine Learning 2012),
which is how Selective-FD (Shao et al., Nature Communications 2024) selects; and coverage by the other families. A
higher score means more like mine.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from torch import nn

from consilience.client.coverage import load_coverage
from consilience.client.coverage.learning import learn_coverage
from consilience.client.teacher import TrainedTeacher
from consilience.common.data import open_data
from consilience.common.files import read_json
from consilience.common.nets import build, load_model, scores
from consilience.common.pool import Pool
from consilience.common.preprocessing import Images
from consilience.common.settings import SiteSettings
from consilience.common.settings_file import load_settings

Floats = NDArray[np.float64]
NAMES = ("largest probability", "energy", "mahalanobis", "density ratio (KuLSIF)")
FAMILIES = ("features", "outputs")
MOST = 2_000
"""Samples of either kind that the density ratio is fitted on: its time grows with their cube."""


def score_pool(path: Path, seed: int) -> dict[str, Floats]:
    """Return each baseline's scores (n,) of the pool, for the trained site whose site.yaml is at `path`."""
    settings = load_settings(path, SiteSettings)
    folder = settings.state / "teacher"
    record = TrainedTeacher.model_validate(read_json(folder / "teacher.json"))
    channels = record.preprocessing.channels or 1
    model = build(record.architecture, classes=len(record.classes), channels=channels, seed=0)
    load_model(folder / "model.safetensors", model)
    assert settings.data is not None
    data, pool = open_data(settings.data), Pool.open(settings.pools[0])
    present = np.unique(data.need_labels("the site's data"))
    labels = np.searchsorted(present, data.need_labels("the site's data"))
    _, mine = outputs(model, data.read(), record)
    logits, features = outputs(model, pool.read(0, len(pool)), record)
    shifted = logits - logits.max(axis=1, keepdims=True)
    largest = 1 / np.exp(shifted).sum(axis=1)
    return {
        "largest probability": largest,
        "energy": np.logaddexp.reduce(logits, axis=1),
        "mahalanobis": mahalanobis(mine, labels, features),
        "density ratio (KuLSIF)": density_ratio(mine, features, np.random.default_rng(seed)),
    }


def score_by_family(path: Path, family: str) -> Floats | None:
    """Return coverage (n,) of the pool by `family`, for the trained site whose site.yaml is at `path`.

    None where the site abstains.
    """
    settings = load_settings(path, SiteSettings)
    state = path.parent / f"state-{family}"
    shutil.copytree(settings.state, state, ignore=shutil.ignore_patterns("coverage"), dirs_exist_ok=True)
    chosen = settings.coverage.model_copy(update={"family": family})
    settings = settings.model_copy(update={"state": state, "coverage": chosen})
    learn_coverage(settings)
    coverage, pool = load_coverage(settings), Pool.open(settings.pools[0])
    if coverage is None:
        return None
    size = settings.batch_size
    parts = [coverage.scores(pool.read(at, min(at + size, len(pool)))) for at in range(0, len(pool), size)]
    return np.concatenate(parts).astype(np.float64)


def outputs(model: nn.Module, images: Images, record: TrainedTeacher) -> tuple[Floats, Floats]:
    """Return logits (n, K) and what the last linear layer is fed, (n, D)."""
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    held: list[torch.Tensor] = []
    hook = last.register_forward_pre_hook(lambda _, given: held.append(given[0].detach().float().cpu()))
    logits = scores(model, images, record.preprocessing)
    hook.remove()
    return logits.astype(np.float64), torch.cat(held).numpy().astype(np.float64)


def mahalanobis(mine: Floats, labels: NDArray[np.int64], features: Floats) -> Floats:
    """Return minus the squared distance to the nearest class mean, under one covariance for all classes."""
    means = np.stack([mine[labels == k].mean(axis=0) for k in range(labels.max() + 1)])
    centred = mine - means[labels]
    precision = np.linalg.pinv(centred.T @ centred / len(mine))
    root = np.linalg.cholesky(precision + 1e-12 * np.eye(len(precision)))
    nearest: Floats = cdist(features @ root, means @ root, "sqeuclidean").min(axis=1)
    return -nearest


def density_ratio(mine: Floats, features: Floats, random: np.random.Generator) -> Floats:
    """Return p(x | private) / p(x | pool) up to a constant: Gaussian kernel of median width, lambda = n^-0.9."""
    ours = mine[random.permutation(len(mine))[:MOST]]
    pool = features[random.permutation(len(features))[:MOST]]
    scale = 1 / np.median(cdist(pool[:500], ours[:500], "sqeuclidean"))

    def kernel(one: Floats, two: Floats) -> Floats:
        return np.asarray(np.exp(-scale * cdist(one, two, "sqeuclidean")))

    n, m = len(ours), len(pool)
    smooth = min(n, m) ** -0.9
    given = -kernel(pool, ours).sum(axis=1) / (m * n * smooth)
    alpha = np.linalg.solve(kernel(pool, pool) / m + smooth * np.eye(m), given)
    return np.asarray(kernel(features, pool) @ alpha + kernel(features, ours).sum(axis=1) / (n * smooth))
