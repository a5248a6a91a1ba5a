"""Judging a multi-label run: from what it left on disk to the arrays that are judged.

Does not live here: any metric (server/judge_labels), what single-label runs need (server/publishing_classes).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from consilience.server.judge_labels import LabelJudgement, judge_labels
from consilience.server.labelling_multi import unify_block
from consilience.server.learning import StudentModel
from consilience.server.outcome import Outcome
from consilience.server.publishing_classes import predictions, whole_answers
from consilience.server.truth import pool_truth_labels, test_truth_labels


def judgement_of_labels(outcome: Outcome, student: StudentModel) -> tuple[LabelJudgement | None, list[str]]:
    """Judge; returns with it what is to say about sites that did not answer the whole test pool."""
    test, space = outcome.test, outcome.space
    if test is None:
        return None, []
    whole, answers, warnings = whole_answers(outcome)
    unified = None
    if whole:
        covers = [outcome.test_coverage[i] for i in whole]
        told = [None if c is None or not c.complete else c.read(0, len(test))[:, 0] for c in covers]
        given = [rows for rows in answers if rows is not None]
        unified = unify_block(space, outcome.settings.unify, whole, given, told).probs
    oracle = StudentModel(outcome.run / "oracle") if "oracle" in outcome.curves else None
    chosen = outcome.chosen
    truth = chosen.truth_labels(test_truth_labels(test, space, outcome.settings.labels.synonyms))
    judgement = judge_labels(
        truth,
        chosen.taught,
        [None if (held := answers[i]) is None else chosen.answers(i, held) for i in chosen.sites],
        None if unified is None else chosen.labels(unified, None),
        predictions(student, test),
        None if oracle is None else predictions(oracle, test),
    )
    return judgement, warnings


def pool_labels(outcome: Outcome) -> NDArray[np.int8] | None:
    """Return the pool's true labels (n, L) in the label space, for judging; None where there are none."""
    path = outcome.settings.judge.pool_labels
    if path is None or outcome.test is None:
        return None
    return pool_truth_labels(path, outcome.pool, outcome.test, outcome.space, outcome.settings.labels.synonyms)


def any_applies(truth: NDArray[np.int8], classes: tuple[int, ...]) -> NDArray[np.int64]:
    """Return (n,) the first of `classes` where any label of a site applies, else -1, for truth (n, L).

    That is what coverage is about, as the class of an image that has one.
    """
    return np.where((truth[:, list(classes)] > 0).any(axis=1), classes[0], -1)
