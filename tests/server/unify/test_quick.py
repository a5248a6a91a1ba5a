"""The quick way of CE: the same labels as in fp64 throughout, and samples that it must leave to the other way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from consilience.server.unify import Unifier, unify

Draw = Callable[..., Any]


def both(answers: list[NDArray[Any]], class_sets: Any, **options: Any) -> tuple[Any, Any]:
    """Labels of answers as they are, and of the same numbers as doubles, which are never taken the quick way."""
    return unify(answers, class_sets, **options), unify([a.astype(np.float64) for a in answers], class_sets, **options)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_labels_are_those_of_doubles(draw: Draw, dtype: Any, temperature: float) -> None:
    for seed in range(20):
        problem = draw(seed, 40, noise=0.7)
        given = [z.astype(dtype) for z in problem.logits]
        quick, exact = both(given, problem.class_sets, weights=problem.weights, temperature=temperature)
        assert quick.converged.all()
        np.testing.assert_allclose(quick.probs, exact.probs, rtol=1e-5, atol=1e-6, err_msg=str(seed))
        assert quick.residual.max() < 1e-5


def test_most_samples_go_the_quick_way(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = draw(3, 100, noise=0.7)
    unifier = Unifier(problem.class_sets)
    assert unifier._quick is not None
    monkeypatch.setattr(unifier, "_estimator", None)  # whoever needs it fails
    unifier([z.astype(np.float32) for z in problem.logits])


@pytest.mark.parametrize("link", [-5.0, -15.0, -25.0, -40.0, -80.0])
def test_weak_links_are_solved_as_by_doubles(link: float) -> None:
    """Two pairs of sites agree on two classes each; the pairs hang together by a class that all hold for unlikely."""
    random = np.random.default_rng(0)
    given = [random.normal(0, 1, (30, 3)) + np.array([0, 0, link]) for _ in range(4)]
    quick, exact = both([z.astype(np.float32) for z in given], [[0, 1, 4], [0, 1, 4], [2, 3, 4], [2, 3, 4]])
    np.testing.assert_array_equal(quick.converged, exact.converged)
    np.testing.assert_allclose(quick.probs, exact.probs, rtol=2e-5, atol=1e-7)


def test_mixed_blocks_are_solved_sample_by_sample(draw: Draw) -> None:
    """Strong and hopeless links in one block: what is solved again lands in its own row."""
    problem = draw(4, 60, noise=0.7)
    given = [z.astype(np.float32) for z in problem.logits]
    for rows in given:
        rows[::7] *= 60
    quick, exact = both(given, problem.class_sets)
    np.testing.assert_array_equal(quick.converged, exact.converged)
    np.testing.assert_allclose(quick.probs, exact.probs, rtol=2e-5, atol=1e-6)


def test_neither_blocks_nor_threads_change_labels(draw: Draw) -> None:
    problem = draw(12, 301, noise=0.5, chain=False)
    given = [z.astype(np.float16) for z in problem.logits]
    whole = unify(given, problem.class_sets, block=301)
    threads = torch.get_num_threads()
    try:
        for number, block in ((1, 7), (2, 64), (3, 100)):
            torch.set_num_threads(number)
            parts = unify(given, problem.class_sets, block=block)
            np.testing.assert_allclose(parts.probs, whole.probs, rtol=1e-5, atol=1e-9)
    finally:
        torch.set_num_threads(threads)


def test_one_class_sites_and_zeros() -> None:
    """A site of one class does not count, and a class that all its owners exclude gets nothing."""
    with np.errstate(divide="ignore"):
        first = np.log(np.array([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]], np.float32))
        second = np.log(np.array([[0.0, 1.0], [0.5, 0.5]], np.float32))
    quick, exact = both([first, second, np.zeros((2, 1), np.float32)], [[0, 1, 2], [2, 3], [0]])
    np.testing.assert_allclose(quick.probs, exact.probs, atol=1e-6)
