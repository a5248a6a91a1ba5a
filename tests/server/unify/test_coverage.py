"""Coverage: closed forms, oracles, what must hold for any coverage, extremes, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import minimize

from consilience.common.errors import UnifyError
from consilience.server.unify import Unifier
from consilience.server.unify import centre as centre_module
from consilience.server.unify import unify as unify_by_strength
from consilience.server.unify.coverage import LEAST, read_coverage
from consilience.server.unify.covered import CoveredCE
from consilience.server.unify.partly import objective, solve
from consilience.server.unify.plan import make_plan

Draw = Callable[..., Any]
FloatArray = NDArray[np.float64]
seeds = st.integers(0, 10_000)
unify = partial(unify_by_strength, strength=1.0)
"""Most tests are of coverage at its full strength, where J is convex and oracles are simple."""
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def softmax(logits: FloatArray) -> FloatArray:
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def rows(*probs: list[float]) -> list[Any]:
    with np.errstate(divide="ignore"):
        return [np.log([p]) for p in probs]


def column(*values: float | None) -> list[Any]:
    return [None if v is None else np.array([v]) for v in values]


def true_coverage(problem: Any) -> list[FloatArray]:
    return [np.minimum(problem.truth[:, s].sum(axis=1), 1.0) for s in problem.class_sets]


def noisy_coverage(problem: Any, seed: int) -> list[FloatArray]:
    random = np.random.default_rng(seed)
    return [random.beta(0.7, 0.7, len(problem.truth)) for _ in problem.class_sets]


def value(
    q: FloatArray, problem: Any, row: int, coverage: list[Any], other: float, strength: FloatArray | None = None
) -> float:
    """J as it is written down, q over the classes and, last, what is outside the label space."""
    if strength is not None:
        full = value(q, problem, row, coverage, other)
        for i, (s, w) in enumerate(zip(problem.class_sets, problem.weights, strict=True)):
            if coverage[i] is None or (s.size == problem.num_classes and other == 0):
                continue
            p, mass = problem.probs[i][row], q[s].sum()
            c = np.clip(coverage[i][row], LEAST, 1 - LEAST)
            group = -(c * p @ np.log(q[s]) + (1 - c) * np.log(q.sum() - mass))
            full += w * (1 - strength[i]) * (np.log(mass) - p @ np.log(q[s]) - group)
        return full
    total = -other * np.log(q[-1]) if other > 0 else 0.0
    for i, (s, w) in enumerate(zip(problem.class_sets, problem.weights, strict=True)):
        p, mass = problem.probs[i][row], q[s].sum()
        c = 1.0 if coverage[i] is None else np.clip(coverage[i][row], LEAST, 1 - LEAST)
        rest = q.sum() - mass
        if coverage[i] is None:
            total += w * (np.log(mass) - p @ np.log(q[s]))
        elif s.size < problem.num_classes or other > 0:
            total -= w * (c * p @ np.log(q[s]) + (1 - c) * np.log(rest))
        else:
            total -= w * p @ np.log(q[s])
    return float(total)


def by_scipy(
    problem: Any, row: int, coverage: list[Any], other: float, strength: FloatArray | None = None
) -> FloatArray:
    """A minimum over the logits of all outcomes, from values of J alone."""
    size = problem.num_classes + (other > 0)

    def loss(u: FloatArray) -> float:
        q = softmax(u)
        return value(q if other > 0 else np.append(q, 0.0), problem, row, coverage, other, strength)

    found: Any = minimize(loss, np.zeros(size), method="L-BFGS-B", options={"maxiter": 5000, "maxfun": 200_000})
    found = minimize(loss, found.x, method="SLSQP", options={"ftol": 1e-15, "maxiter": 2000})
    q = softmax(found.x)
    return q if other > 0 else np.append(q, 0.0)


def by_em(problem: Any, coverage: list[FloatArray], other: float) -> FloatArray:
    """Expectation-maximisation: what a site denies is shared out among all that it does not know."""
    size, n = problem.num_classes, len(problem.truth)
    known, sums = np.zeros((len(coverage), size + 1)), np.zeros((n, size + 1))
    sums[:, size] = other
    denied = np.zeros((n, len(coverage)))
    for i, (s, w) in enumerate(zip(problem.class_sets, problem.weights, strict=True)):
        c = np.clip(coverage[i], LEAST, 1 - LEAST) if s.size < size or other > 0 else np.ones(n)
        known[i, s] = 1.0
        sums[:, s] += w * c[:, None] * problem.probs[i]
        denied[:, i] = w * (1 - c)
    q = np.ones((n, size + 1))
    q[:, size] = other > 0
    q /= q.sum(axis=1, keepdims=True)
    for _ in range(50_000):
        share = denied / np.maximum(q @ (1 - known).T, 1e-300)
        new = sums + q * (share @ (1 - known))
        new /= new.sum(axis=1, keepdims=True)
        if np.abs(new - q).max() < 1e-13:
            break
        q = new
    return np.asarray(q)


def test_disjoint_sites_have_the_masses_they_claim() -> None:
    random = np.random.default_rng(0)
    sets = [[0, 1], [2, 3, 4], [5]]
    probs = [softmax(random.normal(0, 2, (20, len(s)))) for s in sets]
    claims = softmax(random.normal(0, 3, (20, 3)))
    found = unify([np.log(p) for p in probs], sets, coverage=list(claims.T), weights=[1.0, 2.0, 0.5])
    expected = np.concatenate([c[:, None] * p for c, p in zip(claims.T, probs, strict=True)], axis=1)
    assert found.converged.all()
    assert found.residual.max() < 1e-9
    np.testing.assert_array_equal(found.components, 0)
    np.testing.assert_allclose(found.probs, expected, atol=1e-6)
    np.testing.assert_array_equal(found.other, 0.0)


@settings(max_examples=20)
@given(seed=seeds)
def test_sites_that_know_everything_are_plain_ce(seed: int) -> None:
    random = np.random.default_rng(seed)
    logits = [random.normal(size=(3, 4)) for _ in range(3)]
    sets = [random.permutation(4) for _ in range(3)]
    plain = unify(logits, sets)
    found = unify(logits, sets, coverage=[random.random(3), None, random.random(3)])
    assert found.converged.all()
    np.testing.assert_allclose(found.probs, plain.probs, atol=1e-7)


@settings(max_examples=40)
@given(seed=seeds, given_by=st.integers(1, 63))
def test_true_coverage_of_consistent_teachers_recovers_the_truth(draw: Draw, seed: int, given_by: int) -> None:
    problem = draw(seed, 4, noise=0.0, scale=1.5)
    coverage: list[Any] = [c if given_by >> i & 1 else None for i, c in enumerate(true_coverage(problem))]
    found = unify(problem.logits, problem.class_sets, coverage=coverage, weights=problem.weights)
    assert found.converged.all()
    np.testing.assert_allclose(found.probs, problem.truth, atol=2e-6)


@settings(max_examples=30)
@given(seed=seeds)
def test_certain_coverage_is_the_plain_average(draw: Draw, seed: int) -> None:
    # Nothing is denied: what is left of J is - sum W log q.
    problem = draw(seed, 3)
    ones = [np.ones(3)] * len(problem.class_sets)
    found = unify(problem.logits, problem.class_sets, coverage=ones, weights=problem.weights)
    naive = unify(problem.logits, problem.class_sets, method="sd", weights=problem.weights)
    assert found.converged.all()
    np.testing.assert_allclose(found.probs, naive.probs, atol=1e-5)


def test_no_coverage_is_plain_ce_bit_for_bit(draw: Draw) -> None:
    problem = draw(12, 50, noise=1.0, chain=False)
    plain = unify(problem.logits, problem.class_sets)
    found = unify(problem.logits, problem.class_sets, coverage=[None] * len(problem.class_sets))
    for name in ("probs", "components", "iterations", "converged", "residual", "other"):
        np.testing.assert_array_equal(getattr(found, name), getattr(plain, name))


@pytest.mark.parametrize("other", [0.0, 0.2])
def test_scipy_agrees(draw: Draw, other: float) -> None:
    for seed in range(25):
        problem = draw(seed, 1, scale=1.5)
        coverage: list[Any] = [np.clip(c, 0.02, 0.98) for c in noisy_coverage(problem, seed)]
        if seed % 2:
            coverage[seed % len(coverage)] = None
        found = unify(problem.logits, problem.class_sets, coverage=coverage, weights=problem.weights, other=other)
        assert found.converged.all()
        theirs = by_scipy(problem, 0, coverage, other)
        ours = np.append(found.probs[0] * (1.0 - found.other[0]), found.other[0]).astype(np.float64)
        assert value(ours, problem, 0, coverage, other) <= value(theirs, problem, 0, coverage, other) + 1e-6
        if all(c is not None for c in coverage):  # convex: there is no other minimum
            np.testing.assert_allclose(ours, theirs, atol=2e-4, err_msg=str(seed))


@pytest.mark.parametrize("other", [0.0, 0.2])
def test_scipy_agrees_at_every_strength(draw: Draw, other: float) -> None:
    for seed in range(20):
        problem = draw(seed, 1, scale=1.5)
        coverage: list[Any] = [np.clip(c, 0.02, 0.98) for c in noisy_coverage(problem, seed)]
        strength = np.random.default_rng(seed).uniform(0.1, 1.0, len(coverage))
        found = unify_by_strength(
            problem.logits,
            problem.class_sets,
            coverage=coverage,
            weights=problem.weights,
            strength=strength,
            other=other,
        )
        assert found.converged.all()
        theirs = by_scipy(problem, 0, coverage, other, strength)
        ours = np.append(found.probs[0] * (1.0 - found.other[0]), found.other[0]).astype(np.float64)
        least = value(theirs, problem, 0, coverage, other, strength)
        assert value(ours, problem, 0, coverage, other, strength) <= least + 1e-6


def test_a_sample_whose_objective_bends_is_solved_and_not_left_on_the_way() -> None:
    """A shoe in the eyes of coverage, each site sure of another class: steps that always fall creep here."""
    sets = [[0, 1, 2, 3, 4], [3, 4, 5, 6, 7], [0, 6, 7, 8, 9]]
    answers = [
        np.array([[-0.002, -15.859, -6.301, -12.703, -11.125]]),
        np.array([[-10.18, -11.602, -5.574, -0.004, -16.359]]),
        np.array([[-7.273, -6.23, -15.344, -0.003, -9.234]]),
    ]
    coverage = column(0.0647583, 0.010231018, 0.9140625)
    found = unify_by_strength(answers, sets, coverage=coverage, strength=0.1)
    assert found.converged.all()
    assert found.iterations[0] < 100
    # Where steps that always fall come to in 400 rounds; after 50 of them class 6 has 0.0084.
    np.testing.assert_allclose(found.probs[0, [0, 6, 8]], [0.013416, 0.003558, 0.982773], atol=1e-5)


@pytest.mark.parametrize("strength", [0.02, 0.3, 1.0])
def test_strength_changes_nothing_where_answers_leave_the_masses_open(strength: float) -> None:
    random = np.random.default_rng(1)
    sets = [[0, 1], [2, 3, 4], [5]]
    answers = [random.normal(0, 2, (20, len(s))) for s in sets]
    coverage = [random.uniform(0.1, 0.9, 20) for _ in sets]
    found = unify_by_strength(answers, sets, coverage=coverage, strength=strength)
    assert found.converged.all()
    np.testing.assert_allclose(found.probs, unify(answers, sets, coverage=coverage).probs, atol=1e-6)


def test_with_little_strength_overlapping_sites_are_nearly_plain_ce(draw: Draw) -> None:
    problem = draw(3, 20, noise=0.5)
    coverage = noisy_coverage(problem, 3)
    plain = unify(problem.logits, problem.class_sets, weights=problem.weights).probs
    gaps = []
    for strength in (1e-3, 1e-2, 1e-1):
        found = unify_by_strength(
            problem.logits, problem.class_sets, coverage=coverage, weights=problem.weights, strength=strength
        )
        assert found.converged.all()
        gaps.append(float(np.abs(found.probs - plain).max()))
    assert gaps[0] < 0.02
    assert gaps == sorted(gaps)


@pytest.mark.parametrize("other", [0.0, 0.05])
def test_em_agrees(draw: Draw, other: float) -> None:
    for seed in range(30):
        problem = draw(seed, 4)
        coverage = noisy_coverage(problem, seed)
        found = unify(problem.logits, problem.class_sets, coverage=coverage, weights=problem.weights, other=other)
        q = by_em(problem, coverage, other)
        assert found.converged.all()
        inside = q[:, :-1] / q[:, :-1].sum(axis=1, keepdims=True)
        np.testing.assert_allclose(found.probs, inside, atol=2e-6, err_msg=str(seed))
        np.testing.assert_allclose(found.other, q[:, -1], atol=2e-6, err_msg=str(seed))


def test_a_site_with_one_class_counts_by_its_coverage() -> None:
    found = unify(rows([0.5, 0.5], [1.0]), [[0, 1], [2]], coverage=column(0.7, 0.3))
    np.testing.assert_allclose(found.probs[0], [0.35, 0.35, 0.3], atol=1e-6)
    doubted = unify(rows([0.5, 0.5], [1.0]), [[0, 1], [1]], coverage=column(None, 0.9))
    np.testing.assert_allclose(doubted.probs[0], [(0.5 + 0.1) / 2, (0.5 + 0.9) / 2], atol=1e-6)


def test_other_takes_what_every_site_denies() -> None:
    found = unify(rows([0.3, 0.7], [0.6, 0.4]), [[0, 1], [2, 3]], coverage=column(0.2, 0.1), other=1e-6)
    np.testing.assert_allclose(found.other, 0.7, atol=1e-5)
    np.testing.assert_allclose(found.probs.sum(), 1.0, atol=1e-6)
    np.testing.assert_allclose(found.probs[0] * 0.3, [0.06, 0.14, 0.06, 0.04], atol=1e-5)
    # The closed world has to put the same sample somewhere: the masses that lie nearest.
    closed = unify(rows([0.3, 0.7], [0.6, 0.4]), [[0, 1], [2, 3]], coverage=column(0.2, 0.1))
    np.testing.assert_allclose(closed.probs[0, :2].sum(), (0.2 + 0.9) / 2, atol=1e-6)


@pytest.mark.parametrize("left", [0.5, 0.1, 0.01, 1e-3, 1e-4])
def test_other_takes_what_is_left_over_however_little_that_and_its_prior_are(left: float) -> None:
    # Its price lies between the floor under masses and that over the mass: it tells the floor, not the mass.
    found = unify(rows([1.0], [1.0]), [[0], [1]], coverage=column(1 - left, 1e-6), other=1e-12)
    np.testing.assert_allclose(found.other, left - 1e-6, rtol=1e-3)


def test_what_one_component_denies_belongs_to_the_others() -> None:
    sets = [[0, 1], [2, 3, 4], [5, 6]]
    answers = rows([0.9, 0.1], [0.5, 0.3, 0.2], [0.6, 0.4])
    one = unify(answers, sets, coverage=column(0.3, None, 0.2))
    np.testing.assert_array_equal(one.components, 0)
    np.testing.assert_allclose(one.probs[0], [0.27, 0.03, 0.25, 0.15, 0.1, 0.12, 0.08], atol=1e-6)
    two = unify(answers, sets, coverage=column(None, 0.6, None), across="equal")
    np.testing.assert_array_equal(two.components, [0, 0, 1, 1, 1, 2, 2])
    np.testing.assert_allclose(two.probs[0], [0.18, 0.02, 0.3, 0.18, 0.12, 0.12, 0.08], atol=1e-6)
    by_size = unify(answers, sets, coverage=column(0.3, None, None), across="proportional")
    np.testing.assert_array_equal(by_size.components, [0, 0, 1, 1, 1, 2, 2])
    np.testing.assert_allclose(by_size.probs[0, 2:5].sum(), 0.7 * 3 / 5, atol=1e-6)


def test_what_coverage_overclaims_is_taken_from_the_rest() -> None:
    sets = [[0, 1], [2, 3], [4, 5]]
    found = unify(rows([0.9, 0.1], [0.5, 0.5], [0.6, 0.4]), sets, coverage=column(0.9, 0.9, None))
    assert found.converged.all()
    np.testing.assert_allclose(found.probs[0], [0.45, 0.05, 0.25, 0.25, 0.0, 0.0], atol=1e-6)


def test_sites_of_an_open_component_keep_their_weights() -> None:
    answers = rows([0.8, 0.2], [0.5, 0.5], [0.1, 0.9], [1.0])
    alone = unify(answers[:3], [[0, 1], [1, 2], [0, 2]], weights=[1.0, 2.0, 3.0])
    found = unify(
        answers, [[0, 1], [1, 2], [0, 2], [3]], weights=[1.0, 2.0, 3.0, 4.0], coverage=column(None, None, None, 0.4)
    )
    np.testing.assert_allclose(found.probs[0], [*(0.6 * alone.probs[0]), 0.4], atol=1e-6)


def test_a_mass_far_below_the_floor_keeps_its_size() -> None:
    truth = np.array([1e-20, 0.5, 0.3, 0.2])
    found = unify(rows([1e-20, 0.5], [0.5, 0.3], [1.0]), [[0, 1], [1, 2], [3]], coverage=column(0.5, 0.8, 0.2))
    np.testing.assert_allclose(found.probs[0], truth, rtol=1e-6)


@settings(max_examples=25)
@given(seed=seeds, missing=st.booleans())
def test_order_and_doubling_change_nothing(draw: Draw, seed: int, missing: bool) -> None:
    problem = draw(seed, 3)
    coverage: list[Any] = noisy_coverage(problem, seed)
    if missing:
        coverage[-1] = None
    random = np.random.default_rng(seed)
    order = random.permutation(len(coverage))
    names = random.permutation(problem.num_classes)
    plain = unify(problem.logits, problem.class_sets, coverage=coverage, weights=problem.weights)
    moved = unify(
        [problem.logits[i] + 3.0 for i in order],
        [names[problem.class_sets[i]] for i in order],
        coverage=[coverage[i] for i in order],
        weights=7.0 * problem.weights[order],
    )
    np.testing.assert_allclose(moved.probs[:, names], plain.probs, atol=5e-6)
    twice = unify(
        [*problem.logits, problem.logits[0]],
        [*problem.class_sets, problem.class_sets[0]],
        coverage=[*coverage, coverage[0]],
        weights=[problem.weights[0] / 2, *problem.weights[1:], problem.weights[0] / 2],
    )
    np.testing.assert_allclose(twice.probs, plain.probs, atol=5e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("missing", [False, True])
def test_blocks_change_nothing(draw: Draw, missing: bool, device: str) -> None:
    problem = draw(12, 101, noise=0.5, chain=False)
    coverage: list[Any] = noisy_coverage(problem, 0)
    if missing:
        coverage[0] = None
    whole = unify(problem.logits, problem.class_sets, coverage=coverage, device=device, block=101)
    for block in (1, 7, None):
        parts = unify(problem.logits, problem.class_sets, coverage=coverage, device=device, block=block)
        np.testing.assert_allclose(parts.probs, whole.probs, rtol=5e-7, atol=1e-12)
        np.testing.assert_array_equal(parts.converged, whole.converged)
        np.testing.assert_array_equal(parts.iterations, whole.iterations)


def test_kinds_of_arrays(draw: Draw, tmp_path: Path) -> None:
    problem = draw(5, 9)
    coarse = [c.astype(np.float16) for c in noisy_coverage(problem, 1)]
    expected = unify(problem.logits, problem.class_sets, coverage=[c.astype(np.float64) for c in coarse]).probs
    np.testing.assert_array_equal(unify(problem.logits, problem.class_sets, coverage=coarse).probs, expected)
    tensors = [torch.from_numpy(c) for c in coarse]
    np.testing.assert_array_equal(unify(problem.logits, problem.class_sets, coverage=tensors).probs, expected)
    maps = []
    for i, c in enumerate(coarse):
        np.save(tmp_path / f"{i}.npy", c)
        maps.append(np.load(tmp_path / f"{i}.npy", mmap_mode="r"))
    np.testing.assert_array_equal(unify(problem.logits, problem.class_sets, coverage=maps, block=2).probs, expected)


def test_a_unifier_takes_coverage_call_by_call(draw: Draw) -> None:
    problem = draw(5, 20)
    coverage = noisy_coverage(problem, 1)
    unifier = Unifier(problem.class_sets, strength=1.0)
    plain = unifier(problem.logits).probs
    whole = unifier(problem.logits, coverage=coverage).probs
    partly: list[Any] = [None, *coverage[1:]]
    assert np.abs(unifier(problem.logits, coverage=partly).probs - whole).max() > 1e-3
    parts = [unifier([z[k : k + 5] for z in problem.logits], coverage=[c[k : k + 5] for c in coverage]) for k in (0, 5)]
    np.testing.assert_allclose(np.concatenate([p.probs for p in parts]), whole[:10], rtol=5e-7)
    np.testing.assert_array_equal(unifier(problem.logits).probs, plain)


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_coverage_is_about_the_truth_before_it_is_softened(draw: Draw, temperature: float) -> None:
    problem = draw(3, 5, noise=0.0, scale=1.5)
    found = unify(problem.logits, problem.class_sets, coverage=true_coverage(problem), temperature=temperature)
    np.testing.assert_allclose(found.probs, softmax(np.log(problem.truth) / temperature), atol=2e-6)


def test_sd_mixes_by_coverage() -> None:
    answers = rows([0.9, 0.1], [0.5, 0.5])
    found = unify(answers, [[0, 1], [1, 2]], method="sd", coverage=column(0.6, 0.2), weights=[1.0, 2.0])
    np.testing.assert_allclose(found.probs[0], [0.54, 0.06 + 0.2, 0.2], atol=1e-6)


def test_no_samples() -> None:
    found = unify([np.zeros((0, 2))] * 2, [[0, 1], [1, 2]], coverage=[np.zeros(0), None])
    assert found.probs.shape == (0, 3)
    assert found.other.shape == (0,)


@pytest.mark.parametrize("tiny", [1e-10, 1e-30, 0.0])
def test_a_class_that_only_its_denial_elsewhere_speaks_for(tiny: float) -> None:
    # Site 0 is sure of its classes and sees none of class 1; site 1 denies the classes 2 and 0. What is left is
    # class 1, whatever site 0 makes of it.
    found = unify(rows([1 - tiny, tiny], [0.5, 0.5]), [[2, 1], [2, 0]], coverage=column(1.0, 0.0))
    assert found.converged.all()
    np.testing.assert_allclose(found.probs[0], [0.0, 0.5, 0.5], atol=2e-6)


def test_zeros_and_ones_are_bounded() -> None:
    for claims in ((0.0, 0.0), (1.0, 1.0)):
        found = unify(rows([0.9, 0.1], [0.2, 0.8]), [[0, 1], [2, 3]], coverage=column(*claims))
        assert found.converged.all()
        np.testing.assert_allclose(found.probs[0], [0.45, 0.05, 0.1, 0.4], atol=1e-6)
    found = unify(rows([0.9, 0.1], [0.2, 0.8]), [[0, 1], [2, 3]], coverage=column(1.0, 0.0))
    np.testing.assert_allclose(found.probs[0], [0.9, 0.1, 0.0, 0.0], atol=2e-6)


def test_wild_answers_and_coverage_converge() -> None:
    random = np.random.default_rng(0)
    sets = [random.choice(12, 5, replace=False) for _ in range(8)]
    for scale in (10, 100, 1000):
        answers = [scale * random.normal(size=(40, 5)) for _ in sets]
        coverage = [(1 + np.tanh(scale * random.normal(size=40))) / 2 for _ in sets]
        found = unify(answers, sets, 12, coverage=coverage)
        assert found.converged.all()
        assert found.residual.max() < 1e-8
        small = unify(answers, sets, 12, coverage=[np.full(40, 1e-3)] * 8)
        assert small.converged.all()


def test_a_hundred_sites() -> None:
    random = np.random.default_rng(0)
    sets = [random.choice(200, 6, replace=False) for _ in range(100)]
    used = np.unique(np.concatenate(sets))
    sets = [np.searchsorted(used, s) for s in sets]
    truth = softmax(random.normal(0, 2, (3, used.size)))
    coverage: list[Any] = [truth[:, s].sum(axis=1) if i % 4 else None for i, s in enumerate(sets)]
    found = unify([np.log(truth[:, s]) for s in sets], sets, coverage=coverage)
    assert found.converged.all()
    np.testing.assert_allclose(found.probs, truth, atol=1e-6)


def stacked(problem: Any, coverage: list[Any]) -> tuple[CoveredCE, tuple[torch.Tensor, ...]]:
    """The estimator, and the arguments of `solve`: A, d, weights of sites without coverage."""
    plan = make_plan(problem.class_sets, None, problem.weights, torch.device("cpu"))
    estimator = CoveredCE(plan, tuple(c is not None for c in coverage), np.ones(plan.num_sites), 0.0, "centred")
    answers = torch.from_numpy(np.log(np.concatenate([p.T for p in problem.probs])))
    known = read_coverage(coverage, 0, len(problem.truth), 0, plan.device)
    return estimator, estimator.masses(answers, known)[1:]


def test_without_some_coverage_every_round_goes_down(draw: Draw) -> None:
    falls = 0
    for seed in range(12):
        problem = draw(seed, 8, noise=1.0, scale=2.5)
        coverage: list[Any] = noisy_coverage(problem, seed)
        coverage[0] = None
        estimator, (masses, denied, weights) = stacked(problem, coverage)
        if weights.numel() == 0:
            continue
        values = []
        for rounds in (0, 1, 2, 3, 5, 50):
            found = solve(estimator._frame, masses, denied, weights, rounds)
            values.append(objective(estimator._frame, masses, denied, weights, found.point))
        assert found.converged.all()
        steps = torch.stack(values).diff(dim=0)
        assert (steps <= 1e-11).all()
        falls += int((steps[0] < -1e-6).sum())
    assert falls > 20


@pytest.mark.parametrize("missing", [False, True])
def test_running_out_of_steps_is_reported(draw: Draw, monkeypatch: pytest.MonkeyPatch, missing: bool) -> None:
    problem = draw(12, 20, noise=1.0, chain=False)
    coverage: list[Any] = noisy_coverage(problem, 0)
    if missing:
        coverage[0] = None
    whole = unify(problem.logits, problem.class_sets, coverage=coverage)
    assert whole.converged.all()
    real = centre_module.centre
    few = {"max_steps": 0 if missing else 1}  # one step a round, and as many rounds as it takes, is enough
    monkeypatch.setattr("consilience.server.unify.partly.centre", lambda *a, **k: real(*a, **{**k, **few}))
    found = unify(problem.logits, problem.class_sets, coverage=coverage)
    assert not found.converged.any()
    assert missing or found.residual.min() > 1e-9
    np.testing.assert_allclose(found.probs.sum(axis=1), 1.0, atol=1e-6)


SETS: list[Any] = [[0, 1], [1, 2]]
HALVES: list[Any] = [np.full(3, 0.5), np.full(3, 0.5)]


def spoilt(row: int, bad: float) -> list[Any]:
    coverage = [c.copy() for c in HALVES]
    coverage[1][row] = bad
    return coverage


@pytest.mark.parametrize(
    ("coverage", "options", "parts"),
    [
        (HALVES[:1], {}, ["coverage of 1 sites", "2 class sets"]),
        ([HALVES[0], np.zeros(4)], {}, ["site 1", "(4,)", "(3,)"]),
        ([HALVES[0], np.zeros((3, 1))], {}, ["site 1", "(3, 1)", "(3,)"]),
        ([HALVES[0], np.zeros(3, dtype=int)], {}, ["site 1", "floating"]),
        ([HALVES[0], [0.1, 0.2, 0.3]], {}, ["site 1", "floating"]),
        (spoilt(2, float("nan")), {}, ["site 1", "nan", "row 2"]),
        (spoilt(1, -0.01), {}, ["site 1", "-0.01", "row 1"]),
        (spoilt(0, 1.5), {}, ["site 1", "1.5", "row 0"]),
        (spoilt(1, float("inf")), {"method": "sd"}, ["site 1", "inf", "row 1"]),
        (HALVES, {"method": "mf-p"}, ["'mf-p'", "coverage"]),
        (HALVES, {"method": "mf-lv"}, ["'mf-lv'", "coverage"]),
        (HALVES, {"method": "mf-lf"}, ["'mf-lf'", "coverage"]),
        ([None, HALVES[1]], {"method": "sd"}, ["sd", "site 0"]),
        (None, {"other": 0.1}, ["other 0.1", "coverage"]),
        ([None, None], {"other": 0.1}, ["other 0.1", "coverage"]),
        (HALVES, {"strength": 0.0}, ["strength 0", "site 0", "at most 1"]),
        (HALVES, {"strength": [0.5, 1.5]}, ["strength 1.5", "site 1"]),
        (HALVES, {"strength": [0.5, float("nan")]}, ["strength nan", "site 1"]),
        (HALVES, {"strength": [0.5, 0.5, 0.5]}, ["strength", "(3,)", "(2,)"]),
        (HALVES, {"other": -1.0}, ["other -1.0"]),
        (HALVES, {"other": float("nan")}, ["other nan"]),
        (HALVES, {"other": 0.1, "method": "sd"}, ["'sd'", "other"]),
    ],
)
def test_refusals(coverage: Any, options: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UnifyError) as caught:
        unify([np.zeros((3, 2))] * 2, SETS, coverage=coverage, **options)
    for part in parts:
        assert part in str(caught.value)


def test_other_needs_coverage_in_every_component() -> None:
    with pytest.raises(UnifyError, match="class 2"):
        unify(rows([0.5, 0.5], [0.5, 0.5]), [[0, 1], [2, 3]], coverage=column(0.5, None), other=0.1)


def test_rows_are_counted_from_the_first_of_the_whole() -> None:
    with pytest.raises(UnifyError, match="row 1002"):
        Unifier(SETS)([np.zeros((3, 2))] * 2, coverage=spoilt(2, 2.0), first_row=1000)
    with pytest.raises(UnifyError, match="row 2"):
        Unifier(SETS, block=1)([np.zeros((3, 2))] * 2, coverage=spoilt(2, 2.0))
