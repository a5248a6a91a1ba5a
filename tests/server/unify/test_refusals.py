"""Everything that cannot be unified is refused with a message that says what and where."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from consilience.common.errors import UnifyError
from consilience.server.unify import Prior, Unifier, unify

SETS: list[Any] = [[0, 1], [1, 2]]


def answers(rows: int = 3) -> list[Any]:
    return [np.zeros((rows, 2)), np.zeros((rows, 2))]


def spoilt(site: int, row: int, values: list[float]) -> list[Any]:
    out = answers()
    out[site][row] = values
    return out


def message(*args: Any, **options: Any) -> str:
    with pytest.raises(UnifyError) as caught:
        unify(*args, **options)
    assert not caught.value.message.endswith(".")
    return str(caught.value)


@pytest.mark.parametrize(
    ("class_sets", "num_classes", "parts"),
    [
        ([], None, ["no site"]),
        ([[0, 1], []], None, ["site 1", "empty"]),
        ([[0, 1], [1, 1]], None, ["site 1", "class 1", "more than once"]),
        ([[0, 1], [1, -2]], None, ["site 1", "-2"]),
        ([[0, 1], [1, 2]], 2, ["site 1", "index 2", "2 classes"]),
        ([[0, 1], [1, 2]], 5, ["class 3", "no site", "2 such"]),
        ([[0, 1], [1, 3]], None, ["class 2", "no site"]),
        ([[0, 1], [1.0, 2.0]], None, ["site 1", "float64"]),
        ([[0, 1], [True, False]], None, ["site 1", "bool"]),
        ([[0, 1], [[1, 2]]], None, ["site 1", "2 dimensions"]),
    ],
)
def test_class_sets(class_sets: Any, num_classes: int | None, parts: list[str]) -> None:
    found = message(answers(), class_sets, num_classes)
    for part in parts:
        assert part in found


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (answers()[:1], ["1 sites", "2 class sets"]),
        ([np.zeros((3, 2)), np.zeros((3, 3))], ["site 1", "(3, 3)", "(n, 2)"]),
        ([np.zeros((3, 2)), np.zeros(2)], ["site 1", "(2,)"]),
        ([np.zeros((3, 2)), np.zeros((4, 2))], ["site 1", "4 rows", "site 0 3"]),
        ([np.zeros((3, 2)), np.zeros((3, 2), dtype=int)], ["site 1", "int64", "floating"]),
        ([np.zeros((3, 2)), [[0.0, 1.0]] * 3], ["site 1", "neither"]),
        (spoilt(1, 2, [0.0, np.nan]), ["site 1", "NaN", "row 2"]),
        (spoilt(0, 1, [np.inf, 0.0]), ["site 0", "+inf", "row 1"]),
        (spoilt(0, 1, [np.inf, np.nan]), ["site 0", "NaN", "row 1"]),
        (spoilt(1, 0, [-np.inf, -np.inf]), ["site 1", "nothing but -inf", "row 0"]),
    ],
)
def test_answers(given: Any, parts: list[str]) -> None:
    for method in ("ce", "sd"):
        found = message(given, SETS, method=method)
        for part in parts:
            assert part in found


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"method": "mf"}, "method 'mf' is none of sd, ce, mf-p, mf-lv, mf-lf"),
        ({"across": "max"}, "across 'max' is none of centred, equal, proportional"),
        ({"weights": [1.0]}, "weights have shape (1,) instead of (2,)"),
        ({"weights": [1.0, 0.0]}, "weight 0.0 of site 1"),
        ({"weights": [np.nan, 1.0]}, "weight nan of site 0"),
        ({"weights": [np.inf, 1.0]}, "weight inf of site 0"),
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"regularisation": 0.1}, "method 'ce' has no regularisation"),
        ({"method": "mf-lf", "regularisation": -0.1}, "regularisation -0.1"),
        ({"method": "mf-lf", "regularisation": float("inf")}, "regularisation inf"),
        ({"method": "mf-lv", "regularisation": 0.0}, "regularisation 0"),
        ({"block": 0}, "block 0"),
        ({"device": "abacus"}, "'abacus'"),
        ({"prior": Prior([1.0, 1.0], [[1.0, 1.0], [1.0, 1.0]])}, "target prior has shape (2,) instead of (3,)"),
        ({"prior": Prior([1.0, 0.0, 1.0], [[1.0, 1.0], [1.0, 1.0]])}, "target prior holds 0.0 at position 1"),
        ({"prior": Prior([1.0, 1.0, 1.0], [[1.0, 1.0]])}, "priors of 1 sites but 2 class sets"),
        ({"prior": Prior([1.0, 1.0, 1.0], [[1.0, 1.0], [1.0]])}, "prior of site 1 has shape (1,)"),
        ({"prior": Prior([1.0, 1.0, 1.0], [[1.0, 1.0], [1.0, -1.0]])}, "prior of site 1 holds -1.0"),
    ],
)
def test_options(options: dict[str, Any], part: str) -> None:
    assert part in message(answers(), SETS, **options)


def test_rows_are_counted_from_the_first_of_the_whole() -> None:
    with pytest.raises(UnifyError, match="row 1002"):
        Unifier(SETS)(spoilt(1, 2, [0.0, np.nan]), first_row=1000)


def test_the_first_bad_row_is_named_whatever_the_block() -> None:
    given = answers(50)
    given[1][[17, 40], 0] = np.nan
    for block in (1, 7, 50):
        assert "row 17" in message(given, SETS, block=block)


def test_the_first_class_set_too_large_is_named() -> None:
    assert "site 0" in message(answers(), [[0, 9], [1, 9]], 3)


def test_negative_infinity_is_an_answer() -> None:
    found = unify(spoilt(1, 0, [-np.inf, 0.0]), SETS)
    assert np.isfinite(found.probs).all()
    assert found.converged.all()
