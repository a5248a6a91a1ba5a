"""What must hold for any answers: invariances, exactness on consistent teachers, independence of blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from consilience.server.unify import METHODS, Method, Prior, Unifier, unify

Draw = Callable[..., Any]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
CONVEX: tuple[Method, ...] = ("sd", "ce", "mf-lf")
LINKED: tuple[Method, ...] = ("ce", "mf-p", "mf-lf")
seeds = st.integers(0, 10_000)
methods = st.sampled_from(METHODS)


def softmax(logits: Any) -> Any:
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


@settings(max_examples=40)
@given(seed=seeds, method=methods, offset=st.floats(-1000, 1000))
def test_offsets_of_rows_change_nothing(draw: Draw, seed: int, method: Method, offset: float) -> None:
    problem = draw(seed, 3)
    plain = unify(problem.logits, problem.class_sets, method=method)
    moved = [z + offset * np.arange(1, 4)[:, None] for z in problem.logits]
    np.testing.assert_allclose(unify(moved, problem.class_sets, method=method).probs, plain.probs, atol=2e-6)


@settings(max_examples=40)
@given(seed=seeds, method=st.sampled_from(("sd", "ce", "mf-p", "mf-lf")))
def test_order_of_sites_and_classes_changes_nothing(draw: Draw, seed: int, method: Method) -> None:
    problem = draw(seed, 3)
    random = np.random.default_rng(seed)
    names = random.permutation(problem.num_classes)
    order = random.permutation(len(problem.class_sets))
    within = [random.permutation(s.size) for s in problem.class_sets]
    plain = unify(problem.logits, problem.class_sets, method=method, weights=problem.weights)
    moved = unify(
        [problem.logits[i][:, within[i]] for i in order],
        [names[problem.class_sets[i][within[i]]] for i in order],
        method=method,
        weights=problem.weights[order],
    )
    np.testing.assert_allclose(moved.probs[:, names], plain.probs, atol=2e-6)


@settings(max_examples=30)
@given(seed=seeds, method=st.sampled_from(("sd", "ce", "mf-p", "mf-lf")))
def test_a_site_twice_is_weight_two(draw: Draw, seed: int, method: Method) -> None:
    problem = draw(seed, 3)
    doubled = [problem.weights[0] * 2, *problem.weights[1:]]
    once = unify(problem.logits, problem.class_sets, method=method, weights=doubled)
    twice = unify(
        [*problem.logits, problem.logits[0]],
        [*problem.class_sets, problem.class_sets[0]],
        method=method,
        weights=[*problem.weights, problem.weights[0]],
    )
    np.testing.assert_allclose(twice.probs, once.probs, atol=2e-6)


@settings(max_examples=40)
@given(seed=seeds, method=st.sampled_from(LINKED), temperature=st.sampled_from([0.5, 1.0, 3.0]))
def test_consistent_teachers_are_recovered_at_any_temperature(
    draw: Draw, seed: int, method: Method, temperature: float
) -> None:
    problem = draw(seed, 3, noise=0.0, scale=1.5)
    found = unify(problem.logits, problem.class_sets, method=method, temperature=temperature)
    assert found.converged.all()
    assert found.residual.max() < 1e-9
    np.testing.assert_allclose(found.probs, softmax(np.log(problem.truth) / temperature), atol=1e-6)


@settings(max_examples=20)
@given(seed=seeds, method=methods)
def test_marginals_of_ce_match_and_rows_add_up(draw: Draw, seed: int, method: Method) -> None:
    problem = draw(seed, 3)
    found = unify(problem.logits, problem.class_sets, method=method, weights=problem.weights)
    assert found.probs.dtype == np.float32
    np.testing.assert_allclose(found.probs.sum(axis=1), 1.0, atol=1e-6)
    if method != "ce":
        return
    left = np.zeros((3, problem.num_classes))
    for s, p, w in zip(problem.class_sets, problem.probs, problem.weights, strict=True):
        q = found.probs[:, s].astype(np.float64)
        left[:, s] += w * (q / q.sum(axis=1, keepdims=True) - p)
    assert np.abs(left).max() < 1e-5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", METHODS)
def test_blocks_change_nothing(draw: Draw, method: Method, device: str) -> None:
    problem = draw(12, 301, noise=0.5, chain=False)
    # Labels of one sample differ by no more than the last bit of float32, wherever its block begins and ends.
    whole = unify(problem.logits, problem.class_sets, method=method, device=device, block=301)
    for block in (1, 7, 100, None):
        rows = slice(0, 30 if block == 1 else 301)
        parts = unify([z[rows] for z in problem.logits], problem.class_sets, method=method, device=device, block=block)
        np.testing.assert_allclose(parts.probs, whole.probs[rows], rtol=3e-7, atol=1e-12)
        np.testing.assert_array_equal(parts.converged, whole.converged[rows])


@pytest.mark.parametrize("method", CONVEX)
def test_blocks_change_nothing_in_double_precision(draw: Draw, method: Method) -> None:
    problem = draw(12, 64, noise=0.5, chain=False)
    unifier = Unifier(problem.class_sets, method=method)
    stacked = unifier._reader.read(problem.logits, 0, 64, 0)
    whole = unifier._estimator(stacked).scores
    for start in range(0, 64, 5):
        part = unifier._estimator(stacked[:, start : start + 5].contiguous()).scores
        torch.testing.assert_close(part, whole[:, start : start + 5], rtol=1e-12, atol=1e-12)


def test_a_unifier_is_called_block_by_block(draw: Draw) -> None:
    problem = draw(5, 50)
    unifier = Unifier(problem.class_sets, problem.num_classes)
    whole = unifier(problem.logits)
    parts = [unifier([z[start : start + 20] for z in problem.logits], first_row=start) for start in (0, 20, 40)]
    np.testing.assert_allclose(np.concatenate([part.probs for part in parts]), whole.probs, rtol=3e-7)
    np.testing.assert_array_equal(unifier.components, whole.components)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_kinds_of_arrays(draw: Draw, dtype: Any, tmp_path: Path) -> None:
    problem = draw(5, 9)
    given = [z.astype(dtype) for z in problem.logits]
    expected = unify([z.astype(np.float64) for z in given], problem.class_sets).probs
    on_disk = []
    for i, z in enumerate(given):
        np.save(tmp_path / f"{i}.npy", z)
        on_disk.append(np.load(tmp_path / f"{i}.npy", mmap_mode="r"))
    turned = [np.asfortranarray(z)[::-1] for z in given]
    found = unify(given, problem.class_sets).probs
    np.testing.assert_allclose(found, expected, rtol=0 if dtype == np.float64 else 2e-6)
    np.testing.assert_array_equal(unify(on_disk, problem.class_sets).probs, found)
    np.testing.assert_array_equal(unify(turned, problem.class_sets).probs, found[::-1])


@pytest.mark.parametrize("device", DEVICES)
def test_tensors(draw: Draw, device: str) -> None:
    problem = draw(5, 9)
    expected = unify(problem.logits, problem.class_sets).probs
    tensors = [torch.from_numpy(z).to(device).requires_grad_() for z in problem.logits]
    np.testing.assert_allclose(unify(tensors, problem.class_sets).probs, expected, rtol=3e-7)
    coarse = [z.bfloat16() for z in tensors]
    np.testing.assert_allclose(
        unify(coarse, problem.class_sets).probs,
        unify([z.double() for z in coarse], problem.class_sets).probs,
        rtol=2e-6,
    )


def test_inputs_stay_as_they_are(draw: Draw) -> None:
    problem = draw(5, 9)
    copies = [z.copy() for z in problem.logits]
    for method in METHODS:
        unify(problem.logits, problem.class_sets, method=method, temperature=2.0)
    for z, copy in zip(problem.logits, copies, strict=True):
        np.testing.assert_array_equal(z, copy)


def test_prior_correction_undoes_other_proportions(draw: Draw) -> None:
    problem = draw(3, 5, noise=0.0, chain=False)
    random = np.random.default_rng(0)
    target = random.uniform(0.5, 2, problem.num_classes)
    sites = [random.uniform(0.5, 2, s.size) for s in problem.class_sets]
    bent = [
        z + np.log(own) - np.log(target[s]) for z, own, s in zip(problem.logits, sites, problem.class_sets, strict=True)
    ]
    prior = Prior(7 * target, [3 * own for own in sites])
    for temperature in (1.0, 2.0):
        found = unify(bent, problem.class_sets, prior=prior, temperature=temperature)
        np.testing.assert_allclose(found.probs, softmax(np.log(problem.truth) / temperature), atol=1e-6)


@pytest.mark.parametrize("across", ["centred", "equal", "proportional"])
@pytest.mark.parametrize("method", ["ce", "mf-p", "mf-lv", "mf-lf"])
def test_components_are_solved_apart(draw: Draw, method: Method, across: Any) -> None:
    first, second = draw(1, 4), draw(2, 4)
    sets = [*first.class_sets, *(s + first.num_classes for s in second.class_sets)]
    found = unify([*first.logits, *second.logits], sets, method=method, across=across)
    for problem, rows in ((first, slice(0, first.num_classes)), (second, slice(first.num_classes, None))):
        alone = unify(problem.logits, problem.class_sets, method=method).probs
        part = found.probs[:, rows]
        np.testing.assert_allclose(part / part.sum(axis=1, keepdims=True), alone, atol=2e-6)
    mass = found.probs[:, : first.num_classes].sum(axis=1)
    if across == "equal":
        np.testing.assert_allclose(mass, 0.5, atol=1e-6)
    elif across == "proportional":
        np.testing.assert_allclose(mass, first.num_classes / found.probs.shape[1], atol=1e-6)
    else:
        logs = np.log(found.probs.astype(np.float64))
        np.testing.assert_allclose(
            logs[:, : first.num_classes].mean(axis=1), logs[:, first.num_classes :].mean(axis=1), atol=1e-5
        )


def test_components_are_numbered_by_first_class() -> None:
    found = unify([np.zeros((1, 2))] * 3, [[3, 1], [0, 2], [4, 2]])
    np.testing.assert_array_equal(found.components, [0, 1, 0, 1, 0])


def test_threads_of_torch_are_left_alone(draw: Draw) -> None:
    problem = draw(5, 300)
    threads = torch.get_num_threads()
    unify(problem.logits, problem.class_sets, block=10)
    assert torch.get_num_threads() == threads
