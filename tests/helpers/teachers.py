"""Teachers of kind `callable` for tests: fixed probabilities from mean colours, patient or broken ones."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

HOLD = "TEACHER_HOLD"
"""Names a file: while it is there, `fixed` answers once, when it is tried for the contract, and then no more."""
_tried: set[int] = set()
CANARY = "canary-of-an-exception"


def fixed(images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return probabilities of three classes that follow from each image alone."""
    hold = Path(os.environ.get(HOLD, "/nowhere"))
    with suppress(FileNotFoundError):
        made = hold.stat().st_mtime_ns
        if made in _tried:
            while hold.exists():
                time.sleep(0.02)
        _tried.add(made)
    means = images.reshape(len(images), -1).mean(axis=1)
    odds = np.exp(np.stack([means, -means, 0 * means], axis=1) * 5)
    return np.asarray(odds / odds.sum(axis=1, keepdims=True), np.float32)


def crashing(images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Fail with text and a path that nobody else may read."""
    raise RuntimeError(f"{CANARY} {__file__} {images.shape}")
