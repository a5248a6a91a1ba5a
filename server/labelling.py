"""The unify stage: answers from the stores to unified soft labels on disk, block by block.

Lives here: streaming, what of the settings goes into the unifier, and diagnostics. Does not live here: the
mathematics (server/unify). Nothing of size samples x classes is held in memory.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from consilience.common.cards import SiteCard
from consilience.common.files import RowWriter, canonical_json, create_array, read_json, sha256, write_json
from consilience.common.labels import LabelSpace
from consilience.common.progress import Reporter
from consilience.common.settings import Unify
from consilience.server.answered import Block, CoverageStores, Usable, block_size, blocks, need_usable, usable
from consilience.server.answers import AnswerStore
from consilience.server.coverage_check import Claims, Verdict, believed, check_coverage
from consilience.server.grouped import AnyUnifier, group_unifier
from consilience.server.robust import Kept, Trust, cut, find_trust, kept, labelled
from consilience.server.unify import Prior, UnifiedLabels, Unifier
from consilience.server.unify.blocks import in_threads
from consilience.server.unify.top import TopLabels


class Diagnostics(BaseModel):
    """How unification went over a pool."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str
    samples: int
    """Samples that have labels."""
    seconds: float
    not_converged: int
    largest_residual: float
    mean_iterations: float
    apart: int = 0
    """Samples for which the sites that answered share fewer classes than all sites do, so that the rule
    `unify.across` decides more about them than about the others."""
    coverage: dict[str, int] = {}
    """Site -> samples in whose labels its coverage has a part."""
    spread: float | None = None
    """Of multi-label sites: the mean standard deviation of the log-odds that several sites give to one label; None
    where no label has several."""
    lacking: int = 0
    """Of multi-label sites: labels of samples that no site which answered the sample knows."""
    checks: dict[str, Verdict] = {}
    """Site -> what the others say of its coverage, where they can; method `ce` only."""
    claimed: float | None = None
    """The sum over sites of their mean coverage, where they share all classes out among them: 1 if every sample is of
    a known class and every level is right. None elsewhere."""
    trust: Trust | None = None
    """What the sites' answers say of one another's; None without `unify.robust`."""


def unifier(
    space: LabelSpace,
    settings: Unify,
    cards: Sequence[SiteCard],
    sites: Sequence[int] | None = None,
    *,
    covered: bool = True,
    keep: Kept | None = None,
) -> AnyUnifier:
    """Build the unifier that the job's settings describe, for the answers of all sites or of those at `sites`.

    `covered`: coverage comes with the answers; without it nothing says that a sample is outside the label space.
    `keep`: what counts of these sites' answers; by default all. Labels are of the classes of `keep`.
    """
    keep = keep or kept(space, None, range(len(space.sites)) if sites is None else sites)
    chosen, class_sets = keep.sites, keep.class_sets(space)
    if space.grouped and any(space.grouped[i] is not None for i in chosen):
        return group_unifier(space, settings, chosen, covered=covered)
    prior = None
    if settings.prior_correction:
        target = np.full(len(keep.classes), 1 / len(keep.classes))
        known = []
        for i, classes, columns in zip(chosen, class_sets, keep.columns, strict=True):
            told = cards[i].class_priors
            known.append(
                target[list(classes)] if told is None else np.asarray(told)[slice(None) if columns is None else columns]
            )
        prior = Prior(target, known)
    return Unifier(
        class_sets,
        len(keep.classes),
        method=settings.method,
        weights=[w * settings.weights.get(space.sites[i], 1.0) for i, w in zip(chosen, keep.weights, strict=True)],
        temperature=settings.temperature,
        prior=prior,
        across=settings.across,
        strength=[settings.strength_of(space.sites[i]) for i in chosen],
        other=settings.other if covered else 0.0,
    )


def usable_coverage(settings: Unify, told: list[NDArray[np.float32] | None]) -> list[NDArray[np.float32] | None] | None:
    """Return what a unifier is given of sites' coverage: None where no site gave it, or, for `sd`, not every site."""
    enough = all if settings.method == "sd" else any
    return told if enough(values is not None for values in told) else None


def anchored(solve: AnyUnifier, class_sets: Sequence[Sequence[int]], told: Sequence[object | None] | None) -> bool:
    """Whether some site of every component gives coverage: else nothing says that a sample is outside of all classes.

    `class_sets` are those of the sites that `solve` is for, `told` their coverage, None for a site that gives none.
    """
    components = solve.components
    given = {int(components[c[0]]) for c, values in zip(class_sets, told or [], strict=False) if values is not None}
    return len(given) == int(components.max()) + 1


def labels_key(
    space: LabelSpace,
    stores: Sequence[AnswerStore],
    settings: Unify,
    coverage: CoverageStores | None = None,
    seed: int = 0,
) -> str:
    """Return what tells one pool's labels from others: settings, classes, and which samples each site answered.

    `coverage`: each site's store of coverage, None for a site that was not asked for it. `seed` draws the samples by
    which coverage is checked.
    """
    covers = coverage or [None] * len(stores)
    return sha256(
        canonical_json(
            {
                "settings": settings.model_dump(mode="json"),
                "labels": space.names,
                **({"groups": space.grouped} if space.grouped else {}),
                "stores": [store.about.model_dump(mode="json") for store in stores],
                "missing": [list(store.missing()) for store in stores],
                "coverage": [None if store is None else store.about.model_dump(mode="json") for store in covers],
                "no coverage": [None if store is None else list(store.missing()) for store in covers],
                "seed": seed,
            }
        )
    )


def done_before(notes: Path, key: str, *files: Path) -> Diagnostics | None:
    """Return the diagnostics of labels that are there, in `files`, for this key; else remove what tells of others."""
    if notes.exists() and all(path.exists() for path in files):
        done = Diagnostics.model_validate(read_json(notes))
        if done.key == key:
            return done
    notes.unlink(missing_ok=True)
    return None


@dataclass
class Tally:
    """What the solutions of all blocks come to."""

    failed: int = 0
    largest: float = 0.0
    steps: float = 0.0
    apart: int = 0

    def add(self, found: UnifiedLabels | TopLabels, samples: int, *, apart: bool) -> None:
        """Count one block of so many samples; `apart`: its sites do not hang together as all of them do."""
        self.failed += int(np.sum(~found.converged))
        self.largest = max(self.largest, float(np.max(found.residual, initial=0.0)))
        self.steps += float(np.sum(np.broadcast_to(found.iterations, (samples,))))
        self.apart += samples if apart else 0

    def told(self, samples: int) -> dict[str, Any]:
        """Return the fields of `Diagnostics` for so many samples in all."""
        return {
            "not_converged": self.failed,
            "largest_residual": self.largest,
            "mean_iterations": self.steps / max(samples, 1),
            "apart": self.apart,
        }


def load_other(folder: Path) -> NDArray[np.float32] | None:
    """Return `folder`/other.npy, (n,) memory-mapped: how likely a sample is outside the label space; None without it.

    Only labels made with `unify.other` above 0 have it.
    """
    path = folder / "other.npy"
    return np.load(path, mmap_mode="r") if path.exists() else None


def unify_pool(
    folder: Path,
    space: LabelSpace,
    stores: Sequence[AnswerStore],
    cards: Sequence[SiteCard],
    settings: Unify,
    reporter: Reporter,
    samples: Usable | None = None,
    coverage: CoverageStores | None = None,
    seed: int = 0,
) -> tuple[NDArray[np.float32], Diagnostics]:
    """Write `folder`/q.npy, (n, L) float32 memory-mapped, unless it is there for the same answers and settings.

    Each sample's label comes from the sites that answered it, with the coverage of those that gave it (`coverage`:
    one store a site, None for a site that was not asked). For method `ce`, coverage that is noise or inverted in the
    eyes of the other sites is left out, and a level that is far off is mended where classes overlap; samples drawn by
    `seed` show it. With `settings.other` above 0 there is `folder`/other.npy, (n,) float32, too. Rows of samples that
    are not usable are zero: they have no label; with `settings.robust` so are those of which only outvoted sites tell
    some class (`labelled`). Returns the labels and the diagnostics. Raises `UnifyError`, `AskingError`, `StorageError`.
    """
    key = labels_key(space, stores, settings, coverage, seed)
    path, notes, outside = folder / "q.npy", folder / "diagnostics.json", folder / "other.npy"
    if not settings.other:
        outside.unlink(missing_ok=True)
    if done := done_before(notes, key, path, *([outside] if settings.other else [])):
        return np.load(path, mmap_mode="r"), done
    samples = samples or usable(stores, space)
    trust = find_trust(space, stores, samples) if settings.robust else None
    samples = need_usable(labelled(space, stores, samples, trust))
    solvers = _Solvers(space, settings, cards, trust)
    labels = create_array(path, np.float32, (samples.size, len(space)))
    other = create_array(outside, np.float32, (samples.size,)) if settings.other else None
    covered = dict.fromkeys((site for site, c in zip(space.sites, coverage or [], strict=False) if c is not None), 0)
    began = time.perf_counter()
    checks: dict[str, Verdict] = {}
    if coverage is not None and settings.method == "ce":
        # Coverage is about the truth, not about the truth softened, and the other sites know no outside.
        plain = settings.model_copy(update={"temperature": 1.0, "other": 0.0})
        closed = not settings.other
        checks = check_coverage(space, stores, coverage, _Solvers(space, plain, cards), samples, seed, mend=closed)
        coverage = believed(space, coverage, checks)
    tally, claims = Tally(), Claims(space)
    apart_from = max(space.components)
    task = reporter.start("unifying", samples.count)
    size = min(block_size(space), solvers(tuple(range(len(space.sites))), False).block)
    with rows_of(path, labels) as put, rows_of(outside, other) as put_other:

        def work(block: Block) -> tuple[Block, UnifiedLabels, list[int], bool]:
            keep = solvers.kept(block.sites)
            rows, told = cut(block, keep)
            given = usable_coverage(settings, told)
            solve = solvers(block.sites, False)
            if other is not None and anchored(solve, keep.class_sets(space), given):
                solve = solvers(block.sites, True)
            unified = solve(rows, coverage=given, alone=True)
            put(block.ids, keep.spread(unified.probs, space))
            put_other(block.ids, unified.other)
            covering = [i for i, values in zip(keep.sites, given or [], strict=False) if values is not None]
            return block, unified, covering, int(solve.components.max()) > apart_from

        # one pattern a block: its samples are usable all or none
        wanted = (
            block
            for block in blocks(stores, size, coverage, stored=True)
            if samples.mask is None or samples.mask[block.ids[0]]
        )
        for block, unified, covering, more in in_threads(work, wanted):
            for i in covering:
                covered[space.sites[i]] += len(block.ids)
            tally.add(unified, len(block.ids), apart=more)
            claims.add(block.coverage)
            task.advance(len(block.ids))
    diagnostics = Diagnostics(
        key=key,
        samples=samples.count,
        seconds=time.perf_counter() - began,
        **tally.told(samples.count),
        coverage=covered,
        checks=checks,
        claimed=claims.sum,
        trust=trust,
    )
    write_json(notes, diagnostics.model_dump(mode="json"))
    return np.load(path, mmap_mode="r"), diagnostics


@contextlib.contextmanager
def rows_of(
    path: Path, array: np.memmap[Any, Any] | None
) -> Iterator[Callable[[NDArray[np.int64], NDArray[Any]], None]]:
    """Give what writes rows of `array`, which is the file `path`, and makes them durable in the end; None: nowhere."""
    if array is None:
        yield lambda ids, rows: None
        return
    writer = RowWriter(path, array)
    try:
        yield writer.put
    finally:
        writer.close()


class _Solvers:
    """One unifier for each set of sites that answered the same samples, with coverage or without, made when needed."""

    MOST = 64
    """Unifiers kept: a site that fails now and then makes few sets, many such sites may make a great many."""

    def __init__(
        self, space: LabelSpace, settings: Unify, cards: Sequence[SiteCard], trust: Trust | None = None
    ) -> None:
        self._space, self._settings, self._cards, self._trust = space, settings, cards, trust
        self._made: dict[tuple[tuple[int, ...], bool], AnyUnifier] = {}
        self._kept: dict[tuple[int, ...], Kept] = {}
        self._lock = threading.RLock()

    def kept(self, sites: tuple[int, ...]) -> Kept:
        """Return what counts of the answers of these sites."""
        with self._lock:
            if sites not in self._kept:
                if len(self._kept) >= self.MOST:
                    self._kept.clear()
                self._kept[sites] = kept(self._space, self._trust, sites)
            return self._kept[sites]

    def __call__(self, sites: tuple[int, ...], covered: bool) -> AnyUnifier:
        key = sites, covered
        with self._lock:
            if key not in self._made:
                if len(self._made) >= self.MOST:
                    self._made.clear()
                about = (self._space, self._settings, self._cards)
                self._made[key] = unifier(*about, covered=covered, keep=self.kept(sites))
            return self._made[key]
