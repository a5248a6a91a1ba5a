"""Tiny images of three kinds, and site settings for a teacher of any kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from consilience.common.settings import SiteSettings
from consilience.common.settings_file import parse_settings

CLASSES = ("left", "middle", "right")


@pytest.fixture(scope="session")
def blobs() -> tuple[np.ndarray, np.ndarray]:
    """Images (60, 16, 16, 1) uint8 with a bar left, brighter in the middle, brightest right, and their labels."""
    random = np.random.default_rng(5)
    images = random.integers(0, 120, (60, 16, 16, 1), np.uint8)
    labels = np.arange(60) % 3
    for image, label in zip(images, labels, strict=True):
        image[:, 1 + 5 * label : 5 + 5 * label] += np.uint8(50 + 40 * label)
    return images, labels


@pytest.fixture
def site(tmp_path: Path) -> Callable[..., SiteSettings]:
    """site(kind=..., ...) gives site settings with that teacher; classes and preprocessing have defaults."""

    def make(*, seed: int = 0, data: dict[str, Any] | None = None, **teacher: Any) -> SiteSettings:
        hosted = {} if teacher["kind"] == "train" else {"classes": CLASSES, "preprocessing": {"channels": 1}}
        raw = {"name": "site-1", "seed": seed, "teacher": hosted | teacher}
        return parse_settings(raw | ({"data": data} if data else {}), SiteSettings, source="test", folder=tmp_path)

    return make


@pytest.fixture
def network() -> nn.Module:
    """A small network for (n, 1, 16, 16) with batch statistics that evaluation mode must use, not the batch's."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)
        )
        module(torch.randn(8, 1, 16, 16) * 2 + 1)
    return module.eval()
