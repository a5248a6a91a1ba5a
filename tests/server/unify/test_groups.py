"""Unification of answers on groups of classes, against a direct optimum of the same objective."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import logsumexp

from consilience.common.errors import UnifyError
from consilience.server.unify import GroupUnifier, unify
from consilience.server.unify.ce import CE
from consilience.server.unify.groups import Split
from consilience.server.unify.plan import make_plan

Floats = NDArray[np.float64]
Entries = list[int | list[int]]

MIXED: list[Entries] = [[[0, 1, 2], [3, 4], 5], [0, 1, 2, 3], [3, 4, 5], [[0, 3], 1, 5]]


def members(entry: int | list[int]) -> list[int]:
    return [entry] if isinstance(entry, int) else entry


def objective(u: Floats, answers: list[Floats], sets: list[Entries], weights: Floats) -> tuple[float, Floats]:
    """sum_i w_i (log q(L_i) - sum_g p_i(g) log q(g)), and its gradient, written out."""
    value, gradient = 0.0, np.zeros_like(u)
    for w, p, entries in zip(weights, answers, sets, strict=True):
        whole = [label for entry in entries for label in members(entry)]
        log_whole = logsumexp(u[whole])
        value += w * log_whole
        gradient[whole] += w * np.exp(u[whole] - log_whole)
        for mass, entry in zip(p, entries, strict=True):
            classes = members(entry)
            log_mass = logsumexp(u[classes])
            value -= w * mass * log_mass
            gradient[classes] -= w * mass * np.exp(u[classes] - log_mass)
    return value, gradient


def direct(answers: list[Floats], sets: list[Entries], weights: Floats, size: int) -> Floats:
    """The best of several descents."""
    random = np.random.default_rng(0)
    starts = [np.zeros(size), *random.normal(size=(4, size))]
    about = {"args": (answers, sets, weights), "jac": True, "method": "BFGS", "options": {"gtol": 1e-10}}
    found = min((minimize(objective, start, **about) for start in starts), key=lambda result: result.fun)
    return np.exp(found.x - logsumexp(found.x))


def noisy(
    random: np.random.Generator, sets: list[Entries], size: int, rows: int, noise: float
) -> tuple[list[Floats], Floats]:
    """Answers (rows, k) that a truth (rows, size) gives, in probabilities, with noise on the log scale."""
    truth = random.dirichlet(np.ones(size), rows)
    answers = []
    for entries in sets:
        p = np.stack([truth[:, members(entry)].sum(1) for entry in entries], axis=1)
        p = p * np.exp(noise * random.normal(size=p.shape))
        answers.append(p / p.sum(1, keepdims=True))
    return answers, truth


def test_exact_answers_give_the_truth_back() -> None:
    answers, truth = noisy(np.random.default_rng(1), MIXED, 6, 50, 0.0)
    found = GroupUnifier(MIXED)([np.log(p) for p in answers])
    assert found.converged.all()
    np.testing.assert_allclose(found.probs, truth, atol=1e-6)


def test_a_direct_optimum_of_the_objective_is_the_same() -> None:
    weights = np.array([1.0, 0.5, 2.0, 1.5])
    answers, _ = noisy(np.random.default_rng(2), MIXED, 6, 12, 0.7)
    found = GroupUnifier(MIXED, weights=weights)([np.log(p) for p in answers])
    assert found.converged.all()
    for row in range(12):
        best = direct([p[row] for p in answers], MIXED, weights, 6)
        np.testing.assert_allclose(found.probs[row], best, atol=1e-6)


def test_without_groups_it_is_ce() -> None:
    sets: list[Entries] = [[0, 1, 2], [2, 3, 4], [1, 3]]
    answers, _ = noisy(np.random.default_rng(3), sets, 5, 30, 1.0)
    logs = [np.log(p) for p in answers]
    np.testing.assert_allclose(GroupUnifier(sets)(logs).probs, unify(logs, sets).probs, atol=1e-6)


def test_classes_seen_only_together_get_equal_shares() -> None:
    sets: list[Entries] = [[[0, 1], 2], [2, 3]]
    found = GroupUnifier(sets)([np.log([[0.8, 0.2]]), np.log([[0.5, 0.5]])])
    np.testing.assert_allclose(found.probs[0], np.array([2, 2, 1, 1]) / 6, atol=1e-6)


def test_results_do_not_depend_on_the_block() -> None:
    answers, _ = noisy(np.random.default_rng(4), MIXED, 6, 40, 1.0)
    logs = [np.log(p) for p in answers]
    one, many = GroupUnifier(MIXED, block=1)(logs), GroupUnifier(MIXED, block=40)(logs)
    np.testing.assert_allclose(one.probs, many.probs, atol=1e-7)
    np.testing.assert_array_equal(one.converged, many.converged)


@pytest.mark.parametrize("fast", [False, True])
def test_the_objective_never_rises(fast: bool) -> None:
    flat = [np.array([label for entry in entries for label in members(entry)]) for entries in MIXED]
    plan = make_plan(flat, None, None, torch.device("cpu"))
    split = Split(plan, np.array([len(members(entry)) for entries in MIXED for entry in entries]))
    answers, _ = noisy(np.random.default_rng(5), MIXED, 6, 200, 4.0)
    told = torch.from_numpy(np.log(np.concatenate(answers, axis=1)).T.copy())
    solver = CE(plan)
    values = [
        split.objective(told, split.maximise(told, lambda p, _: solver(p), fast=fast, most=most).scores)
        for most in (*range(2, 30, 3), 62)
    ]
    for before, after in itertools.pairwise(values):
        assert (after <= before + 1e-9).all()
    assert (values[-1] < values[0] - 1e-4).any()


def test_coverage_takes_part() -> None:
    sets: list[Entries] = [[[0, 1], 2], [3, 4]]  # nothing links them
    logs = [np.log([[0.75, 0.25]]), np.log([[0.5, 0.5]])]
    found = GroupUnifier(sets, strength=1.0)(logs, coverage=[np.array([0.8]), np.array([0.2])])
    assert found.converged.all()
    np.testing.assert_allclose(found.probs[0], [0.3, 0.3, 0.2, 0.1, 0.1], atol=1e-5)


def test_zeros_and_empty_input_are_no_trouble() -> None:
    sets: list[Entries] = [[[0, 1], 2], [0, 1, 2]]
    with np.errstate(divide="ignore"):
        found = GroupUnifier(sets)([np.log([[1.0, 0.0]]), np.log([[0.0, 1.0, 0.0]])])
    np.testing.assert_allclose(found.probs[0], [0, 1, 0], atol=1e-6)
    assert GroupUnifier(sets)([np.empty((0, 2)), np.empty((0, 3))]).probs.shape == (0, 3)


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        ([[[0, 1]], [0, 1]], "always 1"),
        ([[[0, 1], [1, 2]]], "more than once"),
        ([[[], 1]], "entry 0"),
        ([[[0.5, 1], 2]], "entry 0"),
        ([[[0, 1], 3]], "known to no site"),
        ([], "no site"),
    ],
)
def test_what_is_no_set_of_groups_is_refused(sets: list[Entries], words: str) -> None:
    with pytest.raises(UnifyError, match=words):
        GroupUnifier(sets)
