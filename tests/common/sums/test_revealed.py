"""What sums give away of single sites: the null space of the sums says so too."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from consilience.common.sums.revealed import determined

sets = st.lists(st.sets(st.integers(0, 6), min_size=1), min_size=1, max_size=5)


def by_linear_algebra(class_sets: list[list[int]], known: set[int]) -> dict[str, tuple[int, ...]]:
    """A number is determined when no direction that keeps all sums, and each site's, moves it."""
    edges = [(site, label) for site, labels in enumerate(class_sets) for label in labels]
    rows = [[float(label == number) for _, label in edges] for number in range(7)]
    rows += [[float(site == s) for site, _ in edges] for s in range(len(class_sets))]
    rows += [[float(edge == e) for edge in range(len(edges))] for e, (site, _) in enumerate(edges) if site in known]
    _, values, directions = np.linalg.svd(np.array(rows))
    free = directions[np.sum(values > 1e-9) :]
    still = {edge for edge, moved in zip(edges, np.abs(free).max(axis=0, initial=0), strict=True) if moved < 1e-9}
    return {
        f"s{site}": tuple(label for label in labels if (site, label) in still)
        for site, labels in enumerate(class_sets)
        if site not in known
    }


@given(sets, st.sets(st.integers(0, 4), max_size=2))
def test_as_linear_algebra_says(drawn: list[set[int]], colluding: set[int]) -> None:
    class_sets = [sorted(labels) for labels in drawn]
    known = {site for site in colluding if site < len(class_sets)}
    found = determined({f"s{i}": labels for i, labels in enumerate(class_sets)}, {f"s{i}" for i in known})
    assert found == by_linear_algebra(class_sets, known)


def test_examples() -> None:
    # A chain: every answer follows from the sums, link by link.
    assert determined({"a": [0, 1], "b": [1, 2]}) == {"a": (0, 1), "b": (1, 2)}
    # Two sites with the same classes hide each other; a class of one site alone does not hide.
    assert determined({"a": [0, 1, 2], "b": [0, 1]}) == {"a": (2,), "b": ()}
    # Three that hide each other, and what is left when one of them tells.
    three = {"a": [0, 1], "b": [0, 1], "c": [0, 1]}
    assert determined(three) == {"a": (), "b": (), "c": ()}
    assert determined(three, ["c"]) == {"a": (), "b": ()}
    assert determined(three, ["b", "c"]) == {"a": (0, 1)}


def test_many_classes_take_no_time() -> None:
    many = list(range(50_000))
    assert determined({"a": many, "b": many, "c": [0, 50_000]}) == {"a": (), "b": (), "c": (0, 50_000)}
