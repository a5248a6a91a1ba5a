"""Random problems that several test modules share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Problem:
    """`samples` rows of logits per site over connected class sets, and the truth they came from."""

    logits: list[FloatArray]
    class_sets: list[NDArray[np.int64]]
    num_classes: int
    weights: FloatArray
    truth: FloatArray

    @property
    def probs(self) -> list[FloatArray]:
        """Each site's probabilities."""
        return [softmax(values) for values in self.logits]


def softmax(logits: FloatArray) -> FloatArray:
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def connected(class_sets: list[NDArray[np.int64]]) -> bool:
    """Whether no classes are apart, by growing a set."""
    reached, rest = set(class_sets[0].tolist()), [set(s.tolist()) for s in class_sets[1:]]
    while rest:
        joined = [s for s in rest if s & reached]
        if not joined:
            return False
        reached.update(*joined)
        rest = [s for s in rest if not s & reached]
    return True


def draw_problem(
    seed: int,
    samples: int = 1,
    *,
    noise: float | None = None,
    scale: float | None = None,
    chain: bool | None = None,
    smallest_set: int = 2,
) -> Problem:
    """Draw 2 to 6 sites over 3 to 12 classes: random sets or a chain, with or without noise, weights, sharpness."""
    random = np.random.default_rng(seed)
    level = float(random.choice([0.0, 0.1, 0.5, 1.0])) if noise is None else noise
    spread = float(random.choice([0.5, 1.5, 2.5])) if scale is None else scale
    chain = bool(random.random() < 0.2) if chain is None else chain
    while True:
        sites, classes = int(random.integers(2, 7)), int(random.integers(3, 13))
        if chain:
            sets = [np.arange(i, i + 2) for i in range(sites)]
        else:
            low = min(smallest_set, classes)
            sizes = random.integers(low, max(low, min(classes, 6)) + 1, sites)
            sets = [random.choice(classes, size, replace=False) for size in sizes]
        if connected(sets):
            break
    used = np.unique(np.concatenate(sets))
    sets = [np.searchsorted(used, s) for s in sets]
    truth = spread * random.normal(size=(samples, used.size))
    logits = [truth[:, s] + level * random.normal(size=(samples, s.size)) for s in sets]
    weights = np.exp(random.normal(0, 0.5, sites)) if random.random() < 0.5 else np.ones(sites)
    return Problem(logits, sets, used.size, weights, softmax(truth))


@pytest.fixture(scope="session")
def draw() -> Callable[..., Problem]:
    """`draw_problem`."""
    return draw_problem
