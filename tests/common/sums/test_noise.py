"""Shares of noise against brute force over who may fail."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consilience.common.cards import SumNoiseCard
from consilience.common.errors import SettingsError
from consilience.common.sums.noise import SharedNoise
from consilience.common.sums.ring import MOST_SITES, NOISE_STEPS, NoisyRing, Ring

SITES: tuple[str, ...] = ("ant", "bee", "cow", "dog", "elk")
sets = st.fixed_dictionaries({site: st.sets(st.integers(0, 5), min_size=1).map(tuple) for site in SITES})


def least(
    noise: SharedNoise, class_sets: dict[str, tuple[int, ...]], noisy: list[str], honest: int, site: str
) -> float:
    """The least noise of `honest` of the noisy sites, `site` among them, in any of its classes: by trying all."""
    worst = np.inf
    others = [name for name in noisy if name != site]
    for chosen in combinations(others, honest - 1):
        carried = np.zeros(6)
        for name in (site, *chosen):
            carried[list(class_sets[name])] += noise.shares(name) ** 2
        worst = min(worst, float(np.sqrt(carried[list(class_sets[site])].min())))
    return worst


@settings(max_examples=60)
@given(sets, st.integers(1, 5), st.floats(0.01, 1e3), st.integers(3, 5))
def test_sites_that_want_the_same_have_it_whoever_fails(
    class_sets: dict[str, tuple[int, ...]], honest: int, sigma: float, noisy: int
) -> None:
    names = list(SITES[:noisy])
    honest = min(honest, noisy)
    noise = SharedNoise(class_sets, {name: SumNoiseCard(sigma=sigma, honest=honest) for name in names}, 6)
    for name in names:
        assert noise.shortage(name, 5) == ""
        assert least(noise, class_sets, names, honest, name) >= sigma * (1 - 1e-9)
    assert noise.shortage("elk", 5) == ""
    low, high = noise.bounds()
    assert sigma / np.sqrt(honest) <= low * (1 + 1e-9)
    assert high <= sigma


@settings(max_examples=60)
@given(sets, st.lists(st.tuples(st.floats(0.5, 2), st.integers(1, 5)), min_size=5, max_size=5))
def test_no_site_is_told_that_there_is_enough_where_there_is_not(
    class_sets: dict[str, tuple[int, ...]], wanted: list[tuple[float, int]]
) -> None:
    cards = {name: SumNoiseCard(sigma=s, honest=h) for name, (s, h) in zip(SITES, wanted, strict=True)}
    noise = SharedNoise(class_sets, cards, 6)
    for name, card in cards.items():
        found = least(noise, class_sets, list(SITES), card.honest, name)
        if noise.shortage(name, 5) == "":
            assert found >= card.sigma * (1 - 1e-8)


def test_noise_where_all_know_all_is_shared_out_evenly() -> None:
    all_ = dict.fromkeys(SITES, (0, 1))
    noise = SharedNoise(all_, {name: SumNoiseCard(sigma=3.0, honest=4) for name in SITES}, 2)
    np.testing.assert_allclose(noise.shares("ant"), 3 / 2)
    np.testing.assert_allclose(noise.variances(SITES), 5 * 9 / 4)
    np.testing.assert_allclose(noise.variances(["ant"]), 9 / 4)


def test_a_class_that_one_knows_alone_has_all_of_its_noise() -> None:
    noise = SharedNoise(
        {"ant": (0, 1), "bee": (1,), "cow": (1,)},
        {n: SumNoiseCard(sigma=2.0, honest=3) for n in ("ant", "bee", "cow")},
        2,
    )
    np.testing.assert_allclose(noise.shares("ant"), [2, 2 / np.sqrt(3)])


def test_too_few_sites_or_too_little_of_others() -> None:
    all_ = dict.fromkeys(SITES, (0, 1))
    three = SharedNoise(all_, {name: SumNoiseCard(sigma=1.0, honest=3) for name in SITES[:3]}, 2)
    assert three.shortage("ant", 5) == ""
    assert three.shortage("dog", 3) == ""  # it wants none
    assert three.shortage("ant", 4) == (
        "site ant trusts that 3 sites add their noise; 3 of 5 add any, and 2 of these need to stay"
    )
    cards = {name: SumNoiseCard(sigma=1.0 if name != "ant" else 2.0, honest=3) for name in SITES}
    uneven = SharedNoise(all_, cards, 2)
    assert uneven.shortage("bee", 5) == ""
    assert uneven.shortage("ant", 5).startswith("site ant needs noise 2; class 0 is sure to carry 1.414")
    alone = SharedNoise(all_, {**cards, "ant": SumNoiseCard(sigma=2.0, honest=1)}, 2)
    assert alone.shortage("ant", 5) == ""


def test_noisy_numbers_are_read_back_with_their_sign() -> None:
    ring = NoisyRing([1.0, 2.0], [3, 2], (0.5, 1.0))
    assert ring.unit == pytest.approx(NOISE_STEPS)
    assert ring.unit >= 2 * ring.scale + np.sqrt(3 / 2) - 1e-9
    steps = np.array([[-5, 0, 7]], np.int64)
    np.testing.assert_allclose(ring.decode(steps.astype(np.uint32)), steps / ring.scale)
    assert isinstance(ring, Ring)


@settings(max_examples=30)
@given(st.lists(st.floats(1, 2), min_size=3, max_size=MOST_SITES), st.floats(0.01 / 16, 1e3))
def test_noisy_sums_do_not_wrap(weights: list[float], share: float) -> None:
    ring = NoisyRing(weights, [10] * len(weights), (share, share))
    largest = ring.scale * sum(weights) + len(weights) * (9 * share * ring.unit + 1)
    assert largest < 2**31
    assert share * ring.unit >= 2**8


@pytest.mark.parametrize(("shares", "widths"), [((0.001, 1.0), [3]), ((1e6, 1e6), [3]), ((100.0, 100.0), [10**8])])
def test_noise_that_does_not_fit(shares: tuple[float, float], widths: list[int]) -> None:
    with pytest.raises(SettingsError, match="shares of noise between"):
        NoisyRing([1.0] * 3, widths * 3, shares)
