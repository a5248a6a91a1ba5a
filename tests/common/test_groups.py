"""Groups of classes in the label space, and what a job with groups refuses before anything is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import least_squares

from consilience.common.errors import LabelError, SettingsError
from consilience.common.labels import LabelSpace
from consilience.common.settings import JobSettings
from consilience.common.settings_file import dump_settings, load_settings, parse_settings

ANIMALS = {"animal": ["cat", "dog", "horse"]}


def test_a_class_that_is_called_as_a_group_stands_for_its_classes() -> None:
    sites = {"coarse": ["car", "animal"], "fine": ["dog", "cat", "bus"], "plain": ["bus", "car"]}
    space = LabelSpace.build(sites, groups=ANIMALS)
    assert space.names == ("car", "cat", "dog", "horse", "bus")
    assert space.class_sets == ((0, 1, 2, 3), (2, 1, 4), (4, 0))
    assert space.entries(0) == ((0,), (1, 2, 3))
    assert space.entries(1) == ((2,), (1,), (4,))
    assert [sorted(space.tells(i)) for i in range(3)] == [[0, 3], [1, 2, 4], [0, 4]]
    assert space.tellers == ((0, 2), (1,), (1,), (), (1, 2))
    assert space.owners == ((0, 2), (0, 1), (0, 1), (0,), (1, 2))
    (warning,) = space.warnings()
    assert "answers on horse alone" in warning


def test_names_of_groups_and_classes_are_compared_as_names_are() -> None:
    sites = {"a": [" Tiere ", "bus"], "b": ["Katze", "dog"]}
    synonyms = {"animal": ["Tiere"], "cat": ["Katze"]}
    space = LabelSpace.build(sites, synonyms, groups={" animal": ["Katze", "dog "]})
    assert space.names == ("cat", "dog", "bus")
    assert space.entries(0) == ((0, 1), (2,))


def test_without_a_site_that_uses_them_groups_change_nothing() -> None:
    sites = {"a": ["cat", "dog"], "b": ["dog", "bus"]}
    assert LabelSpace.build(sites, groups=ANIMALS) == LabelSpace.build(sites)


def test_classes_that_no_site_tells_apart_are_warned_of() -> None:
    sites = {"a": ["animal", "bus"], "b": ["animal", "car"], "c": ["cat", "car"]}
    space = LabelSpace.build(sites, groups=ANIMALS)
    assert space.lumped == ((1, 2),)
    (warning,) = space.warnings()
    assert "tells dog, horse apart" in warning
    assert "cat" not in warning


def test_the_wanted_order_may_hold_what_is_known_in_groups_alone() -> None:
    order = ["dog", "bus", "horse", "cat"]
    space = LabelSpace.build({"a": ["animal", "bus"]}, order=order, groups=ANIMALS)
    assert space.names == tuple(order)
    assert space.entries(0) == ((3, 0, 2), (1,))


@given(
    st.lists(st.lists(st.sampled_from("abcdef"), min_size=2, max_size=4, unique=True), min_size=1, max_size=3),
    st.lists(st.lists(st.sampled_from(["a", "b", "c", "d", "e", "f", "g0", "g1", "g2"]), max_size=5, unique=True)),
)
def test_entries_are_the_site_s_names_spelled_out(members: list[list[str]], named: list[list[str]]) -> None:
    """A label space is refused exactly where a site's entries overlap, or are one group alone; else nothing is lost."""
    groups = {f"g{k}": held for k, held in enumerate(members)}
    sites = {f"s{k}": [n for n in names if n[0] != "g" or n in groups] for k, names in enumerate(named)}
    sites = {site: names for site, names in sites.items() if names}
    wanted = {site: [groups.get(name, [name]) for name in names] for site, names in sites.items()}
    fits = [
        len({c for e in entries for c in e}) == sum(map(len, entries)) and not (len(entries) == 1 < len(entries[0]))
        for entries in wanted.values()
    ]
    if not sites or not all(fits):
        with pytest.raises(LabelError):
            LabelSpace.build(sites, groups=groups)
        return
    space = LabelSpace.build(sites, groups=groups)
    for i, site in enumerate(space.sites):
        assert [[space.names[c] for c in entry] for entry in space.entries(i)] == wanted[site]
        assert space.class_sets[i] == tuple(c for entry in space.entries(i) for c in entry)
        assert space.tells(i) <= set(space.class_sets[i])
    for label, sites_ in enumerate(space.tellers):
        assert sites_ == tuple(i for i in range(len(space.sites)) if (label,) in space.entries(i))
    # Whoever is asked: all sites together tell of every class.
    assert set().union(*(space.tells(i) for i in range(len(space.sites)))) == set(range(len(space)))


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        ({"a": ["animal", "cat"]}, ["Site a", "'animal' and 'cat'", "both are about 'cat'"]),
        ({"a": ["pet", "animal"]}, ["Site a", "'pet' and 'animal'", "'cat'"]),
        ({"a": ["animal"], "b": ["cat", "dog"]}, ["Site a", "'animal' alone", "says nothing"]),
        ({"a": ["animal", "animal"]}, ["'animal' twice"]),
    ],
)
def test_sites_whose_answers_do_not_exclude_one_another_are_refused(
    classes: dict[str, list[str]], words: list[str]
) -> None:
    with pytest.raises(LabelError) as caught:
        LabelSpace.build(classes, groups={**ANIMALS, "pet": ["cat", "mouse"]})
    for word in words:
        assert word in caught.value.message
    assert caught.value.hint


def job(**raw: Any) -> JobSettings:
    return parse_settings({"name": "a", "pool": "pool", **raw}, JobSettings, source="job.yaml", folder=Path("/home"))


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ({"groups": {"animal": ["cat"]}}, ["'animal' holds 1 class;", "two or more"]),
        ({"groups": {"animal": []}}, ["'animal' holds 0 classes"]),
        ({"groups": {"animal": ["cat", "cat"]}}, ["'animal' holds 'cat' twice", "Name every class once".lower()]),
        ({"groups": {"animal": ["cat", " "]}}, ["'animal' holds a class without a name"]),
        ({"groups": {" ": ["cat", "dog"]}}, ["empty name"]),
        ({"groups": {"animal": ["cat", "dog"], "animal ": ["cat", "cow"]}}, ["'animal ' is named twice"]),
        ({"groups": {"animal": ["cat", "animal"]}}, ["'animal' holds 'animal', which is a group"]),
        ({"groups": {"animal": ["cat", "pet"], "pet": ["dog", "cow"]}}, ["holds 'pet', which is a group"]),
        ({"groups": ANIMALS, "classes": ["cat", "dog", "horse", "animal"]}, ["'animal' stands in labels.classes too"]),
        ({"groups": ANIMALS, "classes": ["cat", "dog", "bus"]}, ["holds 'horse', which labels.classes lacks"]),
        ({"groups": ANIMALS, "synonyms": {"cat": ["animal"]}}, ["'animal' is by labels.synonyms", "'cat', a class"]),
        (
            {"groups": {"animal": ["cat", "Katze"]}, "synonyms": {"cat": ["Katze"]}},
            ["'animal' holds 'cat' twice"],
        ),
        ({"groups": {"animal": "cat"}}, ["labels.groups.animal"]),
    ],
)
def test_groups_that_are_none_are_refused(labels: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(SettingsError) as caught:
        job(labels=labels)
    for word in ["job.yaml", "labels.groups", *words]:
        assert word in caught.value.message


REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({"unify": {"method": "sd"}}, ["unify.method is 'sd'", "must be 'ce'"]),
    ({"unify": {"method": "mf-p"}}, ["unify.method is 'mf-p'", "must be 'ce'"]),
    ({"unify": {"temperature": 2}}, ["unify.temperature is 2.0", "must be 1.0"]),
    ({"unify": {"prior_correction": True}}, ["unify.prior_correction is True", "must be False"]),
    ({"unify": {"robust": True}}, ["unify.robust is True", "must be False"]),
    ({"privacy": {"secure_sum": True}}, ["privacy.secure_sum is True", "must be False"]),
    ({"student": {"classes": ["cat", "bus"]}}, ["student.classes is ['cat', 'bus']", "must be left out"]),
    ({"student": {"other": True}, "unify": {"other": 0.1}}, ["student.other is True", "must be False"]),
    ({"student": {"learning": "direct-ce"}}, ["student.learning is 'direct-ce'", "soft-labels, layer-wise"]),
    ({"student": {"learning": "direct-mf-lf"}}, ["student.learning is 'direct-mf-lf'", "soft-labels"]),
    ({"student": {"learning": "concentration"}}, ["student.learning is 'concentration'", "soft-labels"]),
    ({"student": {"learning": "filtered"}}, ["student.learning is 'filtered'", "soft-labels"]),
    (
        {"student": {"learning": "layer-wise", "layer_wise": {"target": "concatenated"}}},
        ["student.layer_wise.target is 'concatenated'", "must be 'unified'"],
    ),
    (
        {"student": {"learning": "common-feature", "common_feature": {"target": "concatenated"}}},
        ["student.common_feature.target is 'concatenated'", "must be 'unified'"],
    ),
]


@pytest.mark.parametrize(("settings", "words"), REFUSED)
def test_what_takes_answers_on_single_classes_is_refused(settings: dict[str, Any], words: list[str]) -> None:
    job(**settings)  # without groups it is taken
    with pytest.raises(SettingsError) as caught:
        job(labels={"groups": ANIMALS}, **settings)
    for word in ["job.yaml", "labels.groups", *words]:
        assert word in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("learning", ["soft-labels", "layer-wise", "common-feature"])
def test_a_job_with_groups_comes_back_from_its_file(tmp_path: Path, learning: str) -> None:
    made = job(
        labels={"groups": ANIMALS, "classes": ["horse", "cat", "dog", "bus"]},
        unify={"other": 0.1, "weights": {"a": 2}, "across": "equal"},
        student={"learning": learning},
        privacy={"sealed": True},
    )
    dump_settings(made, tmp_path / "job.yaml")
    held = load_settings(tmp_path / "job.yaml", JobSettings)
    assert held == made
    assert not held.same_job(held.model_copy(update={"labels": held.labels.model_copy(update={"groups": {}})}))


FARM = {"animal": ["cat", "dog", "cow", "horse"]}


def test_odds_that_stay_open_inside_a_group_are_warned_of() -> None:
    sites = {"coarse": ["animal", "bus"], "pets": ["cat", "dog"], "stable": ["cow", "horse"]}
    (warning,) = LabelSpace.build(sites, groups=FARM).warnings()
    assert "all odds between {cat, dog}; {cow, horse}; {bus}: groups" in warning
    assert LabelSpace.build({**sites, "both": ["dog", "cow"]}, groups=FARM).warnings() == []
    # a class of the one and a class outside are enough: what is left of the animals are the others
    assert LabelSpace.build({**sites, "street": ["dog", "bus"]}, groups=FARM).warnings() == []


NAMED = st.lists(st.sampled_from(["a", "b", "c", "d", "g0", "g1"]), min_size=2, max_size=5, unique=True)


@given(st.lists(NAMED, min_size=1, max_size=4))
def test_odds_are_open_exactly_where_a_label_can_move_unseen(named: list[list[str]]) -> None:
    """Against a search for another label that gives every site the same answers, from many starts."""
    groups = {"g0": ["a", "b"], "g1": ["c", "d"]}
    held = [n for n in named if not any(c in n for g in n if g in groups for c in groups[g])]
    sites = {f"s{k}": names for k, names in enumerate(held) if len(names) > 1}
    if not sites:
        return
    space = LabelSpace.build(sites, groups=groups)
    entries = [space.entries(k) for k in range(len(space.sites))]
    random = np.random.default_rng(1)
    truth = random.dirichlet(np.ones(len(space)))

    def told(logs: np.ndarray) -> np.ndarray:
        values = np.exp(logs)
        sums = [[values[list(e)].sum() for e in held] for held in entries]
        return np.concatenate([np.log(np.array(s[1:]) / s[0]) for s in sums])

    wanted = told(np.log(truth))
    moved = False
    for _ in range(8):
        start = np.log(truth) + random.normal(0, 0.5, len(space))
        found = least_squares(lambda logs: told(logs) - wanted, start, xtol=1e-14, ftol=1e-14, gtol=1e-14)
        if np.abs(found.fun).max() < 1e-9:
            gap = found.x - np.log(truth)
            for k in range(max(space.components) + 1):
                own = gap[[c for c, n in enumerate(space.components) if n == k]]
                moved = moved or bool(np.ptp(own) > 1e-4)
    assert moved == bool(space.lumped or any("do not determine all odds" in line for line in space.warnings()))
