"""Sharing out images of any number of labels: each goes to one place, and a site tells of its own labels alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from consilience.common.errors import SettingsError
from consilience.common.settings import Simulation
from consilience.deploy.partition_labels import partition_labels

NAMES = ("a", "b", "c", "d")
LISTS: dict[str, Any] = {"kind": "class-lists", "classes": [["b", "a"], [1, 2], ["d"]]}


def simulation(partition: Any = None, **changes: Any) -> Simulation:
    data = {"kind": "npz", "path": "a.npz"}
    raw = {"data": data, "test": data, "partition": partition or LISTS}
    raw["teachers"] = [{"kind": "train", "architecture": "cnn3", "labels": "multi"}]
    return Simulation.model_validate(raw | changes)


def labels(n: int = 200, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2, (n, 4)).astype(np.int8)


@given(st.integers(150, 250), st.floats(0.1, 0.6), st.floats(0, 1), st.integers(0, 3))
def test_every_image_goes_to_one_place(n: int, share: float, skew: float, seed: int) -> None:
    many = labels(n)
    parts = partition_labels(many, NAMES, simulation(pool_share=share, quantity_skew=skew), seed)
    assert sorted(np.concatenate([parts.pool, *parts.sites]).tolist()) == list(range(n))
    assert len(parts.pool) == round(share * n)
    assert parts.classes == ((0, 1), (1, 2), (3,))
    for ids, own, counts in zip(parts.sites, parts.classes, parts.counts, strict=True):
        assert len(ids) >= 1
        assert np.array_equal(np.flatnonzero(counts), [k for k in own if many[ids, k].any()])
        assert counts[list(own)].tolist() == many[ids][:, list(own)].sum(axis=0).tolist()
    again = partition_labels(many, NAMES, simulation(pool_share=share, quantity_skew=skew), seed)
    assert np.array_equal(again.pool, parts.pool)


def test_another_seed_shares_out_otherwise_and_random_lists_own_every_label() -> None:
    drawn = simulation({"kind": "random-classes", "sites": 3, "overlap": 1.5})
    parts = partition_labels(labels(), NAMES, drawn, 0)
    assert {k for own in parts.classes for k in own} == {0, 1, 2, 3}
    assert not np.array_equal(partition_labels(labels(), NAMES, drawn, 1).pool, parts.pool)


@pytest.mark.parametrize(
    ("changes", "many", "reason"),
    [
        ({"partition": {"kind": "dirichlet", "sites": 2}}, labels(), "'dirichlet', which shares out images of one"),
        ({"pool_share": 0.99}, labels(), "allowed: at least one image in the pool and one for each of 3"),
        ({"partition": {"kind": "class-lists", "classes": [["e"]]}}, labels(), "holds 'e'"),
        ({}, labels() * np.array([1, 1, 1, 0], np.int8), "no image of site 3 of 3"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(changes: dict[str, Any], many: np.ndarray, reason: str) -> None:
    with pytest.raises(SettingsError, match=reason):
        partition_labels(many, NAMES, simulation(**changes), 0)
