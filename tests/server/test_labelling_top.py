"""The unify stage from largest classes to kept ones: the labels of answers in full, also where sites lack samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import log_softmax

from consilience.common.encoding import encode
from consilience.common.labels import LabelSpace
from consilience.common.progress import Reporter
from consilience.common.protocol import Answer, Question
from consilience.common.settings import JobSettings, Unify
from consilience.server import labelling_top
from consilience.server.answered import usable
from consilience.server.answers import AnswerStore
from consilience.server.answers_about import About
from consilience.server.labelling import unify_pool
from consilience.server.labelling_top import TopRows, classes_kept, unify_pool_top

DIGEST, POLICY, SIZE, KEEP = "a" * 64, "c" * 16, 60, 3
CLASSES = {"one": ["a", "b", "c", "d", "e"], "three": ["a", "b", "f", "e"], "two": ["e", "f", "g", "c", "d"]}
SPACE = LabelSpace.build(CLASSES)
SETTINGS = Unify(weights={"two": 2.0})


def stores(folder: Path, answered: dict[str, list[tuple[int, int]]], chance: int = 0) -> list[AnswerStore]:
    random = np.random.default_rng(chance)
    made = []
    for name, classes in CLASSES.items():
        rows = log_softmax(random.normal(0, 2, (SIZE, len(classes))), axis=1).astype(np.float32)
        about = About(
            site=name, pool=DIGEST, size=SIZE, teacher=DIGEST, policy=POLICY, encoding="top-3", classes=len(classes)
        )
        store = AnswerStore(folder / name, about)
        for start, stop in answered.get(name, [(30, SIZE), (0, 30)]):
            question = Question(
                job="job", pool=DIGEST, start=start, stop=stop, encoding="top-3", teacher=DIGEST, policy=POLICY
            )
            store.append(Answer(question, encode(rows[start:stop], "top-3"), 0.0))
        made.append(store)
    return made


@pytest.mark.parametrize("answered", [{}, {"three": [(10, 40)]}, {"two": [(0, 50)], "three": [(0, 20)]}])
@pytest.mark.parametrize("rows", [None, 7])
def test_kept_classes_have_the_labels_of_answers_in_full(
    tmp_path: Path,
    reporter: Reporter,
    monkeypatch: pytest.MonkeyPatch,
    answered: dict[str, list[tuple[int, int]]],
    rows: int | None,
) -> None:
    if rows is not None:
        monkeypatch.setattr("consilience.server.unify.top._MOST_ROWS", rows)
    held = stores(tmp_path / "answers", answered)
    found, notes = unify_pool_top(tmp_path / "top", SPACE, held, SETTINGS, KEEP, reporter)
    full, whole = unify_pool(tmp_path / "full", SPACE, held, (), SETTINGS, reporter)
    ids = usable(held, SPACE).ids
    ids = np.arange(SIZE) if ids is None else ids
    assert notes.samples == whole.samples == len(ids)
    assert notes.not_converged == notes.apart == 0
    np.testing.assert_allclose(found.values[ids], np.take_along_axis(full[ids], found.classes[ids], 1), atol=2e-6)
    np.testing.assert_allclose(found.rest[ids], 1 - found.values[ids].sum(axis=1), atol=1e-6)
    shown = found[ids]
    np.testing.assert_allclose(shown.sum(axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(np.take_along_axis(shown, found.classes[ids], 1), found.values[ids])


def test_sites_that_share_nothing_are_unified_in_full(tmp_path: Path, reporter: Reporter) -> None:
    """`one` and `two` overlap in this space only through others; alone, a site is taken as it is."""
    space = LabelSpace.build({"one": ["a", "b"], "two": ["b", "c"], "zero": ["a", "b", "c"]})
    random, held = np.random.default_rng(0), []
    for name, classes in zip(space.sites, space.class_sets, strict=True):
        about = About(
            site=name, pool=DIGEST, size=SIZE, teacher=DIGEST, policy=POLICY, encoding="top-1", classes=len(classes)
        )
        store = AnswerStore(tmp_path / "answers" / name, about)
        rows = log_softmax(random.normal(0, 1, (SIZE, len(classes))), axis=1).astype(np.float32)
        stop = SIZE if name == "zero" else 20
        question = Question(job="job", pool=DIGEST, start=0, stop=stop, encoding="top-1", teacher=DIGEST, policy=POLICY)
        store.append(Answer(question, encode(rows[:stop], "top-1"), 0.0))
        held.append(store)
    found, notes = unify_pool_top(tmp_path / "top", space, held, Unify(), 1, reporter)
    full, _ = unify_pool(tmp_path / "full", space, held, (), Unify(), reporter)
    assert notes.apart == 40
    np.testing.assert_allclose(found.values, np.take_along_axis(np.asarray(full), found.classes, 1), atol=2e-6)


def test_labels_are_made_once_for_the_same_answers(
    tmp_path: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = stores(tmp_path / "answers", {})
    first, _ = unify_pool_top(tmp_path / "top", SPACE, held, SETTINGS, KEEP, reporter)
    before = np.array(first.values)
    monkeypatch.setattr(labelling_top, "TopUnifier", None)  # whoever makes labels fails
    again, _ = unify_pool_top(tmp_path / "top", SPACE, held, SETTINGS, KEEP, reporter)
    assert isinstance(again, TopRows)
    np.testing.assert_array_equal(again.values, before)
    with pytest.raises(TypeError):
        unify_pool_top(tmp_path / "top", SPACE, held, SETTINGS, 2, reporter)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, "no coverage"),
        ({"ask": {"encoding": "top-2"}}, "no coverage"),
        ({"ask": {"encoding": "f16"}}, "no coverage"),
        ({"unify": {"method": "sd"}}, "no coverage"),
        ({"unify": {"prior_correction": True}}, "no coverage"),
        ({"unify": {"robust": True}}, "no coverage"),
        ({"student": {"architecture": "cnn3", "learning": "soft-labels"}}, "no coverage"),
        ({}, "coverage"),
        ({}, "apart"),
    ],
)
def test_labels_stay_sparse_where_nothing_else_is_needed(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    verticals = {"first": ["a", "b", "c"], "second": ["d", "e", "f", "g"]}
    concentration = {"target": "unified", "verticals": verticals, "keep": 3}
    student = {"architecture": "cnn3", "learning": "concentration", "concentration": concentration}
    job = JobSettings.model_validate({"name": "job", "ask": {"encoding": "top-3"}, "student": student, **change})
    held = stores(tmp_path, {})
    apart = LabelSpace.build({"one": ["a", "b", "c"], "two": ["d", "e", "f", "g"]})
    found = classes_kept(job, apart if told == "apart" else SPACE, held if told == "coverage" else [None] * 3)
    assert found == (3 if not change and told == "no coverage" else None)
