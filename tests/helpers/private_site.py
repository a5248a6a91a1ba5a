"""Tiny private data of three kinds, and the settings of a site that protects them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from consilience.common.identity import write_secret
from consilience.common.settings import SiteSettings
from consilience.common.settings_file import parse_settings

FIT = {"epochs": 15, "batch_size": 8, "learning_rate": 0.05, "augment": False, "precision": "f32"}
Make = Callable[..., SiteSettings]


def bars(count: int, seed: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Images (count, 16, 16, 1) uint8 with a bar left, in the middle or right, and their labels."""
    random = np.random.default_rng(seed)
    images, labels = random.integers(0, 120, (count, 16, 16, 1), np.uint8), np.arange(count) % 3
    for image, label in zip(images, labels, strict=True):
        image[:, 1 + 5 * label : 5 + 5 * label] += np.uint8(50 + 40 * label)
    return images, labels


def settings_of(
    folder: Path, privacy: dict[str, Any], *, fit: dict[str, Any] | None = None, **raw: Any
) -> SiteSettings:
    """Return settings whose private data are folder/private.npz."""
    teacher = {"kind": "train", "architecture": "cnn3", "fit": FIT | (fit or {}), "holdout": 0.2}
    whole = {
        "name": "site-1",
        "data": {"kind": "npz", "path": "private.npz"},
        "teacher": teacher | raw.pop("teacher", {}),
        "calibration": "off",
        "privacy": privacy,
        **raw,
    }
    return parse_settings(whole, SiteSettings, source="site.yaml", folder=folder)


def write_data(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """Write what `settings_of` names, and a secret that is the same at every run of a test."""
    secret = folder / "state" / "privacy" / "noise.key"
    if not secret.exists():
        write_secret(secret, bytes(range(32)))
    np.savez(folder / "private.npz", x=images, y=labels, names=np.array(["left", "middle", "right"]))
