"""Inputs that a fuzzer found for every decoder that faces the network, and changes of good ones: taken or refused.

The corpus is what `benchmarks/fuzz_decoders.py --keep` left: of the inputs that reached something new, the hundred
shortest, so not all that it reached. Ten minutes a decoder are atheris's, there; hypothesis tries a few changes here.
What decoders take of memory for megabytes is in test_decoder_memory.py.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.fuzz_targets import TARGETS, kept, measured

NAMES = sorted(TARGETS)


@pytest.fixture(autouse=True, scope="module")
def _watched() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.parametrize("name", NAMES)
def test_its_first_inputs_are_taken(name: str) -> None:
    assert TARGETS[name].seeds
    assert all(measured(TARGETS[name], data)[0] for data in TARGETS[name].seeds)


@pytest.mark.parametrize("name", NAMES)
def test_every_kept_input_is_taken_or_refused(name: str) -> None:
    inputs = kept(name)
    assert len(inputs) >= 3
    for data in inputs:
        measured(TARGETS[name], data)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25)
@given(data=st.data())
def test_whatever_becomes_of_a_good_input_is_taken_or_refused(name: str, data: st.DataObject) -> None:
    whole = data.draw(st.sampled_from(TARGETS[name].seeds))
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    measured(TARGETS[name], whole[:start] + data.draw(st.binary(max_size=40)) + whole[stop:])
