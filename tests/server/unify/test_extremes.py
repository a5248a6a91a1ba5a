"""Tiny links, zeros, ranges beyond fp64, many sites, sites that know one class, and samples that do not converge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from consilience.server.unify import METHODS, Method, Unifier, unify
from consilience.server.unify import dual as dual_module
from consilience.server.unify.ce import CE
from consilience.server.unify.dual import solve
from consilience.server.unify.elimination import PANEL, potentials
from consilience.server.unify.factor import Derivatives
from consilience.server.unify.newton import minimise
from consilience.server.unify.owners import owner_sets
from consilience.server.unify.plan import make_plan
from consilience.server.unify.terms import Masses, Narrow, Summed, Wide

Draw = Callable[..., Any]
CPU = torch.device("cpu")


def rows(*probs: list[float]) -> list[Any]:
    with np.errstate(divide="ignore"):
        return [np.log([p]) for p in probs]


@pytest.mark.parametrize("link", [1e-3, 1e-9, 1e-20, 1e-40])
def test_a_tiny_link_decides_as_exactly_as_a_large_one(link: float) -> None:
    found = unify(rows([1 - 2 * link, 2 * link], [5 * link, 1 - 5 * link]), [[0, 1], [1, 2]])
    expected = np.array([(1 - 2 * link) / (2 * link), 1.0, (1 - 5 * link) / (5 * link)])
    assert found.converged.all()
    # The link itself may be less than float32 can say.
    np.testing.assert_allclose(found.probs[0], expected / expected.sum(), rtol=1e-6, atol=1e-38)


@pytest.mark.parametrize("link", [1e-9, 1e-20, 1e-40])
def test_a_tiny_link_between_strong_groups(link: float) -> None:
    # Sites 0 and 1 agree on class 0 and sites 2 and 3 on class 1; the groups share class 2 only. Rounding of the
    # groups' own masses must not flow over the link.
    sets = [[0, 2], [0, 3], [1, 2], [1, 4]]
    found = unify(rows([1 - link, link], [0.7, 0.3], [1 - 3 * link, 3 * link], [0.6, 0.4]), sets)
    expected = np.array([(1 - link) / link, (1 - 3 * link) / (3 * link), 1.0, 0, 0])
    expected[3:] = 3 / 7 * expected[0], 2 / 3 * expected[1]
    assert found.converged.all()
    np.testing.assert_allclose(found.probs[0], expected / expected.sum(), rtol=1e-6, atol=1e-38)


@pytest.mark.parametrize("depth", [30.0, 90.0])
@pytest.mark.parametrize("sites", [20, 60])
def test_a_chain_deeper_than_fp64(depth: float, sites: int) -> None:
    # Down and up again: both ends are likely, the middle is far below the smallest number.
    u = -depth * np.minimum(np.arange(sites + 1), np.arange(sites + 1)[::-1]).astype(float)
    u[-1] += 0.5
    sets = [[i, i + 1] for i in range(sites)]
    found = unify([u[None, s] for s in sets], sets)
    assert found.converged.all()
    np.testing.assert_allclose(found.probs[0, [0, -1]], [1 / (1 + np.e**0.5), 1 / (1 + np.e**-0.5)], rtol=1e-6)


def test_wild_answers_still_converge() -> None:
    random = np.random.default_rng(0)
    sets = [random.choice(12, 5, replace=False) for _ in range(8)]
    assert np.unique(np.concatenate(sets)).size == 12
    for scale in (10, 100, 1000):
        found = unify([scale * random.normal(size=(40, 5)) for _ in sets], sets)
        assert found.converged.all()
        assert found.residual.max() < 1e-7


def test_narrow_and_wide_terms_agree(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = draw(12, 20, noise=1.0, chain=False)
    unifier = Unifier(problem.class_sets, weights=problem.weights)
    stacked = unifier._reader.read(problem.logits, 0, 20, 0)
    overlap = owner_sets(unifier._plan)[0][0]
    parts = overlap.to_parts @ stacked.exp()
    masses = Masses(overlap.parts_to_sets @ parts, overlap.parts_to_sites @ parts, parts)
    lam = torch.from_numpy(np.random.default_rng(0).normal(0, 3, (overlap.size, 20)))
    narrow, wide, summed = (kind(overlap, masses, lam) for kind in (Narrow, Wide, Summed))
    torch.testing.assert_close(narrow.marginals(), wide.marginals(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(narrow.log_sets(), wide.log_sets(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(narrow.average(lam), wide.average(lam), rtol=1e-12, atol=1e-12)
    for one, two in zip(narrow.system(), wide.system(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-13)
    gradient = narrow.marginals() - masses.sites
    for terms in (narrow, wide, summed):
        torch.testing.assert_close(terms.system()[1].sum(1), gradient, rtol=1e-10, atol=1e-13)
    expected = unifier(problem.logits)
    monkeypatch.setattr(dual_module, "REACH", -1.0)
    found = unifier(problem.logits)
    assert found.converged.all()
    np.testing.assert_allclose(found.probs, expected.probs, rtol=3e-7)


@pytest.mark.parametrize("size", [2, PANEL, PANEL + 1, 3 * PANEL + 5])
def test_elimination_solves_the_laplacian(size: int) -> None:
    random = np.random.default_rng(size)
    links, flows = random.uniform(0.1, 1, (size, size, 3)), random.normal(size=(size, size, 3))
    links, flows = links + links.transpose(1, 0, 2), flows - flows.transpose(1, 0, 2)
    found, weakest = potentials(torch.from_numpy(links.copy()), torch.from_numpy(flows.copy()))
    for k in range(3):
        off = links[..., k] - np.diag(np.diag(links[..., k]))
        expected = np.linalg.pinv(np.diag(off.sum(1)) - off) @ flows[..., k].sum(1)
        np.testing.assert_allclose(found[:, k].numpy(), expected - expected[0], atol=1e-10)
    assert (weakest > 0).all()


@pytest.mark.parametrize("size", [4, PANEL + 4])
def test_elimination_keeps_weak_links_exact(size: int) -> None:
    # Two strong groups, one weak link with a flow of its own size: the step across it is exactly that ratio.
    half, link = size // 2, 1e-30
    links, flows = torch.zeros(size, size, 1, dtype=torch.float64), torch.zeros(size, size, 1, dtype=torch.float64)
    random = torch.from_numpy(np.random.default_rng(1).uniform(0.5, 1, (half, half)))
    for group in (slice(0, half), slice(half, size)):
        links[group, group, 0] = random + random.t()
        # Flows that add up to nothing but rounding: a cycle around each group.
        for i in range(half):
            a, b = group.start + i, group.start + (i + 1) % half
            flows[a, b, 0] += 0.1
            flows[b, a, 0] -= 0.1
    links[0, half] = links[half, 0] = link
    flows[half, 0], flows[0, half] = 2 * link, -2 * link
    found, _ = potentials(links, flows)
    assert found[half, 0].item() - found[0, 0].item() == pytest.approx(2.0, rel=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_zeros_are_floored(method: Method) -> None:
    zeros = rows([1.0, 0.0], [0.5, 0.5])
    tiny = rows([1.0, 3.7200759760208356e-44], [0.5, 0.5])
    found = unify(zeros, [[0, 1], [1, 2]], method=method)
    assert np.isfinite(found.probs).all()
    np.testing.assert_allclose(found.probs, unify(tiny, [[0, 1], [1, 2]], method=method).probs, atol=1e-6)
    if method == "ce":
        np.testing.assert_allclose(found.probs[0], [1.0, 0.0, 0.0], atol=1e-30)


def test_opposed_certainties_are_even() -> None:
    found = unify(rows([1.0, 0.0], [0.0, 1.0]), [[0, 1], [1, 2]])
    assert found.converged.all()
    np.testing.assert_allclose(found.probs[0], [0.5, 0.0, 0.5], atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_answers_that_say_nothing(method: Method) -> None:
    found = unify([np.zeros((2, 3)), np.zeros((2, 2))], [[0, 1, 2], [2, 3]], method=method)
    assert found.converged.all()
    expected = [1 / 6, 1 / 6, 5 / 12, 1 / 4] if method == "sd" else [1 / 4] * 4
    np.testing.assert_allclose(found.probs, [expected] * 2, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_one_site(method: Method) -> None:
    found = unify(rows([0.7, 0.2, 0.1]), [[2, 0, 1]], method=method)
    assert found.converged.all()
    np.testing.assert_allclose(found.probs[0], [0.2, 0.1, 0.7], atol=1e-3 if method == "mf-lv" else 1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_no_samples(method: Method) -> None:
    found = unify([np.zeros((0, 2)), np.zeros((0, 2))], [[0, 1], [1, 2]], method=method)
    assert found.probs.shape == (0, 3)
    assert found.converged.shape == found.residual.shape == found.iterations.shape == (0,)


@pytest.mark.parametrize("method", ["ce", "mf-p", "mf-lv", "mf-lf"])
def test_sites_with_one_class_are_harmless(draw: Draw, method: Method) -> None:
    problem = draw(7, 5, noise=0.5)
    plain = unify(problem.logits, problem.class_sets, method=method)
    ones = [np.full((5, 1), 3.0)] * 2
    more = unify([ones[0], *problem.logits, ones[1]], [[1], *problem.class_sets, [0]], method=method)
    np.testing.assert_allclose(more.probs, plain.probs, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_a_class_that_only_sites_with_one_class_know(method: Method) -> None:
    found = unify([*rows([0.8, 0.2]), np.zeros((1, 1)), np.ones((1, 1))], [[0, 1], [2], [2]], method=method)
    np.testing.assert_array_equal(found.components, [0, 0, 1])
    assert found.converged.all()
    expected = np.array([0.8, 0.2, 2.0]) / 3 if method == "sd" else np.array([2.0, 0.5, 1.0]) / 3.5
    np.testing.assert_allclose(found.probs[0], expected, atol=1e-3 if method == "mf-lv" else 1e-6)


@pytest.mark.parametrize("method", ["ce", "mf-lf"])
def test_two_hundred_sites(method: Method) -> None:
    random = np.random.default_rng(0)
    sets = [random.choice(250, 6, replace=False) for _ in range(200)]
    used = np.unique(np.concatenate(sets))
    sets = [np.searchsorted(used, s) for s in sets]
    truth = random.normal(0, 2, (3, used.size))
    found = unify([truth[:, s] for s in sets], sets, method=method)
    expected = np.exp(truth) / np.exp(truth).sum(axis=1, keepdims=True)
    assert found.components.max() == 0
    assert found.converged.all()
    np.testing.assert_allclose(found.probs, expected, atol=1e-6)
    noisy = unify([truth[:, s] + random.normal(size=(3, 6)) for s in sets], sets, method=method)
    assert noisy.converged.all()
    assert noisy.residual.max() < 1e-9


def test_running_out_of_iterations_is_reported(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = draw(12, 20, noise=1.0, chain=False)
    unifier = Unifier(problem.class_sets)
    stacked = unifier._reader.read(problem.logits, 0, 20, 0)
    overlap = owner_sets(unifier._plan)[0][0]
    parts = overlap.to_parts @ stacked.exp()
    masses = Masses(overlap.parts_to_sets @ parts, overlap.parts_to_sites @ parts, parts)
    early = solve(overlap, masses, max_iterations=1)
    assert not early.converged.any()
    assert early.residual.max() > 1e-9
    assert solve(overlap, masses).converged.all()
    monkeypatch.setattr("consilience.server.unify.ce.solve", lambda o, m: solve(o, m, 0))
    assert not unify(problem.logits, problem.class_sets).converged.any()


class Bowl:
    """(x - target)^2 with a curvature of its own per unknown, for the driver of the methods that are not convex."""

    def __init__(self, target: torch.Tensor) -> None:
        self.target = target

    def value(self, x: torch.Tensor) -> torch.Tensor:
        return ((x - self.target) ** 4 + (x - self.target) ** 2).sum(1)

    def derivatives(self, x: torch.Tensor) -> Derivatives:
        d = x - self.target
        second = 12 * d**2 + 2
        return Derivatives(self.value(x), 4 * d**3 + 2 * d, torch.diag_embed(second), second)

    def data(self) -> torch.Tensor:
        return torch.ones_like(self.target[:, 0])

    def select(self, rows: torch.Tensor) -> Bowl:
        return Bowl(self.target[rows])


def test_the_driver_keeps_bounds_and_reports_what_it_left() -> None:
    target = torch.tensor([[3.0, -2.0], [1.0, 4.0], [-1.0, -1.0]], dtype=torch.float64)
    bounded = torch.tensor([False, True])
    found = minimise(Bowl(target), torch.ones_like(target), bounded)
    assert found.converged.all()
    expected = target.clone()
    expected[:, 1].clamp_(min=0)
    torch.testing.assert_close(found.x, expected, rtol=0, atol=1e-8)
    torch.testing.assert_close(found.value, Bowl(target).value(expected))
    early = minimise(Bowl(target), torch.ones_like(target), bounded, max_iterations=1)
    assert not early.converged.any()
    assert early.residual.min() > 1e-9


@pytest.mark.parametrize("method", ["mf-p", "mf-lv"])
def test_methods_that_are_not_convex_report_too(draw: Draw, method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = draw(12, 20, noise=1.0, chain=False)
    module = method.replace("-", "_")
    monkeypatch.setattr(f"consilience.server.unify.{module}.minimise", lambda o, x, b: minimise(o, x, b, 1))
    found = unify(problem.logits, problem.class_sets, method=method)
    assert not found.converged.any()
    assert found.residual.min() > 0


def test_memory_is_bounded_by_the_block() -> None:
    plan = make_plan([np.arange(400)] * 30, None, None, CPU)
    unifier, exact = Unifier(plan.class_sets), CE(plan)
    assert exact.quick is not None
    assert unifier.block * exact.quick.row_doubles * 8 <= 2**26
    assert unifier._exact_block * exact.row_doubles * 8 <= 2**25
    assert Unifier([[0, 1]], method="sd").block <= 4096
