"""The unify stage: answers from the stores to unified soft labels on disk, block by block.

Lives here: streaming, what of the settings goes into the unifier, and diagnostics. Does not live here: the
mathematics (server/unify). Nothing of size samples x classes is held in memory.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from consilience.common.files import canonical_json, create_array, read_json, sha256, write_json
from consilience.common.labels import LabelSpace
from consilience.common.progress import Reporter
from consilience.common.protocol import SiteCard
from consilience.common.settings import Unify
from consilience.server.answers import AnswerStore
from consilience.server.unify import Prior, Unifier

BLOCK_VALUES = 2**21
"""Label values (samples x classes) unified at a time."""


class Diagnostics(BaseModel):
    """How unification went over a pool."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str
    samples: int
    seconds: float
    not_converged: int
    largest_residual: float
    mean_iterations: float


def block_size(space: LabelSpace) -> int:
    """Return how many samples make a block."""
    return max(1, BLOCK_VALUES // len(space))


def blocks(stores: Sequence[AnswerStore], size: int) -> Iterator[tuple[int, list[NDArray[np.float32]]]]:
    """Yield (start, one (b, k_i) block of log-probabilities a site), in order of samples."""
    total = stores[0].about.size
    for start in range(0, total, size):
        stop = min(start + size, total)
        yield start, [store.read(start, stop) for store in stores]


def unifier(space: LabelSpace, settings: Unify, cards: Sequence[SiteCard]) -> Unifier:
    """Build the unifier that the job's settings describe."""
    prior = None
    if settings.prior_correction:
        target = np.full(len(space), 1 / len(space))
        known = [
            np.asarray(card.class_priors) if card.class_priors is not None else target[list(classes)]
            for card, classes in zip(cards, space.class_sets, strict=True)
        ]
        prior = Prior(target, known)
    return Unifier(
        space.class_sets,
        len(space),
        method=settings.method,
        weights=[settings.weights.get(site, 1.0) for site in space.sites],
        temperature=settings.temperature,
        prior=prior,
        across=settings.across,
    )


def unify_pool(
    folder: Path,
    space: LabelSpace,
    stores: Sequence[AnswerStore],
    cards: Sequence[SiteCard],
    settings: Unify,
    reporter: Reporter,
) -> tuple[NDArray[np.float32], Diagnostics]:
    """Write `folder`/q.npy, (n, L) float32 memory-mapped, unless it is there for the same answers and settings.

    Returns the labels and the diagnostics. Raises `UnifyError`, `StorageError`.
    """
    key = sha256(
        canonical_json(
            {
                "settings": settings.model_dump(mode="json"),
                "labels": space.names,
                "stores": [store.about.model_dump(mode="json") for store in stores],
            }
        )
    )
    path, notes = folder / "q.npy", folder / "diagnostics.json"
    if notes.exists() and path.exists():
        done = Diagnostics.model_validate(read_json(notes))
        if done.key == key:
            return np.load(path, mmap_mode="r"), done
        notes.unlink()
    total = stores[0].about.size
    solve = unifier(space, settings, cards)
    labels = create_array(path, np.float32, (total, len(space)))
    began = time.perf_counter()
    failed, largest, steps = 0, 0.0, 0.0
    task = reporter.start("unifying", total)
    for start, answers in blocks(stores, block_size(space)):
        unified = solve(answers)
        stop = start + len(unified.probs)
        labels[start:stop] = unified.probs
        failed += int(np.sum(~unified.converged))
        largest = max(largest, float(np.max(unified.residual, initial=0.0)))
        steps += float(np.sum(np.broadcast_to(unified.iterations, (stop - start,))))
        task.advance(stop - start)
    labels.flush()
    diagnostics = Diagnostics(
        key=key,
        samples=total,
        seconds=time.perf_counter() - began,
        not_converged=failed,
        largest_residual=largest,
        mean_iterations=steps / max(total, 1),
    )
    write_json(notes, diagnostics.model_dump(mode="json"))
    return np.load(path, mmap_mode="r"), diagnostics
