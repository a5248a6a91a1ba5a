"""The classes that a student is to tell apart, as part of a label space."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from consilience.common.labels import LabelSpace
from consilience.common.settings import JobSettings
from consilience.server import chosen as module
from consilience.server.chosen import Chosen
from consilience.server.student.wanted import Wanted

SPACE = LabelSpace.build({"east": ("a", "b", "c"), "north": ("d", "c", "e"), "west": ("e", "f")}, {"a": ["alpha"]})


def of(**student: Any) -> Chosen:
    return Chosen.of(JobSettings.model_validate({"name": "job", "student": student}), SPACE)


def test_by_default_the_student_learns_the_label_space() -> None:
    found = of()
    assert found.everything
    assert found.taught is SPACE
    assert found.wanted(1.0, 16) is None
    labels = np.array([-1, 0, 5])
    assert found.truth(labels) is labels


def test_outputs_are_in_the_order_of_the_label_space_and_known_to_their_sites() -> None:
    found = of(classes=("e", "c", "b"))
    assert found.taught == LabelSpace(("b", "c", "e"), SPACE.sites, ((0, 1), (1, 2), (2,)))
    assert of(classes=("b", "a")).taught == LabelSpace(("a", "b"), ("east",), ((0, 1),))
    other = of(classes=("f", "e"), other=True)
    assert other.sites == (1, 2)
    assert other.taught == LabelSpace(("e", "f", "other"), ("north", "west"), ((0, 2), (0, 1)))


def test_true_labels_of_unwanted_and_unknown_classes() -> None:
    labels = np.array([5, 0, 4, -1, 1])
    assert of(classes=("e", "f")).truth(labels).tolist() == [1, -1, 0, -1, -1]
    assert of(classes=("e", "f"), other=True).truth(labels).tolist() == [1, 2, 0, 2, 2]


def test_the_share_does_not_depend_on_the_size_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    labels, outside = rng.dirichlet(np.ones(6), 50).astype(np.float32), rng.random(50).astype(np.float32)
    ids, found = np.arange(3, 50, 2), of(classes=("a", "d"))
    columns = [SPACE.index("a"), SPACE.index("d")]
    mass = labels[:, columns].astype(np.float64).sum(axis=1)
    for size in (1, 7, 1000):
        monkeypatch.setattr(module, "block_size", lambda space, size=size: size)
        assert found.share(labels, None, None) == pytest.approx(mass.mean())
        assert found.share(labels, outside, ids) == pytest.approx((mass * (1 - outside))[ids].mean())


def test_weights_are_about_one_on_average_but_of_a_single_sample_at_most() -> None:
    found = of(classes=("a", "d"))
    assert [found.wanted(share, 16) for share in (0.5, 0.01, 0.0)] == [
        Wanted((0, 3), scale=2.0),
        Wanted((0, 3), scale=16.0),
        Wanted((0, 3), scale=16.0),
    ]
    assert of(classes=("a", "d"), other=True).wanted(0.01, 16) == Wanted((0, 3), other=True)


def test_answers_keep_the_odds_of_wanted_classes() -> None:
    rows = np.log(np.array([[0.5, 0.3, 0.2], [1e-30, 1e-30, 1.0]], np.float32))
    plain = np.exp(of(classes=("a", "b")).answers(0, rows))
    assert np.allclose(plain, [[0.625, 0.375], [0.5, 0.5]], atol=1e-6)
    pooled = np.exp(of(classes=("a", "b"), other=True).answers(0, rows))
    assert np.allclose(pooled, [[0.5, 0.3, 0.2], [0, 0, 1]], atol=1e-6)
    assert np.isnan(of(classes=("a", "b")).answers(0, np.full((1, 3), np.nan, np.float32))).all()
