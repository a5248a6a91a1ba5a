"""CE from class-wise sums: the same labels as from answers, and what sums cannot tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from consilience.common.errors import UnifyError
from consilience.server.unify import unify, unify_sums

Draw = Callable[..., Any]


def sums_of(probs: list[Any], class_sets: list[Any], weights: Any, num_classes: int) -> Any:
    out = np.zeros((probs[0].shape[0], num_classes))
    for p, s, w in zip(probs, class_sets, weights, strict=True):
        out[:, s] += w * p
    return out


def test_sums_are_enough(draw: Draw) -> None:
    for seed in range(60):
        problem = draw(seed, 5)
        sums = sums_of(problem.probs, problem.class_sets, problem.weights, problem.num_classes)
        expected = unify(problem.logits, problem.class_sets, weights=problem.weights)
        found = unify_sums(sums, problem.class_sets, weights=problem.weights)
        assert found.converged.all(), seed
        assert found.residual.max() < 1e-7
        np.testing.assert_allclose(found.probs, expected.probs, atol=1e-6, err_msg=str(seed))
        np.testing.assert_array_equal(found.components, expected.components)


def test_several_components_and_sites_with_one_class() -> None:
    sets = [[0, 1, 2], [2, 3], [1], [4, 5], [6]]
    logits = [np.random.default_rng(i).normal(size=(4, len(s))) for i, s in enumerate(sets)]
    probs = [np.exp(z) / np.exp(z).sum(axis=1, keepdims=True) for z in logits]
    weights = [1.0, 2.0, 0.5, 1.5, 3.0]
    sums = sums_of(probs, sets, weights, 7)
    for across in ("centred", "equal", "proportional"):
        found = unify_sums(sums, sets, weights=weights, across=across)
        assert found.converged.all()
        expected = unify(logits, sets, weights=weights, across=across)
        np.testing.assert_allclose(found.probs, expected.probs, atol=1e-6)


def test_kinds_and_blocks(draw: Draw) -> None:
    problem = draw(12, 40, noise=0.5, chain=False)
    sums = sums_of(problem.probs, problem.class_sets, [1.0] * len(problem.class_sets), problem.num_classes)
    expected = unify_sums(sums, problem.class_sets).probs
    np.testing.assert_allclose(unify_sums(sums, problem.class_sets, block=7).probs, expected, rtol=3e-7)
    np.testing.assert_allclose(unify_sums(torch.from_numpy(sums), problem.class_sets).probs, expected, rtol=3e-7)
    single = unify_sums(sums.astype(np.float32), problem.class_sets)
    np.testing.assert_allclose(single.probs, expected, atol=1e-4)
    assert 1e-10 < single.residual.max() < 1e-5
    assert unify_sums(sums[:0], problem.class_sets).probs.shape == (0, problem.num_classes)


@pytest.mark.parametrize("link", [1e-12, 1e-17])
def test_links_below_rounding_are_not_claimed(link: float) -> None:
    sets = [[0, 1], [1, 2]]
    sums = np.array([[1 - link, 3 * link, 1 - 2 * link], [0.9, 0.3, 0.8]])
    found = unify_sums(sums, sets)
    np.testing.assert_array_equal(found.converged, [False, True])
    assert np.isfinite(found.probs).all()
    np.testing.assert_allclose(found.probs.sum(axis=1), 1.0, atol=1e-6)


def test_rounded_sums_are_accepted(draw: Draw) -> None:
    problem = draw(12, 10, noise=0.5, chain=False, scale=1.5)
    sums = sums_of(problem.probs, problem.class_sets, [1.0] * len(problem.class_sets), problem.num_classes)
    found = unify_sums(np.round(sums * 2**20) / 2**20, problem.class_sets)
    expected = unify_sums(sums, problem.class_sets)
    np.testing.assert_allclose(found.probs, expected.probs, atol=1e-3)
    assert (found.residual < 1e-4).all()


GOOD = np.array([[0.9, 0.3, 0.8]])


@pytest.mark.parametrize(
    ("sums", "parts"),
    [
        (np.array([[0.9, 0.3, 0.8], [0.9, np.nan, 0.8]]), ["not finite", "row 1"]),
        (np.array([[0.9, 0.3, np.inf]]), ["not finite", "row 0"]),
        (np.array([[1.5, -0.3, 0.8]]), ["negative", "row 0"]),
        (np.array([[0.9, 0.3, 0.8], [0.9, 0.3, 0.9]]), ["do not add up", "row 1"]),
        (np.array([[0.9, 0.3]]), ["(1, 2)", "(n, 3)"]),
        (np.array([0.9, 0.3, 0.8]), ["(3,)", "(n, 3)"]),
        (np.array([[1, 0, 1]]), ["floating"]),
        ([[0.9, 0.3, 0.8]], ["floating"]),
    ],
)
def test_refused(sums: Any, parts: list[str]) -> None:
    with pytest.raises(UnifyError) as caught:
        unify_sums(sums, [[0, 1], [1, 2]])
    for part in parts:
        assert part in str(caught.value)


def test_options_are_checked() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"across": "best"}, "across 'best'"),
        ({"block": 0}, "block 0"),
        ({"weights": [1.0, -1.0]}, "weight -1.0 of site 1"),
        ({"device": "gpu"}, "'gpu'"),
    ]
    for options, part in wrong:
        with pytest.raises(UnifyError, match=part):
            unify_sums(GOOD, [[0, 1], [1, 2]], **options)
