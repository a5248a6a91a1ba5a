"""Verticals of a contract or a table, the routing of samples to specialists, and what is kept of an answer."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consilience.common.errors import ConsilienceError, LabelError, SettingsError
from consilience.common.labels import LabelSpace
from consilience.common.settings import Concentration
from consilience.server.student.routing import (
    highest,
    route_by_coverage,
    route_by_labels,
    specialist_targets,
    specialists_for,
)
from consilience.server.student.verticals import Verticals, kept, verticals_of

NAMES = ("a", "b", "c", "d", "e", "f")
APART = LabelSpace(NAMES, ("east", "north", "west"), ((0, 2), (5, 1), (4, 3)))
OVERLAP = LabelSpace(NAMES, ("east", "north", "west"), ((0, 1, 2, 3), (2, 3, 4), (3, 4, 5, 2)))
TABLE = {"birds": ("a", "b"), "cars": ("d", "c"), "plants": ("e", "f")}


def chosen(**fields: object) -> Concentration:
    return Concentration.model_validate(fields)


def test_verticals_are_the_sites_class_sets_where_those_are_disjoint() -> None:
    found = verticals_of(APART, chosen())
    assert found == Verticals(("east", "north", "west"), ((0, 2), (1, 5), (3, 4)), ((0,), (1,), (2,)))
    assert found.of_class.tolist() == [0, 1, 0, 2, 2, 1]


def test_sites_with_one_class_set_share_a_vertical() -> None:
    space = LabelSpace(("a", "b", "c"), ("east", "north", "west"), ((0, 1), (2,), (1, 0)))
    assert verticals_of(space, chosen()) == Verticals(("east-west", "north"), ((0, 1), (2,)), ((0, 2), (1,)))


def test_verticals_are_a_table_and_a_site_may_be_a_specialist_of_several() -> None:
    space = LabelSpace(NAMES, ("east", "north"), ((0, 1, 2, 3), (2, 3, 4, 5)))
    found = verticals_of(space, chosen(verticals=TABLE))
    assert found.classes == ((0, 1), (2, 3), (4, 5))
    assert found.specialists == ((0,), (0, 1), (1,))
    renamed = verticals_of(space, chosen(verticals={**TABLE, "birds": ("a", "bee")}), {"b": ["bee"]})
    assert renamed == found


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "overlap: both know 'c'"),
        ({"verticals": {"birds": ("a", "b"), "cars": ("c", "d")}}, "leaves 2 classes out: e, f"),
        ({"verticals": {**TABLE, "plants": ("e", "f", "g")}}, "no site knows: g"),
        ({"verticals": {"one": ("a", "f", "c"), "two": ("d", "e", "b")}}, "no site knows every class of one"),
        ({"verticals": {"all": NAMES}, "target": "unified", "keep": 7}, "the label space has 6 classes"),
    ],
)
def test_verticals_that_do_not_fit_are_refused_with_the_next_step(fields: dict[str, object], said: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(said)) as caught:
        verticals_of(OVERLAP, chosen(**fields))
    assert caught.value.hint


def test_a_class_under_two_names_is_refused() -> None:
    table = {"birds": ("a", "b"), "cars": ("c", "d", "bee"), "plants": ("e", "f")}
    with pytest.raises(ConsilienceError, match="'b' is in birds and cars"):
        verticals_of(OVERLAP, chosen(verticals=table), {"b": ["bee"]})
    with pytest.raises(LabelError, match="both 'b'"):
        verticals_of(OVERLAP, chosen(verticals={"all": (*NAMES, "bee")}), {"b": ["bee"]})


def test_keep_is_at_most_a_verticals_classes_and_by_default_what_there_is() -> None:
    with pytest.raises(SettingsError, match="is 3; vertical east has 2 classes"):
        verticals_of(APART, chosen(keep=3))
    assert kept(verticals_of(APART, chosen(keep=2)), chosen(keep=2)) == 2
    assert kept(verticals_of(APART, chosen()), chosen()) == 2
    assert kept(verticals_of(APART, chosen(target="unified")), chosen(target="unified")) == 6
    wide = LabelSpace(tuple(map(str, range(300))), ("east",), (tuple(range(300)),))
    assert kept(verticals_of(wide, chosen()), chosen()) == 100


def test_the_site_with_the_highest_coverage_teaches() -> None:
    verticals = verticals_of(APART, chosen())
    answers = [np.log(np.full((4, 2), 0.5)) for _ in range(3)]
    coverage = [np.array([0.9, 0.1, 0.5, 0.2]), np.array([0.1, 0.8, 0.5, 0.1]), None]
    vertical, sites = route_by_coverage(coverage, answers, APART.class_sets, verticals)
    assert sites.tolist() == vertical.tolist() == [0, 1, 0, 0]
    answers[0] = None  # type: ignore[call-overload]
    assert route_by_coverage(coverage, answers, APART.class_sets, verticals)[1].tolist() == [1, 1, 1, 1]
    with pytest.raises(ValueError, match="no specialist"):
        route_by_coverage([None] * 3, answers, APART.class_sets, verticals)


def test_a_specialist_of_several_verticals_teaches_the_one_that_it_gives_most() -> None:
    space = LabelSpace(NAMES, ("east", "north"), ((3, 0, 2, 1), (2, 3, 4, 5)))
    verticals = verticals_of(space, chosen(verticals=TABLE))
    east = np.log(np.array([[0.1, 0.5, 0.1, 0.3], [0.6, 0.1, 0.2, 0.1]]))
    north = np.log(np.full((2, 4), 0.25))
    coverage = [np.array([0.9, 0.9]), np.array([0.1, 0.1])]
    vertical, sites = route_by_coverage(coverage, [east, north], space.class_sets, verticals)
    assert sites.tolist() == [0, 0]
    assert vertical.tolist() == [0, 1]  # a and b: 0.8; c and d: 0.8


def test_unified_labels_choose_among_verticals_whose_specialist_answered() -> None:
    verticals = verticals_of(APART, chosen())
    labels = np.array([[0.1, 0.2, 0.1, 0.3, 0.1, 0.2], [0.5, 0.0, 0.0, 0.2, 0.2, 0.1]])
    assert route_by_labels(labels, verticals).tolist() == [1, 0]
    assert route_by_labels(labels, verticals, [False, False, True]).tolist() == [2, 2]


def test_of_several_specialists_the_surer_that_answered_teaches() -> None:
    verticals = Verticals(("one", "two"), ((0, 1), (2,)), ((0, 1), (1,)))
    vertical = np.array([0, 0, 1])
    told = [np.array([0.9, 0.1, 0.9]), np.array([0.5, 0.6, 0.0])]
    assert specialists_for(vertical, verticals, [True, True], told).tolist() == [0, 1, 1]
    assert specialists_for(vertical, verticals, [False, True], told).tolist() == [1, 1, 1]
    assert specialists_for(vertical, verticals, [True, True], [None, told[1]]).tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="no specialist of vertical two"):
        specialists_for(vertical, verticals, [True, False], told)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.sampled_from([1.0, 2.5]))
def test_targets_are_the_highest_of_the_specialist_within_its_vertical(seed: int, keep: int, t: float) -> None:
    random = np.random.default_rng(seed)
    space = LabelSpace(NAMES, ("east", "north"), ((3, 0, 2, 1), (2, 4, 5, 3)))
    verticals = verticals_of(space, chosen(verticals=TABLE))
    answers = [np.log(random.dirichlet(np.ones(4), 7)).astype(np.float32) for _ in range(2)]
    vertical = random.integers(0, 3, 7)
    sites = specialists_for(vertical, verticals, [True, True], [random.random(7), random.random(7)])
    labels, values = specialist_targets(answers, space.class_sets, verticals, vertical, sites, keep, t)
    for row in range(7):
        own = {c: answers[sites[row]][row, at] for at, c in enumerate(space.class_sets[sites[row]])}
        raw = {c: float(np.exp(np.float64(own[c]) / t)) for c in verticals.classes[vertical[row]]}
        expected = {c: p / sum(raw.values()) for c, p in raw.items()}
        best = sorted(expected.values(), reverse=True)[:keep]
        found = {int(c): float(v) for c, v in zip(labels[row], values[row], strict=True) if v > 0}
        assert sorted(found.values(), reverse=True) == pytest.approx(best, rel=1e-5)
        assert all(expected[c] == pytest.approx(v, rel=1e-5) for c, v in found.items())
        assert set(labels[row].tolist()) <= set(verticals.classes[vertical[row]])


def test_of_wanted_classes_the_highest_are_kept_as_they_are() -> None:
    space = LabelSpace(NAMES, ("east",), (tuple(range(6)),))
    verticals = verticals_of(space, chosen(verticals=TABLE))
    random, vertical = np.random.default_rng(3), np.array([0, 1, 2, 2])
    answers, sites = [np.log(random.dirichlet(np.ones(6), 4))], np.zeros(4, np.int64)
    wanted = np.isin(np.arange(6), [verticals.classes[0][1], *verticals.classes[2]])
    whole, part = (
        specialist_targets(answers, space.class_sets, verticals, vertical, sites, 6, wanted=mask)
        for mask in (None, wanted)
    )
    dense = [np.zeros((4, 6)), np.zeros((4, 6))]
    for held, (labels, values) in zip(dense, (whole, part), strict=True):
        np.add.at(held, (np.arange(4)[:, None], labels), values)
    np.testing.assert_allclose(dense[1], dense[0] * wanted)
    assert not part[1][1].any()
    assert verticals.among([verticals.classes[0][1], *verticals.classes[2]]).classes == ((0,), (1, 2))


def test_ties_go_to_the_first() -> None:
    at, values = highest(np.array([[0.25, 0.5, 0.25]]), 2)
    assert at.tolist() == [[1, 0]]
    assert values.tolist() == [[0.5, 0.25]]
