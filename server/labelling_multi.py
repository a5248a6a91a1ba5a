"""The unify stage of multi-label sites: answers from the stores to soft labels on disk, block by block.

Lives here: streaming. Does not live here: the mathematics (server/unify/multi), what is shared with single-label sites
(server/labelling). Nothing of size samples x labels is held in memory.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from consilience.common.files import create_array, write_json
from consilience.common.labels import LabelSpace
from consilience.common.progress import Reporter
from consilience.common.settings import Unify
from consilience.server.answered import CoverageStores, Usable, block_size, blocks, usable
from consilience.server.answers import AnswerStore
from consilience.server.labelling import Diagnostics, done_before, labels_key
from consilience.server.unify.multi import UnifiedLabels, unify_labels


def unify_block(
    space: LabelSpace,
    settings: Unify,
    sites: Sequence[int],
    answers: Sequence[NDArray[np.float32]],
    coverage: Sequence[NDArray[np.float32] | None],
) -> UnifiedLabels:
    """Unify the log-odds (b, k_i) of the sites at `sites`, with the coverage (b,) of those that give it."""
    names = [space.sites[i] for i in sites]
    return unify_labels(
        answers,
        [space.class_sets[i] for i in sites],
        len(space),
        weights=[settings.weights.get(name, 1.0) for name in names],
        coverage=coverage,
        strength=[settings.strength_of(name) for name in names],
        temperature=settings.temperature,
    )


def unify_pool_labels(
    folder: Path,
    space: LabelSpace,
    stores: Sequence[AnswerStore],
    settings: Unify,
    reporter: Reporter,
    samples: Usable | None = None,
    coverage: CoverageStores | None = None,
    seed: int = 0,
) -> tuple[NDArray[np.float32], Diagnostics]:
    """Write `folder`/q.npy, (n, L) float32 memory-mapped, unless it is there for the same answers and settings.

    Entry (j, l) is how likely label l applies to sample j, NaN where no site that knows it answered the sample. Returns
    the labels and the diagnostics. Raises `UnifyError`, `StorageError`.
    """
    key = labels_key(space, stores, settings, coverage, seed)
    path, notes = folder / "q.npy", folder / "diagnostics.json"
    if done := done_before(notes, key, path):
        return np.load(path, mmap_mode="r"), done
    samples = samples or usable(stores, space)
    labels = create_array(path, np.float32, (samples.size, len(space)))
    covered = dict.fromkeys((site for site, c in zip(space.sites, coverage or [], strict=False) if c is not None), 0)
    began, spread, entries, lacking = time.perf_counter(), 0.0, 0, 0
    task = reporter.start("unifying", samples.count)
    for low in range(0, samples.size, block_size(space)):
        labels[low : low + block_size(space)] = np.nan
    for block in blocks(stores, block_size(space), coverage):
        answers = [rows for rows in block.answers if rows is not None]
        told = [block.coverage[i] for i in block.sites]
        unified = unify_block(space, settings, block.sites, answers, told)
        labels[block.ids] = unified.probs
        owners = np.bincount([c for i in block.sites for c in space.class_sets[i]], minlength=len(space))
        both = unified.spread[:, owners > 1]
        spread, entries = spread + float(both.sum(dtype=np.float64)), entries + both.size
        lacking += len(block.ids) * int((~unified.answered).sum())
        for i, values in zip(block.sites, told, strict=True):
            if values is not None:
                covered[space.sites[i]] += len(block.ids)
        task.advance(len(block.ids))
    labels.flush()
    diagnostics = Diagnostics(
        key=key,
        samples=samples.count,
        seconds=time.perf_counter() - began,
        not_converged=0,
        largest_residual=0.0,
        mean_iterations=0.0,
        coverage=covered,
        spread=spread / entries if entries else None,
        lacking=lacking,
    )
    write_json(notes, diagnostics.model_dump(mode="json"))
    return np.load(path, mmap_mode="r"), diagnostics
