"""What the report tells of each site's coverage over the pool: gathered from the stores, one site at a time.

Lives here: reading n numbers a site and choosing examples. Does not live here: any metric (server/judge_coverage), any
wording or picture (server/report_coverage). Of teachers' answers only the largest probability of a sample is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from consilience.common.labels import LabelSpace
from consilience.common.pool import Pool
from consilience.server.answered import CoverageStores, block_size
from consilience.server.answers import AnswerStore
from consilience.server.asked_pool import numbers_in
from consilience.server.judge_coverage import coverage_figures, ends
from consilience.server.judge_tops import softmax
from consilience.server.labelling import Diagnostics
from consilience.server.report_findings import CoverageExamples, CoverageFindings


def coverage_findings(
    pool: Pool,
    space: LabelSpace,
    stores: Sequence[AnswerStore],
    coverage: CoverageStores,
    diagnostics: Diagnostics,
    truth: NDArray[np.int64] | None,
) -> dict[str, CoverageFindings]:
    """Return site -> what its coverage is like on the pool, for the sites that gave any.

    `truth` (n,): true labels of the pool in the label space, -1 for a class of no site; None where they are not known.
    Raises `StorageError`, `PoolError`.
    """
    found = {}
    for site, classes, store, told in zip(space.sites, space.class_sets, stores, coverage, strict=True):
        if told is None or not len(told):
            continue
        ids = np.flatnonzero(told.answered(0, len(pool)))
        values = told.read_answered(0, len(pool))[ids, 0]
        mine = None if truth is None else np.isin(truth[ids], np.asarray(classes))
        confidence = None if mine is None else _confidence(store, block_size(space))[ids]

        largest, smallest = ends(values)
        verdict = diagnostics.checks.get(site)
        found[site] = CoverageFindings(
            figures=coverage_figures(values, mine, confidence),
            largest=_examples(pool, ids[largest], values[largest], truth),
            smallest=_examples(pool, ids[smallest], values[smallest], truth),
            agreement=None if verdict is None else verdict.agreement,
            left_out=(verdict.reason or None) if verdict else None,
            offset=verdict.offset if verdict else 0.0,
            used=diagnostics.coverage.get(site, 0),
        )
    return found


def _examples(
    pool: Pool, ids: NDArray[np.int64], values: NDArray[np.float32], truth: NDArray[np.int64] | None
) -> CoverageExamples:
    return CoverageExamples(numbers_in(pool, ids), values, pool.take(ids), None if truth is None else truth[ids])


def _confidence(store: AnswerStore, size: int) -> NDArray[np.float32]:
    """Return a teacher's largest probability of each sample, (n,), NaN where it did not answer."""
    total = store.about.size
    out = np.full(total, np.nan, np.float32)
    for start in range(0, total, size):
        stop = min(start + size, total)
        known = store.answered(start, stop)
        rows = store.read_answered(start, stop)[known].astype(np.float64)
        if len(rows):
            out[start:stop][known] = softmax(rows).max(1)
    return out
