"""Sharing a labelled set out: every image to one place, class lists kept, the seed alone decides."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from consilience.common.errors import MissingExtraError, SettingsError
from consilience.common.settings import Simulation
from consilience.deploy.partition import Partition, partition

NAMES = [f"class {k}" for k in range(8)]
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(8), [40, 60, 50, 30, 45, 55, 35, 85]))


def simulation(scheme: dict[str, Any], **fields: Any) -> Simulation:
    raw = {
        "data": {"kind": "embedded"},
        "test": {"kind": "embedded", "split": "test"},
        "teachers": [{"kind": "train", "architecture": "cnn3"}],
        "partition": scheme,
        **fields,
    }
    return Simulation.model_validate(raw)


def lists(*classes: Sequence[int | str], **fields: Any) -> Simulation:
    return simulation({"kind": "class-lists", "classes": classes}, **fields)


def check_disjoint(parts: Partition, labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Assert what holds for every partition; returns the ids in use, sorted."""
    used = np.concatenate([parts.pool, *parts.sites])
    assert len(np.unique(used)) == len(used)
    assert len(parts.sites) == len(parts.classes) == len(parts.counts)
    for ids, classes, counts in zip(parts.sites, parts.classes, parts.counts, strict=True):
        assert len(ids) > 0
        assert ids.dtype == np.int64
        assert (np.diff(ids) > 0).all()
        assert classes == tuple(sorted(set(labels[ids].tolist())))
        assert counts.tolist() == [int((labels[ids] == k).sum()) for k in range(parts.counts.shape[1])]
    return np.sort(used)


def same(a: Partition, b: Partition) -> bool:
    pairs = [(a.pool, b.pool), (a.counts, b.counts), *zip(a.sites, b.sites, strict=True)]
    return all(np.array_equal(x, y) for x, y in pairs) and a.classes == b.classes


class_lists = st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=8, unique=True), min_size=1, max_size=5)


@given(class_lists, st.floats(0.05, 0.8), st.sampled_from([0.0, 0.7, 5.0]), st.integers(0, 2**63 - 1))
@settings(max_examples=40)
def test_class_lists_are_honoured_and_every_owned_image_is_used_once(
    classes: list[list[int]], share: float, skew: float, seed: int
) -> None:
    parts = partition(LABELS, NAMES, lists(*classes, pool_share=share, quantity_skew=skew), seed)
    used = check_disjoint(parts, LABELS)
    assert parts.classes == tuple(tuple(sorted(listed)) for listed in classes)
    owned = np.isin(LABELS, [k for listed in classes for k in listed])
    assert set(np.flatnonzero(owned)) <= set(used)
    pool_counts = np.bincount(LABELS[parts.pool], minlength=8)
    assert len(parts.pool) == round(share * len(LABELS))
    assert np.abs(pool_counts - share * np.bincount(LABELS)).max() < 1


@given(st.integers(1, 12), st.floats(1, 6), st.integers(0, 100))
@settings(max_examples=60)
def test_random_classes_are_as_many_a_site_and_as_near_to_the_overlap_as_can_be(
    sites: int, overlap: float, seed: int
) -> None:
    assume(overlap <= sites)
    parts = partition(LABELS, NAMES, simulation({"kind": "random-classes", "sites": sites, "overlap": overlap}), seed)
    used = check_disjoint(parts, LABELS)
    assert used.tolist() == list(range(len(LABELS)))
    (each,) = {len(classes) for classes in parts.classes}
    assert {k for classes in parts.classes for k in classes} == set(range(8))
    possible = [k for k in range(1, 9) if k * sites >= 8]
    assert abs(each * sites / 8 - overlap) == pytest.approx(min(abs(k * sites / 8 - overlap) for k in possible))


def test_random_classes_differ_by_seed_and_overlap_decides_the_number_of_owners() -> None:
    def owners(seed: int) -> list[tuple[int, ...]]:
        scheme = simulation({"kind": "random-classes", "sites": 4, "overlap": 1.5})
        return list(partition(LABELS, NAMES, scheme, seed).classes)

    assert len({tuple(owners(seed)) for seed in range(5)}) == 5
    assert sum(map(len, owners(0))) == 12  # 1.5 owners for each of 8 classes, 3 classes for each of 4 sites


def test_random_classes_skip_classes_without_images() -> None:
    scheme = simulation({"kind": "random-classes", "sites": 3, "overlap": 2})
    parts = partition(LABELS, [*NAMES, "absent"], scheme, 0)
    assert parts.counts.shape == (3, 9)
    assert parts.counts[:, 8].tolist() == [0, 0, 0]


@given(st.integers(1, 6), st.sampled_from([0.1, 0.5, 100.0]), st.sampled_from([0.0, 1.0]), st.integers(0, 2**63 - 1))
@settings(max_examples=30)
def test_dirichlet_uses_every_image_once_and_no_site_has_few_of_a_class(
    sites: int, alpha: float, skew: float, seed: int
) -> None:
    scheme = {"kind": "dirichlet", "sites": sites, "alpha": alpha, "min_images": 5}
    try:
        parts = partition(LABELS, NAMES, simulation(scheme, quantity_skew=skew), seed)
    except SettingsError as error:
        assert "would get no image" in error.message  # noqa: PT017 - most seeds do give every site some
        assert alpha < 1 or skew
        return
    assert check_disjoint(parts, LABELS).tolist() == list(range(len(LABELS)))
    assert parts.counts[parts.counts > 0].min() >= 5
    assert (parts.counts.sum(axis=0) > 0).all()


def test_small_alpha_is_uneven_and_large_alpha_is_even() -> None:
    def spread(alpha: float) -> float:
        scheme = {"kind": "dirichlet", "sites": 4, "alpha": alpha, "min_images": 1}
        counts = partition(np.repeat(np.arange(8), 100), NAMES, simulation(scheme), 3).counts
        return float(np.std(counts / counts.sum(axis=0)))

    assert spread(1000.0) < 0.02 < 0.2 < spread(0.2)


@pytest.mark.parametrize("alpha", [1e-320, 1e300, float("inf")])
def test_dirichlet_takes_any_alpha_the_settings_take(alpha: float) -> None:
    scheme = simulation({"kind": "dirichlet", "sites": 2, "alpha": alpha, "min_images": 1})
    assert len(check_disjoint(partition(LABELS, NAMES, scheme, 1), LABELS)) == len(LABELS)


SCHEMES: list[dict[str, Any]] = [
    {"kind": "class-lists", "classes": [["class 0", 1, 2, 3], [2, "class 3", 4, 5], [5, 6, 7, 0]]},
    {"kind": "random-classes", "sites": 4, "overlap": 2},
    {"kind": "dirichlet", "sites": 3, "alpha": 1.0},
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme["kind"])
def test_the_seed_alone_decides(scheme: dict[str, Any]) -> None:
    chosen = simulation(scheme, quantity_skew=0.5)
    first = partition(LABELS, NAMES, chosen, 7)
    random.seed(1)
    np.random.seed(1)
    expected = random.random(), np.random.random()
    random.seed(1)
    np.random.seed(1)
    assert same(first, partition(LABELS.astype(np.uint8), NAMES, chosen, 7))
    assert (random.random(), np.random.random()) == expected
    other = partition(LABELS, NAMES, chosen, 8)
    assert set(first.pool.tolist()) != set(other.pool.tolist())
    assert not np.array_equal(first.sites[0], other.sites[0])


@pytest.mark.parametrize("scheme", SCHEMES[:2], ids=lambda scheme: scheme["kind"])
def test_skew_changes_sizes_and_neither_classes_nor_pool(scheme: dict[str, Any]) -> None:
    even, skewed = (partition(LABELS, NAMES, simulation(scheme, quantity_skew=s), 2) for s in (0, 2))
    assert np.array_equal(even.pool, skewed.pool)
    assert even.classes == skewed.classes
    for k in range(8):
        owners = even.counts[:, k] > 0
        assert np.ptp(even.counts[owners, k]) <= 1
    assert [len(ids) for ids in even.sites] != [len(ids) for ids in skewed.sites]
    assert np.array_equal(even.counts.sum(axis=0), skewed.counts.sum(axis=0))


def test_skew_of_dirichlet_changes_sizes() -> None:
    labels = np.repeat(np.arange(8), 200)
    scheme = {"kind": "dirichlet", "sites": 4, "alpha": 50.0}
    even, skewed = (
        np.std([len(ids) for ids in partition(labels, NAMES, simulation(scheme, quantity_skew=s), 5).sites])
        for s in (0.0, 1.0)
    )
    assert skewed > 3 * even


def test_skewed_weights_are_log_normal() -> None:
    """With one class shared by many, sizes are the weights: their logarithms have standard deviation sigma."""
    labels = np.zeros(2_000_000, np.int64)
    scheme = lists(*[[0]] * 400, quantity_skew=0.8, pool_share=0.1)
    logs = np.log([len(ids) for ids in partition(labels, ["only"], scheme, 0).sites])
    assert np.std(logs) == pytest.approx(0.8, rel=0.1)
    assert abs(float(np.mean(((logs - logs.mean()) / logs.std()) ** 3))) < 0.4


def test_the_pool_is_not_in_the_order_of_the_classes() -> None:
    labels = np.repeat(np.arange(8), 50)
    pool = partition(labels, NAMES, lists([*range(8)]), 0).pool
    assert (np.diff(labels[pool]) < 0).mean() > 0.3


def test_names_and_indices_mean_the_same() -> None:
    by_name = lists(["class 1", "class 0"], ["class 7"])
    assert same(partition(LABELS, NAMES, by_name, 0), partition(LABELS, NAMES, lists([1, 0], [7]), 0))


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        (lists([0], [1, "Class 1"]), ("simulation.partition.classes.1", "'Class 1'", "class 1, class 2", "0 to 7")),
        (lists([0, 8]), ("simulation.partition.classes.0", "holds 8", "0 to 7")),
        (lists([-1]), ("simulation.partition.classes.0", "holds -1", "0 to 7")),
        (lists([10**30]), ("simulation.partition.classes.0", "0 to 7")),
        (lists([3, 4, "class 3"]), ("simulation.partition.classes.0", "'class 3' twice")),
        (lists([0], []), ("simulation.partition.classes.1", "empty")),
        (lists(*[[3]] * 29, pool_share=0.4), ("'class 3'", "18 private images", "29 sites")),
        (lists([0], pool_share=0.001), ("simulation.pool_share", "a pool of 0", "at least one")),
        (lists([0], pool_share=0.9999), ("simulation.pool_share", "a pool of 400", "at least one")),
        (simulation({"kind": "random-classes", "sites": 3, "overlap": 3.5}), ("overlap", "3.5", "1 to 3")),
        (simulation({"kind": "random-classes", "sites": 3, "overlap": float("inf")}), ("overlap", "1 to 3")),
        (simulation({"kind": "random-classes", "sites": 10**12}), ("1000000000000 sites", "240 private")),
        (simulation({"kind": "dirichlet", "sites": 241}), ("241 sites", "240 private images")),
        (simulation({"kind": "dirichlet", "sites": 100, "alpha": 0.1}), ("would get no image", "min_images (5)")),
        (simulation({"kind": "dirichlet", "sites": 2, "min_images": 19}), ("min_images is 19", "'class 3'", "1 to 18")),
    ],
)
def test_refused_settings_name_field_value_and_what_is_allowed(chosen: Simulation, said: tuple[str, ...]) -> None:
    with pytest.raises(SettingsError) as caught:
        partition(LABELS, NAMES, chosen, 0)
    for part in said:
        assert part in caught.value.message
    assert caught.value.hint


def test_a_long_list_of_names_is_cut_short() -> None:
    with pytest.raises(SettingsError) as caught:
        partition(np.arange(1000), [f"n{k}" for k in range(1000)], lists(["no"]), 0)
    assert len(caught.value.message) < 300
    assert "1000 names" in caught.value.message


def test_no_images_at_all_are_refused() -> None:
    with pytest.raises(SettingsError, match="pool_share"):
        partition(np.empty(0, np.int64), NAMES, lists([0]), 0)


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flwr_datasets.partitioner", None)
    with pytest.raises(MissingExtraError) as caught:
        partition(LABELS, NAMES, simulation({"kind": "dirichlet", "sites": 2}), 0)
    assert "pip install 'consilience[partition]'" in caught.value.hint
    assert "flwr_datasets" in caught.value.message


OFFLINE = """
import socket, sys
def refuse(*args, **kwargs):
    raise SystemExit("the network was used")
socket.socket.connect = socket.socket.connect_ex = socket.socket.sendto = socket.getaddrinfo = refuse
import consilience.deploy.partition as module
assert not {"datasets", "flwr_datasets", "torch"} & set(sys.modules), "imported without need"
sys.path.insert(0, sys.argv[1])
from test_partition import LABELS, NAMES, simulation
module.partition(LABELS, NAMES, simulation({"kind": "dirichlet", "sites": 2}), 0)
assert "flwr_datasets" in sys.modules
import threading
assert not [thread.name for thread in threading.enumerate() if "telemetry" in thread.name.lower()]
"""


def test_flower_datasets_is_imported_late_and_leaves_the_network_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process of its own with telemetry not switched off; the home, but for Matplotlib's, must stay empty."""
    monkeypatch.delenv("FLWR_TELEMETRY_ENABLED", raising=False)
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    for variable in ("HOME", "HF_HOME", "FLWR_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(variable, str(home))
    monkeypatch.setenv("MPLCONFIGDIR", str(elsewhere))
    command = [sys.executable, "-c", OFFLINE, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=elsewhere)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(home.iterdir()) == []
