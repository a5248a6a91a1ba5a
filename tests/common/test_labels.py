"""Label spaces: alignment by name, synonyms, owner sets, components."""

from __future__ import annotations

import networkx as nx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from consilience.common.errors import LabelError
from consilience.common.labels import LabelSpace

CLASS_SETS = st.lists(
    st.lists(st.sampled_from("abcdefghij"), min_size=1, max_size=5, unique=True), min_size=1, max_size=6
)


def test_aligns_by_name_in_the_order_of_sites() -> None:
    space = LabelSpace.build({"b": ["cat", "dog"], "a": ["dog", "cow"]})
    assert space.sites == ("a", "b")
    assert space.names == ("dog", "cow", "cat")
    assert space.class_sets == ((0, 1), (2, 0))
    assert space.owners == ((0, 1), (0,), (1,))
    assert space.owner_sets == {(0, 1): (0,), (0,): (1,), (1,): (2,)}
    assert space.shared(0, 1) == (0,)
    assert space.index("cat") == 2
    with pytest.raises(LabelError, match="'horse'"):
        space.index("horse")


def test_synonyms_join_names_of_one_class() -> None:
    synonyms = {"t-shirt": ["T-shirt/top", "tee"]}
    space = LabelSpace.build({"a": ["T-shirt/top", "bag"], "b": ["tee", "coat"]}, synonyms)
    assert space.names == ("t-shirt", "bag", "coat")
    assert space.owners[0] == (0, 1)
    assert space.align(["coat", "tee", "hat"], synonyms) == [2, 0, -1]


def test_outer_spaces_and_unicode_forms_do_not_split_a_class() -> None:
    space = LabelSpace.build({"a": [" caf\u00e9 "], "b": ["cafe\u0301"]})
    assert space.names == ("caf\u00e9",)


@pytest.mark.parametrize(
    ("classes", "synonyms", "order", "words"),
    [
        ({}, {}, None, ["no sites"]),
        ({"a": []}, {}, None, ["Site a", "no classes"]),
        ({"a": ["cat", "cat"]}, {}, None, ["Site a", "'cat' twice"]),
        ({"a": ["cat", " "]}, {}, None, ["Site a", "empty name"]),
        ({"a": ["tee", "shirt"]}, {"top": ["tee", "shirt"]}, None, ["'tee' and 'shirt'", "'top'"]),
        ({"a": ["tee"]}, {"top": ["tee"], "shirt": ["tee"]}, None, ["'tee'", "'top'", "'shirt'"]),
        ({"a": ["cat"]}, {}, ["cat", "dog"], ["no site knows", "'dog'", "cat"]),
        ({"a": ["cat", "dog"]}, {}, ["cat"], ["lacks dog"]),
        ({"a": ["cat"]}, {}, ["cat", "cat"], ["'cat' is named twice"]),
    ],
)
def test_names_that_do_not_fit_are_refused(
    classes: dict[str, list[str]], synonyms: dict[str, list[str]], order: list[str] | None, words: list[str]
) -> None:
    with pytest.raises(LabelError) as caught:
        LabelSpace.build(classes, synonyms, order)
    for word in words:
        assert word in str(caught.value)
    assert caught.value.hint


def test_the_wanted_order_is_kept() -> None:
    space = LabelSpace.build({"a": ["cat", "dog"]}, order=["dog", "cat"])
    assert space.names == ("dog", "cat")
    assert space.class_sets == ((1, 0),)


@given(CLASS_SETS)
def test_components_are_those_of_the_overlap_graph(class_sets: list[list[str]]) -> None:
    space = LabelSpace.build({f"s{i}": classes for i, classes in enumerate(class_sets)})
    graph = nx.Graph()
    graph.add_nodes_from(space.names)
    for classes in class_sets:
        nx.add_path(graph, classes)
    groups = {frozenset(part) for part in nx.connected_components(graph)}
    found = {
        frozenset(n for n, c in zip(space.names, space.components, strict=True) if c == k)
        for k in set(space.components)
    }
    assert found == groups
    assert list(dict.fromkeys(space.components)) == list(range(len(groups)))
    assert bool(space.warnings()) == (len(groups) > 1)


def test_a_graph_that_falls_apart_is_warned_of_by_name() -> None:
    (warning,) = LabelSpace.build({"a": ["cat", "dog"], "b": ["bus"]}).warnings()
    assert "2 components" in warning
    assert "{cat, dog}" in warning
    assert "{bus}" in warning
