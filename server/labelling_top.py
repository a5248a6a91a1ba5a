"""The unify stage where sites send their largest classes and a student learns a few: sparse from site to student.

Lives here: when that is so, and streaming from the stores to the classes that are kept, on disk. Does not live here:
the mathematics (server/unify/top), what is learnt (server/concentration), labels over all classes (server/labelling).
Nothing of samples x classes is written, or held in memory beyond a block.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from consilience.common.encoding import Sent
from consilience.common.errors import UnifyError
from consilience.common.files import RowWriter, canonical_json, create_array, sha256, write_json
from consilience.common.labels import LabelSpace
from consilience.common.progress import Reporter
from consilience.common.settings import JobSettings, Unify, largest_sent
from consilience.server.answered import CoverageStores, Usable, block_size, patterns, read_rows, runs, usable
from consilience.server.answers import AnswerStore
from consilience.server.labelling import Diagnostics, Tally, done_before, labels_key
from consilience.server.labelling_solved import SolvedRows
from consilience.server.solvers import unifier
from consilience.server.student.routing import highest
from consilience.server.student.verticals import kept, verticals_of
from consilience.server.unify import Unifier
from consilience.server.unify.blocks import in_threads
from consilience.server.unify.top import TopLabels, TopUnifier

CLASSES, VALUES, REST = "top-classes.npy", "top-values.npy", "top-rest.npy"


class TopRows:
    """Labels of which the K likeliest classes are kept: `classes` (n, K) int32, `values` and `rest` (n,) float32.

    `rows[ids]` are the labels of a few samples, over all classes, the rest shared out evenly.
    """

    def __init__(self, folder: Path, num_classes: int) -> None:
        self.classes, self.values, self.rest = (np.load(folder / f, mmap_mode="r") for f in (CLASSES, VALUES, REST))
        self.shape = len(self.rest), num_classes

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, ids: Any) -> NDArray[np.float32]:
        classes, values, rest = self.classes[ids], self.values[ids], self.rest[ids]
        out = np.empty((len(classes), self.shape[1]), np.float32)
        out[:] = rest[:, None] / max(self.shape[1] - classes.shape[1], 1)
        np.put_along_axis(out, classes.astype(np.int64), values, axis=1)
        return out


Labels: TypeAlias = NDArray[np.float32] | SolvedRows | TopRows


def classes_kept(job: JobSettings, space: LabelSpace, coverage: CoverageStores) -> int | None:
    """Return how many classes of a label are kept from the start; None where labels are made over all classes.

    They are kept where nothing else is needed: knowledge concentration learns unified labels, by `ce`, of answers as
    `top-K` or `top-K-u8`, without coverage, corrections for priors and doubts of sites, and all sites hang together.
    """
    sent, settings = largest_sent(job.ask.encoding), job.student.concentration
    if job.student.learning != "concentration" or settings.target != "unified" or sent is None or space.multi:
        return None
    if job.unify.method != "ce" or job.unify.prior_correction or job.unify.other or job.unify.robust:
        return None
    if max(space.components) > 0 or any(store is not None for store in coverage):
        return None
    wanted = kept(verticals_of(space, settings, job.labels.synonyms), settings)
    # So many are sent of every sample, so that no place stays empty.
    named = max(min(sent, len(classes)) for classes in space.class_sets)
    return wanted if wanted <= named else None


def top_key(space: LabelSpace, stores: Sequence[AnswerStore], settings: Unify, keep: int) -> str:
    """Return what tells one pool's labels from others, of which `keep` classes are kept."""
    return sha256(canonical_json([labels_key(space, stores, settings), "top", keep]))


def unify_pool_top(
    folder: Path,
    space: LabelSpace,
    stores: Sequence[AnswerStore],
    settings: Unify,
    keep: int,
    reporter: Reporter,
    samples: Usable | None = None,
) -> tuple[TopRows, Diagnostics]:
    """Write `folder`/top-*.npy, `keep` classes a sample, unless they are there for the same answers and settings.

    Where the sites that answered a sample do not hang together, its label is made over all classes first, as by
    `unify_pool`, and `apart` counts it. Raises `UnifyError`, `StorageError`.
    """
    key = top_key(space, stores, settings, keep)
    paths, notes = [folder / name for name in (CLASSES, VALUES, REST)], folder / "diagnostics.json"
    if done := done_before(notes, key, *paths):
        return TopRows(folder, len(space)), done
    samples, total = samples or usable(stores, space), stores[0].about.size
    began, solvers = time.perf_counter(), _Solvers(space, settings)
    shapes = ((np.int32, (total, keep)), (np.float32, (total, keep)), (np.float32, (total,)))
    writers = [RowWriter(path, create_array(path, *shape)) for path, shape in zip(paths, shapes, strict=True)]
    tally = Tally()

    def work(part: _Part) -> tuple[int, TopLabels, bool]:
        linked = isinstance(part.solve, TopUnifier)
        found = part.solve(part.answers, keep) if isinstance(part.solve, TopUnifier) else _in_full(part, keep)
        for writer, values in zip(writers, (found.classes, found.values, found.rest), strict=True):
            writer.put(part.ids, values)
        return len(part.ids), found, linked

    try:
        task = reporter.start("unifying", samples.count)
        for count, found, linked in in_threads(work, _parts(stores, samples, solvers)):
            tally.add(found, count, apart=not linked)
            task.advance(count)
    finally:
        for writer in writers:
            writer.close()
    diagnostics = Diagnostics(
        key=key,
        samples=samples.count,
        seconds=time.perf_counter() - began,
        **tally.told(samples.count),
    )
    write_json(notes, diagnostics.model_dump(mode="json"))
    return TopRows(folder, len(space)), diagnostics


@dataclass(frozen=True)
class _Part:
    """Samples `ids` (b,) that the same sites answered, as `solve` takes answers: as they were sent, or in full."""

    ids: NDArray[np.int64]
    solve: TopUnifier | Unifier
    answers: list[Any]


class _Solvers:
    """What unifies the answers of each set of sites: in full where these do not hang together."""

    MOST = 8
    """Kept at a time."""

    def __init__(self, space: LabelSpace, settings: Unify) -> None:
        self._space, self._settings = space, settings
        self._made: dict[tuple[int, ...], TopUnifier | Unifier] = {}
        everyone = self(tuple(range(len(space.sites))))
        self.block = everyone.block if isinstance(everyone, TopUnifier) else min(everyone.block, block_size(space))

    def __call__(self, sites: tuple[int, ...]) -> TopUnifier | Unifier:
        if sites not in self._made:
            while len(self._made) >= self.MOST:
                self._made.pop(next(iter(self._made)))
            self._made[sites] = self._make(sites)
        return self._made[sites]

    def _make(self, sites: tuple[int, ...]) -> TopUnifier | Unifier:
        space, settings = self._space, self._settings
        with contextlib.suppress(UnifyError):  # of sites that share no classes
            return TopUnifier(
                [space.class_sets[i] for i in sites],
                len(space),
                weights=[settings.weights.get(space.sites[i], 1.0) for i in sites],
                temperature=settings.temperature,
            )
        found = unifier(space, settings, (), sites)
        assert isinstance(found, Unifier)  # sites that answer on groups have labels over all classes
        return found


def _parts(stores: Sequence[AnswerStore], samples: Usable, solvers: _Solvers) -> Iterator[_Part]:
    for start in range(0, samples.size, solvers.block):
        whole = np.arange(start, min(start + solvers.block, samples.size))
        for pattern, rows in patterns(stores, whole):
            ids, sites = whole[rows], tuple(int(i) for i in np.flatnonzero(pattern))
            if not sites or (samples.mask is not None and not samples.mask[ids[0]]):
                continue
            solve = solvers(sites)
            read = _read_sent if isinstance(solve, TopUnifier) else read_rows
            yield _Part(ids, solve, [read(stores[i], ids) for i in sites])


def _read_sent(store: AnswerStore, ids: NDArray[np.int64]) -> Sent:
    parts = [store.read_sent(start, stop) for start, stop in runs(ids)]
    columns = zip(*((part.ids, part.values, part.other) for part in parts), strict=True)
    return Sent(*(np.concatenate(column) for column in columns))


def _in_full(part: _Part, keep: int) -> TopLabels:
    """Return the classes that are kept of labels over all classes."""
    assert isinstance(part.solve, Unifier)
    found = part.solve(part.answers, alone=True)
    classes, values = highest(found.probs, keep)
    rest = np.maximum(1 - values.sum(axis=1, dtype=np.float64), 0).astype(np.float32)
    return TopLabels(classes.astype(np.int32), values, rest, found.iterations, found.converged, found.residual)
