"""Events go into a ledger as name, parameters and count, and come back as they were, or not at all."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from consilience.client.privacy import Event, event_from, events_of, parameters_of
from consilience.client.privacy.events import (
    BareOutputs,
    DpSgdTraining,
    NoisyOutputs,
    PateAverage,
    PateThreshold,
    PateVotes,
)
from consilience.common.errors import StorageError
from consilience.common.settings import OutputNoise, Pate

SCALES = st.floats(min_value=1e-6, max_value=1e9)
COUNTS = st.integers(1, 2**53)
NOISY = [PateVotes, PateThreshold, PateAverage, NoisyOutputs]
EVENTS: st.SearchStrategy[Event] = st.one_of(
    *(st.builds(kind, sigma=SCALES, count=COUNTS) for kind in NOISY),
    st.builds(BareOutputs, count=COUNTS),
    st.builds(
        DpSgdTraining,
        noise_multiplier=SCALES,
        sample_rate=st.floats(1e-9, 1),
        steps=COUNTS,
        run=st.text("0123456789abcdef", min_size=64, max_size=64),
    ),
)


@given(EVENTS)
def test_an_event_survives_the_ledger(event: Event) -> None:
    kept = json.loads(json.dumps([event.name, parameters_of(event), event.count]))
    back = event_from(*kept)
    assert back == event
    assert hash(back) == hash(event)
    assert back.unit == event.unit
    assert "epsilon" not in kept[1]


def test_events_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        PateVotes(sigma=1, count=1).count = 2


def test_the_unit_goes_with_the_mechanism() -> None:
    units = {kind: kind(sigma=1, count=1).unit for kind in NOISY}
    assert units == {PateVotes: "record", PateThreshold: "record", PateAverage: "record", NoisyOutputs: "model"}
    assert BareOutputs(count=1).unit is None


GOOD: dict[str, Any] = {"sigma": 40.0}


@pytest.mark.parametrize(
    ("name", "parameters", "count"),
    [
        ("pate", GOOD, 1),
        ("", GOOD, 1),
        ("pate-votes", {}, 1),
        ("pate-votes", {"sigma": 0.0}, 1),
        ("pate-votes", {"sigma": -1.0}, 1),
        ("pate-votes", {"sigma": float("nan")}, 1),
        ("pate-votes", {"sigma": float("inf")}, 1),
        ("pate-votes", {"sigma": None}, 1),
        ("pate-votes", {**GOOD, "epsilon": 0.1}, 1),
        ("output-noise", {**GOOD, "unit": "record"}, 1),
        ("pate-votes", GOOD, 0),
        ("pate-votes", GOOD, -5),
        ("pate-votes", GOOD, 2**60),
        ("none", GOOD, 1),
        ("dp-sgd", {"noise_multiplier": 1.0, "sample_rate": 1.5, "steps": 1, "run": "a" * 64}, 1),
        ("dp-sgd", {"noise_multiplier": 1.0, "sample_rate": 0.5, "steps": 1, "run": "../x"}, 1),
        ("dp-sgd", {"noise_multiplier": 1.0, "sample_rate": 0.5, "steps": 1, "run": "a" * 64}, 2),
    ],
)
def test_an_event_that_was_tampered_with_is_refused(name: str, parameters: dict[str, Any], count: int) -> None:
    with pytest.raises(StorageError, match="is not as it must be"):
        event_from(name, parameters, count)


def test_what_answers_cost() -> None:
    votes = Pate(mechanism="pate", parts=9, sigma=4)
    assert events_of(votes, 7) == (PateVotes(sigma=4, count=7),)
    assert events_of(votes.model_copy(update={"answer": "average"}), 7) == (PateAverage(sigma=4, count=7),)
    sure = Pate(mechanism="pate", parts=9, sigma=4, answer="confident", threshold=5, threshold_sigma=6)
    assert events_of(sure, 7) == (PateThreshold(sigma=6, count=7), PateVotes(sigma=4, count=7))
    assert events_of(OutputNoise(mechanism="output-noise", sigma=2), 7) == (NoisyOutputs(sigma=2, count=7),)
    assert events_of(None, 7) == (BareOutputs(count=7),)
