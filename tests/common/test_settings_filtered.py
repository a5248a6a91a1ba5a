from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from consilience.common.settings.filtered import Filtered


@pytest.mark.parametrize(
    "field",
    [
        {"epochs": 0},
        {"learning_rate": 0},
        {"held_out": 0},
        {"held_out": 0.6},
        {"held_out": float("nan")},
        {"order": "random"},
        {"filters": "shortcut"},
        {"branches": "student"},
        {"target": "labels"},
        {"tasks": "class"},
        {"tail": 1},
        {"branches": "random", "joint": False},
    ],
)
def test_values_that_are_not_allowed(field: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Filtered.model_validate(field)


def test_soft_answers_are_learnt_by_default() -> None:
    settings = Filtered()
    assert (settings.hard, settings.target, settings.branches, settings.order) == (
        False,
        None,
        "teacher",
        "in-turn",
    )
