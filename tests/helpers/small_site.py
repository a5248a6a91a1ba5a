"""A site small enough for tests of its policy and ledger, with a teacher that never says the same twice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import log_softmax

from consilience.client.site import Site
from consilience.common.data import from_arrays
from consilience.common.pool import Pool
from consilience.common.protocol import Question
from consilience.common.settings import CallableTeacher, Policy, Preprocessing, SiteSettings

SIZE = 50
CLASSES = ("cat", "dog", "cow")
ROW = 4 * len(CLASSES)
"""Bytes of a sample's f32 answer."""


class Fickle:
    """A teacher whose answers are new each time it is asked; counts the batches it saw."""

    classes, fingerprint = CLASSES, "f" * 64

    def __init__(self) -> None:
        self.random, self.batches = np.random.default_rng(0), 0

    def log_probs(self, images: np.ndarray) -> np.ndarray:
        """Return (n, 3) float32."""
        self.batches += 1
        return np.asarray(log_softmax(self.random.normal(0, 3, (len(images), 3)), axis=1), np.float32)


class Familiar:
    """Coverage of the same kind."""

    fingerprint, description = "e" * 64, "familiarity"

    def __init__(self) -> None:
        self.random = np.random.default_rng(1)

    def scores(self, images: np.ndarray) -> np.ndarray:
        """Return (n,) float32."""
        return np.asarray(self.random.random(len(images)), np.float32)


def make_pool(folder: Path, size: int = SIZE) -> Pool:
    """Build the site's pool in `folder`."""
    pixels = np.random.default_rng(0).integers(0, 256, (size, 2, 2, 3), np.uint8)
    return Pool.build(from_arrays(pixels, None, (), where="test"), folder / "pool")


def make_site(folder: Path, teacher: Any = None, *, more: Sequence[Path] = (), **policy: Any) -> Site:
    """Return the site whose state is in `folder`/state, under a policy; another call is another process's site.

    `more`: folders of pools beside `folder`/pool.
    """
    settings = SiteSettings(
        name="site-1",
        teacher=CallableTeacher(kind="callable", callable="a:b", classes=CLASSES, preprocessing=Preprocessing()),
        pools=(folder / "pool", *more),
        batch_size=16,
        state=folder / "state",
        policy=Policy(**{"precision": "f32", **policy}),
    )
    return Site(settings, teacher or Fickle(), Familiar())


def about(site: Site, pool: Pool, start: int, stop: int, **changes: Any) -> Question:
    """Return a question to the site about its teacher's answers."""
    fields = {"job": "job", "pool": pool.digest, "start": start, "stop": stop, "encoding": "f32"}
    fields |= {"teacher": Fickle.fingerprint, "policy": site.settings.policy.version}
    return Question(**{**fields, **changes})  # type: ignore[arg-type]
