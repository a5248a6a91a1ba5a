"""Judging a run of one class an image: from what it left on disk to the arrays that are judged.

Does not live here: any metric (server/judge), what multi-label runs need (server/publishing_multi).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from consilience.common.data import ImageData
from consilience.server.answered import Block
from consilience.server.coverage_check import believed
from consilience.server.judge import Judgement, judge
from consilience.server.learning import StudentModel
from consilience.server.outcome import Outcome
from consilience.server.robust import cut, kept
from consilience.server.solvers import anchored, unifier, usable_coverage
from consilience.server.truth import pool_truth, test_truth

_BLOCK = 1024
"""Test images read and scored at a time."""


def judgement_of_classes(outcome: Outcome, student: StudentModel) -> tuple[Judgement | None, list[str]]:
    """Judge; returns with it what is to say about sites that did not answer the whole test pool."""
    test = outcome.test
    if test is None:
        return None, []
    space, settings, chosen = outcome.space, outcome.settings, outcome.chosen
    whole, answers, warnings = whole_answers(outcome)
    unified = None
    if outcome.test_stores is not None:
        keep = kept(space, outcome.diagnostics.trust, whole)
        everyone = kept(space, outcome.diagnostics.trust, range(len(space.sites)))
        told_there = frozenset[int]().union(*(space.tells(i) for i in whole))
        if len(told_there) == len(space) and keep.classes == everyone.classes:
            used = believed(space, outcome.test_coverage, outcome.diagnostics.checks)
            covers = [used[i] for i in whole]
            told = {c.about.site: c.read(0, len(test))[:, 0] for c in covers if c is not None and c.complete}
            block = Block(np.arange(len(test)), answers, [told.get(site) for site in space.sites])
            rows, values = cut(block, keep)
            coverage = usable_coverage(settings.unify, values)
            solve = unifier(space, settings.unify, outcome.cards, covered=False, keep=keep)
            if settings.unify.other and anchored(solve, keep.class_sets(space), coverage):
                solve = unifier(space, settings.unify, outcome.cards, keep=keep)
            found = solve(rows, coverage=coverage)
            unified = chosen.labels(keep.spread(found.probs, space), found.other)
            partly = [c.about.site for c in covers if c is not None and not c.complete]
            if partly:
                warnings.append(
                    f"The unified ensemble is judged without the coverage of {', '.join(partly)}: it was not given "
                    "for the whole test pool."
                )
        else:
            warnings.append(
                "There is no unified ensemble: the sites that answered the whole test pool do not tell every class."
            )
    oracle = StudentModel(outcome.run / "oracle") if "oracle" in outcome.curves else None
    whole_truth = test_truth(test, space, settings.labels.synonyms)
    truth = chosen.truth(whole_truth)
    ids = np.arange(len(test)) if chosen.everything else np.flatnonzero(truth >= 0)
    judgement = judge(
        truth[ids],
        chosen.taught,
        [None if (held := answers[i]) is None else chosen.answers(i, held[ids]) for i in chosen.sites],
        None if unified is None else unified[ids],
        predictions(student, test, ids),
        None if oracle is None else predictions(oracle, test, ids),
        chosen.mine(whole_truth[ids]),
    )
    return replace(judgement, unwanted=len(test) - len(ids)), warnings


def whole_answers(outcome: Outcome) -> tuple[list[int], list[NDArray[np.float32] | None], list[str]]:
    """Return the sites that answered the whole test pool, all sites' answers (n, k_i), and what to say of the others.

    None stands for the answers of a site that lacks some; there are none at all without a test pool.
    """
    stores, sites = outcome.test_stores or (), outcome.space.sites
    given = {i: store.read(0, store.about.size) for i, store in enumerate(stores) if store.complete}
    absent = ", ".join(site for i, site in enumerate(sites) if stores and i not in given)
    warnings = [f"The baselines are judged without {absent}: the test pool was not answered whole."] if absent else []
    return list(given), [given.get(i) for i in range(len(sites))], warnings


def pool_classes(outcome: Outcome) -> NDArray[np.int64] | None:
    """Return the pool's true labels in the label space, for judging; None where there are none."""
    path, synonyms = outcome.settings.judge.pool_labels, outcome.settings.labels.synonyms
    if path is None or outcome.test is None:
        return None
    return pool_truth(path, outcome.pool, outcome.test, outcome.space, synonyms)


def predictions(model: StudentModel, test: ImageData, ids: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
    """Return (m, L) log-probabilities of the test images `ids` (m,), by default of all, read a block at a time."""
    ids = np.arange(len(test)) if ids is None else ids
    parts = [model.log_probs(test.read(ids[start : start + _BLOCK])) for start in range(0, len(ids), _BLOCK)]
    return np.concatenate(parts) if parts else np.empty((0, len(model.labels)), np.float32)
