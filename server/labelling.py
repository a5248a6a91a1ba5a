"""The unify stage: answers from the stores to unified soft labels on disk, block by block.

Lives here: streaming, and diagnostics. Does not live here: what of the settings goes into a unifier (server/solvers),
the mathematics (server/unify). Nothing of size samples x classes is held in memory.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

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
from consilience.server.labelling_solved import SolvedRows
from consilience.server.robust import Trust, find_trust, labelled
from consilience.server.sharpness import find_exponent
from consilience.server.solvers import Solvers
from consilience.server.unify import UnifiedLabels
from consilience.server.unify.blocks import in_threads
from consilience.server.unify.sharpen import sharpened
from consilience.server.unify.top import TopLabels

Put: TypeAlias = Callable[[NDArray[np.int64], NDArray[Any]], None]
"""Brings rows of samples where they belong."""


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
    exponent: float | None = 1.0
    """Labels made with coverage are the solver's to this power, normalised (server/unify/sharpen); None where no power
    will do, and they are the solver's."""
    trust: Trust | None = None
    """What the sites' answers say of one another's; None without `unify.robust`."""


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
    eyes of the other sites is left out, a level that is far off is mended where classes overlap, and labels are made
    as sure as the sites are; samples drawn by `seed` show it. With `settings.other` above 0 there is
    `folder`/other.npy, (n,) float32, too. Rows of samples that are not usable are zero: they have no label; with
    `settings.robust` so are those of which only outvoted sites tell some class (`labelled`). Returns the labels and the
    diagnostics. Raises `UnifyError`, `AskingError`, `StorageError`.
    """
    key = labels_key(space, stores, settings, coverage, seed)
    path, notes, outside = folder / "q.npy", folder / "diagnostics.json", folder / "other.npy"
    if not settings.other:
        outside.unlink(missing_ok=True)
    if done := done_before(notes, key, path, *([outside] if settings.other else [])):
        return np.load(path, mmap_mode="r"), done
    size = stores[0].about.size
    labels = create_array(path, np.float32, (size, len(space)))
    other = create_array(outside, np.float32, (size,)) if settings.other else None
    with rows_of(path, labels) as put, rows_of(outside, other) as put_other:
        diagnostics = _solve(key, space, stores, cards, settings, reporter, samples, coverage, seed, put, put_other)
    write_json(notes, diagnostics.model_dump(mode="json"))
    return np.load(path, mmap_mode="r"), diagnostics


def solved_pool(
    folder: Path,
    space: LabelSpace,
    stores: Sequence[AnswerStore],
    cards: Sequence[SiteCard],
    settings: Unify,
    reporter: Reporter,
    samples: Usable | None = None,
    coverage: CoverageStores | None = None,
    seed: int = 0,
) -> tuple[SolvedRows, Diagnostics]:
    """Return what `unify_pool` does, with labels that are solved when they are looked at in place of a file.

    For settings without `other` and `robust`. Raises as `unify_pool`.
    """
    key, notes = labels_key(space, stores, settings, coverage, seed), folder / "diagnostics.json"
    diagnostics = done_before(notes, key)
    if diagnostics is None:
        nowhere: Put = lambda ids, rows: None  # noqa: E731
        diagnostics = _solve(key, space, stores, cards, settings, reporter, samples, coverage, seed, nowhere, nowhere)
        write_json(notes, diagnostics.model_dump(mode="json"))
    used = None if coverage is None else believed(space, coverage, diagnostics.checks)
    return SolvedRows(space, stores, used, Solvers(space, settings, cards), diagnostics.exponent), diagnostics


def _solve(
    key: str,
    space: LabelSpace,
    stores: Sequence[AnswerStore],
    cards: Sequence[SiteCard],
    settings: Unify,
    reporter: Reporter,
    samples: Usable | None,
    coverage: CoverageStores | None,
    seed: int,
    put: Put,
    put_other: Put,
) -> Diagnostics:
    """Solve all samples that are usable, block by block; rows go where `put` and `put_other` bring them."""
    samples = samples or usable(stores, space)
    trust = find_trust(space, stores, samples) if settings.robust else None
    samples = need_usable(labelled(space, stores, samples, trust))
    covered = dict.fromkeys((site for site, c in zip(space.sites, coverage or [], strict=False) if c is not None), 0)
    began = time.perf_counter()
    checks: dict[str, Verdict] = {}
    exponent: float | None = 1.0
    if coverage is not None and settings.method == "ce":
        # Coverage is about the truth, not about the truth softened, and the other sites know no outside.
        unsoftened = settings.model_copy(update={"temperature": 1.0})
        inside = Solvers(space, unsoftened.model_copy(update={"other": 0.0}), cards)
        closed = not settings.other
        checks = check_coverage(space, stores, coverage, inside, samples, seed, mend=closed)
        coverage = believed(space, coverage, checks)
        if not settings.prior_correction:  # else sites speak of other proportions of classes than the labels
            solve = Solvers(space, unsoftened, cards, trust).solve
            exponent = find_exponent(space, stores, coverage, solve, samples, seed, closed=closed)
    tally, claims, solvers = Tally(), Claims(space), Solvers(space, settings, cards, trust)
    apart_from = max(space.components)
    task = reporter.start("unifying", samples.count)
    size = min(block_size(space), solvers(tuple(range(len(space.sites))), False).block)

    def work(block: Block) -> tuple[Block, UnifiedLabels, list[int], bool]:
        found = solvers.solve(block)
        probs = found.labels.probs if found.coverage is None else sharpened(found.labels.probs, exponent)
        put(block.ids, found.kept.spread(probs, space))
        put_other(block.ids, found.labels.other)
        covering = [i for i, c in zip(found.kept.sites, found.coverage or [], strict=False) if c is not None]
        return block, found.labels, covering, found.components > apart_from

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
    return Diagnostics(
        key=key,
        samples=samples.count,
        seconds=time.perf_counter() - began,
        **tally.told(samples.count),
        coverage=covered,
        checks=checks,
        claimed=claims.sum,
        exponent=exponent,
        trust=trust,
    )


@contextlib.contextmanager
def rows_of(path: Path, array: np.memmap[Any, Any] | None) -> Iterator[Put]:
    """Give what writes rows of `array`, which is the file `path`, and makes them durable in the end; None: nowhere."""
    if array is None:
        yield lambda ids, rows: None
        return
    writer = RowWriter(path, array)
    try:
        yield writer.put
    finally:
        writer.close()
