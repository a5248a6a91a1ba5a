"""Sites whose teachers remember what they learned from, or nothing of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from consilience.client.privacy import train_private
from consilience.client.site import Site
from consilience.client.teacher import load_teacher
from consilience.common.data import from_arrays
from consilience.common.pool import Pool
from consilience.common.settings import SiteSettings
from helpers.private_site import settings_of, write_data

LEARNED = {"epochs": 12, "learning_rate": 0.05, "batch_size": 16}
FORGOT = {"epochs": 1, "learning_rate": 1e-4, "batch_size": 64}
NONE = {"mechanism": "none"}

MakeSite = Callable[..., Site]


@pytest.fixture(scope="session")
def make_site(tmp_path_factory: pytest.TempPathFactory) -> MakeSite:
    """make_site(privacy, fit, **raw) gives a trained site of 200 images whose labels only memory can know."""
    made: dict[str, Site] = {}

    def make(privacy: dict[str, Any] = NONE, fit: dict[str, Any] = LEARNED, **raw: Any) -> Site:
        key = repr((privacy, fit, raw))
        if key not in made:
            made[key] = trained(tmp_path_factory.mktemp("site"), privacy, fit, **raw)
        return made[key]

    return make


def trained(folder: Path, privacy: dict[str, Any], fit: dict[str, Any], **raw: Any) -> Site:
    random = np.random.default_rng(11)
    labels = random.choice(3, 200, p=[0.6, 0.3, 0.1])
    write_data(folder, random.integers(0, 256, (200, 8, 8, 1), np.uint8), labels)
    pixels = random.integers(0, 256, (60, 8, 8, 1), np.uint8)
    Pool.build(from_arrays(pixels, None, (), where="test"), folder / "pool")
    teacher = {"holdout": 0.4, **raw.pop("teacher", {})}
    settings: SiteSettings = settings_of(folder, privacy, fit=fit, pools=["pool"], teacher=teacher, **raw)
    train_private(settings)
    return Site(settings, load_teacher(settings))
