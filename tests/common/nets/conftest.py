"""Tiny data and networks, on one thread: these are too small for two to help."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

Labelled = tuple[NDArray[np.uint8], NDArray[np.int64]]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def stripes() -> Labelled:
    """90 images of 16x16x1: lying stripes, standing stripes, or none, with noise."""
    random = np.random.default_rng(0)
    labels = np.arange(90) % 3
    wave = np.where(np.arange(16) % 4 < 2, 60, -60)
    patterns = np.stack([np.tile(wave[:, None], (1, 16)), np.tile(wave, (16, 1)), np.zeros((16, 16), int)])
    images = 128 + patterns[labels] + random.normal(0, 20, (90, 16, 16))
    return images.clip(0, 255).astype(np.uint8)[..., None], labels
