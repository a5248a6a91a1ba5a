"""The head of verticals and its sparse losses against the paper's formulas, dense losses and brute force."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from consilience.common.errors import SettingsError
from consilience.common.nets import build, load_model, save_model, train
from consilience.common.settings import Fit, Head, Preprocessing
from consilience.server.student.blocked_loss import blocked_sigmoid
from consilience.server.student.concentrated_head import (
    FLOOR,
    ConcentratedHead,
    HeadPlan,
    head_of,
    place,
    scaled,
    verticals_in,
)
from consilience.server.student.sparse_loss import SparseSigmoid, SparseSoftmax, SparseTargets

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
UNEVEN = {"birds": (0, 3, 4), "cars": (1, 2), "plants": (5, 6, 7, 8)}
LABELS = np.array([[0, 4], [2, 1], [5, 8], [3, 3]], np.int32)
VALUES = np.array([[0.5, 0.2], [0.9, 0.1], [0.7, 0.2], [0.6, 0.0]], np.float32)
KINDS = [("fc-fc", 0), ("fc-sc", 0), ("sc-sc", 0), ("fc-sc", 3), ("fc-sc", 5)]


def uneven(kind: str, shared: int = 0, scaling: str = "none") -> HeadPlan:
    head = Head.model_validate({"kind": kind, "first": 7, "second": 5, "shared": shared, "scaling": scaling})
    return HeadPlan(head=head, verticals=UNEVEN)


def head(plan: HeadPlan, bottleneck: int = 6, seed: int = 0) -> ConcentratedHead:
    torch.manual_seed(seed)
    return ConcentratedHead(plan, bottleneck)


def dense(labels: np.ndarray, values: np.ndarray, classes: int) -> Tensor:
    """The targets as the paper writes them."""
    target = torch.zeros(len(labels), classes, dtype=torch.float64)
    return target.scatter_add_(1, torch.from_numpy(labels.astype(np.int64)), torch.from_numpy(values).double())


sizes = st.integers(1, 40)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), sizes, sizes, sizes, st.data())
def test_weights_are_those_of_the_formulas(
    verticals: list[int], s_b: int, s_1: int, s_2: int, data: st.DataObject
) -> None:
    m, n, x = len(verticals), sum(verticals), data.draw(st.integers(0, s_2))
    expected = {
        ("fc-fc", 0): s_b * s_1 + s_1 * s_2 + s_2 * n,
        ("fc-sc", 0): s_b * s_1 + m * s_1 * s_2 + s_2 * n,
        ("sc-sc", 0): m * s_b * s_1 + m * s_1 * s_2 + s_2 * n,
        ("fc-sc", x): s_b * s_1 + s_1 * x + m * s_1 * (s_2 - x) + s_2 * n,
    }
    for (kind, shared), count in expected.items():
        for scaling in ("none", "class"):
            chosen = Head.model_validate(
                {"kind": kind, "first": s_1, "second": s_2, "shared": shared, "scaling": scaling}
            )
            plan = HeadPlan(head=chosen, verticals=verticals_in(verticals))
            built = head(plan, s_b)
            assert plan.parameters(s_b) == built.weights == count
            beside = sum(p.numel() for p in built.parameters()) - count
            assert beside == (n if scaling == "class" else 0)


def test_the_middle_of_fc_sc_leads_from_one_end_to_the_other() -> None:
    features = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    shared, plain = head(uneven("fc-sc", 5)), head(uneven("fc-fc"))
    plain.load_state_dict(shared.state_dict())
    torch.testing.assert_close(shared(features), plain(features))
    assert (
        head(uneven("fc-sc", 3)).hidden(features)[:, 0, :3].equal(head(uneven("fc-sc", 3)).hidden(features)[:, 2, :3])
    )


@pytest.mark.parametrize("kind", ["fc-sc", "sc-sc"])
def test_a_vertical_hears_of_its_own_block_alone(kind: str) -> None:
    """Scores of one vertical do not change with another's block; all are in the order of the classes."""
    built = head(uneven(kind))
    features = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    before = built(features)
    with torch.no_grad():
        if kind == "sc-sc":
            built.blocks[1] *= 2
        else:
            built.second.weight[5:10] *= 2
    after = built(features)
    changed = sorted(int(c) for c in (before != after).any(dim=0).nonzero())
    assert changed == sorted(UNEVEN["cars"])


@pytest.mark.parametrize("scaling", ["none", "vertical", "class"])
@pytest.mark.parametrize(("kind", "shared"), KINDS)
def test_the_loss_and_its_gradients_are_the_dense_ones(kind: str, shared: int, scaling: str) -> None:
    built = head(uneven(kind, shared, scaling)).double()
    features = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    learned = [features, *built.parameters()]
    loss = SparseSigmoid(SparseTargets(LABELS, VALUES), list(UNEVEN.values()), CPU)
    ids = torch.tensor([2, 0, 3, 1])
    target = dense(LABELS, VALUES, 9)[ids]
    scores = built(features)
    expected = F.binary_cross_entropy_with_logits(scores, target, reduction="none").sum(dim=1).mean()
    wanted = torch.autograd.grad(3 * expected, learned, retain_graph=True)
    plain = loss(scores, ids)
    assert float(plain.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    found = torch.autograd.grad(3 * plain, learned)
    built.in_parts = True
    blocked = loss(built(features), ids)
    assert float(blocked.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    for a, b, c in zip(wanted, found, torch.autograd.grad(3 * blocked, learned), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(a, c, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scaling", ["vertical", "class"])
@pytest.mark.parametrize("size", [0.0, 2e-5])
def test_scores_below_the_floor_have_the_dense_gradients_too(scaling: str, size: float) -> None:
    built = head(uneven("fc-sc", 0, scaling)).double()
    features = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * size
    learned = list(built.parameters())
    loss = SparseSigmoid(SparseTargets(LABELS, VALUES), list(UNEVEN.values()), CPU)
    wanted = torch.autograd.grad(loss(built(features), torch.arange(4)), learned)
    built.in_parts = True
    found = torch.autograd.grad(loss(built(features), torch.arange(4)), learned)
    assert all(held.isfinite().all() for held in wanted)
    for a, b in zip(wanted, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-15)


def test_products_in_bfloat16_are_near_those_in_float32() -> None:
    built = head(uneven("fc-sc", 0, "vertical"))
    features = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    loss = SparseSigmoid(SparseTargets(LABELS, VALUES), list(UNEVEN.values()), CPU)
    built.in_parts = True
    told = []
    for coarse in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=coarse):
            hidden, *rest = built(features)
        told.append((hidden.dtype, float(loss((hidden.float(), *rest), torch.arange(4)).detach())))
    assert [kind for kind, _ in told] == [torch.float32, torch.bfloat16]
    assert told[0][1] != told[1][1]
    assert told[1][1] == pytest.approx(told[0][1], rel=0.02)


@pytest.mark.parametrize(("kind", "shared"), KINDS)
def test_drawn_classes_stand_for_all_on_average(kind: str, shared: int) -> None:
    """Over every way to draw, loss and gradients are those of all classes; with all drawn, each time."""
    built = head(uneven(kind, shared)).double()
    features = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    learned, ids, verticals = [features, *built.parameters()], torch.arange(4), list(UNEVEN.values())
    built.in_parts = True
    targets = SparseTargets(LABELS, VALUES)
    exact = SparseSigmoid(targets, verticals, CPU)(built(features), ids)
    wanted = torch.autograd.grad(exact, learned)
    places = SparseSigmoid(targets, verticals, CPU)._by_vertical(LABELS.astype(np.int64), VALUES)

    def told(drawn: Sequence[tuple[int, ...]]) -> tuple[float, list[Tensor]]:
        hidden, _, gammas, weights = built(features)
        value = blocked_sigmoid(hidden, gammas, weights, places, drawn=[torch.tensor(held) for held in drawn])
        return float(value.detach()), [2 * g for g in torch.autograd.grad(value / 2, learned)]

    ways = list(product(*(combinations(range(n), count) for n, count in ((3, 2), (2, 1), (4, 3)))))
    values, gradients = zip(*(told(way) for way in ways), strict=True)
    assert np.ptp(values) > 1e-3
    assert np.mean(values) == pytest.approx(float(exact.detach()), rel=1e-9)
    whole = told([tuple(range(n)) for n in (3, 2, 4)])
    assert whole[0] == pytest.approx(float(exact.detach()), rel=1e-12)
    for at, held in enumerate(wanted):
        torch.testing.assert_close(sum(g[at] for g in gradients) / len(ways), held, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(whole[1][at], held, rtol=1e-9, atol=1e-12)


def test_what_is_drawn_depends_on_batch_and_seed_alone() -> None:
    built = head(uneven("fc-sc"))
    built.in_parts = True
    features = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))

    def value(seed: int, ids: list[int]) -> float:
        loss = SparseSigmoid(SparseTargets(LABELS, VALUES), list(UNEVEN.values()), CPU, drawn=0.5, seed=seed)
        return float(loss(built(features[ids]), torch.tensor(ids)).detach())

    assert value(1, [0, 1, 2]) == value(1, [0, 1, 2])
    assert len({value(seed, [0, 1, 2]) for seed in range(5)}) > 1


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_softmax_spreads_the_rest_evenly(temperature: float) -> None:
    random = np.random.default_rng(0)
    logits = torch.from_numpy(random.normal(size=(4, 9)) * 3).requires_grad_()
    labels = np.array([[0, 4], [2, 1], [5, 8], [3, 7]], np.int32)
    target = np.repeat((1 - VALUES.astype(np.float64).sum(axis=1, keepdims=True)) / 7, 9, axis=1)
    np.put_along_axis(target, labels.astype(np.int64), VALUES.astype(np.float64), axis=1)
    other = np.array([0.0, 0.5, 1.0, 0.25])
    weights = torch.from_numpy(1 - other)
    terms = -(torch.from_numpy(target) * torch.log_softmax(logits / temperature, dim=1)).sum(dim=1)
    expected = (terms * weights).mean() * temperature**2
    found = SparseSoftmax(SparseTargets(labels, VALUES), CPU, temperature, weights=1 - other)(logits, torch.arange(4))
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    for a, b in zip(torch.autograd.grad(expected, logits), torch.autograd.grad(found, logits), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_the_softmax_takes_all_classes_too() -> None:
    probs = np.random.default_rng(0).dirichlet(np.ones(5), 3).astype(np.float32)
    labels = np.tile(np.arange(5, dtype=np.int32), (3, 1))
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    found = SparseSoftmax(SparseTargets(labels, probs), CPU)(logits, torch.arange(3))
    expected = F.cross_entropy(logits, torch.from_numpy(probs))
    assert float(found) == pytest.approx(float(expected), rel=1e-6)


def test_samples_name_rows_of_the_targets() -> None:
    logits = torch.randn(2, 9, generator=torch.Generator().manual_seed(1))
    targets, verticals = SparseTargets(LABELS, VALUES), list(UNEVEN.values())
    some = SparseSigmoid(targets, verticals, CPU, samples=np.array([3, 1]))
    everything = SparseSigmoid(targets, verticals, CPU)
    assert float(some(logits, torch.tensor([0, 1]))) == float(everything(logits, torch.tensor([3, 1])))


def test_scores_of_a_vertical_have_the_length_gamma_and_none_is_divided_by_zero() -> None:
    scores = torch.tensor([[3.0, -4.0], [0.0, 0.0], [FLOOR / 2, 0.0]], requires_grad=True)
    found = scaled(scores, torch.tensor([2.0]))
    torch.testing.assert_close(found, torch.tensor([[1.2, -1.6], [0.0, 0.0], [1.0, 0.0]]))
    (gradient,) = torch.autograd.grad(found.sum(), scores)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("scaling", ["vertical", "class"])
def test_gammas_start_at_the_root_of_the_classes_or_where_they_are_told(scaling: str) -> None:
    plan = HeadPlan(head=Head.model_validate({"scaling": scaling}), verticals=verticals_in([400, 900]))
    for gamma, size in zip(head(plan).gammas, (400, 900), strict=True):
        assert gamma.requires_grad
        assert len(gamma) == (size if scaling == "class" else 1)
        assert float((gamma.detach() - size**0.5).abs().max()) < 6 * 1e-3**0.5
    if scaling == "class":
        assert 0.02 < float(head(plan).gammas[1].detach().std()) < 0.05
    fixed = plan.model_copy(update={"head": Head.model_validate({"scaling": scaling, "start": 10, "learned": False})})
    assert all(float((g - 10).abs().max()) == 0 and not g.requires_grad for g in head(fixed).gammas)


@pytest.mark.parametrize("name", ["cnn3@0.25", "resnet8@0.25", "torchvision:resnet18"])
def test_a_head_takes_the_place_of_the_last_layer(name: str, tmp_path: Path) -> None:
    def student() -> nn.Module:
        network = build(name, classes=9, channels=1, seed=1)
        assert isinstance(place(network, uneven("fc-sc", 0, "vertical"), (1, 32, 32), 1, name), ConcentratedHead)
        return network

    network, other = student(), student()
    pixels = torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    assert network.training
    assert torch.equal(network.eval()(pixels), other.eval()(pixels))
    assert network(pixels).shape == (3, 9)
    found = head_of(network)
    assert found is not None
    with torch.no_grad():
        for weight in found.outputs:
            weight[0].add_(1)
    assert not torch.equal(network(pixels), other(pixels))
    save_model(tmp_path / "weights", network)
    load_model(tmp_path / "weights", other)
    assert torch.equal(network(pixels), other(pixels))


def test_a_network_without_a_last_linear_layer_has_no_place() -> None:
    network = build("torchvision:squeezenet1_1", classes=9, channels=3, seed=1)
    with pytest.raises(SettingsError, match="ends in a linear layer"):
        place(network, uneven("fc-sc"), (3, 64, 64), 1, "torchvision:squeezenet1_1")


@pytest.mark.parametrize("verticals", [{"a": (0, 1), "b": (1, 2)}, {"a": (0,), "b": (2,)}, {}, {"a": (0,), "b": ()}])
def test_a_plan_is_a_partition(verticals: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(ValidationError, match="no partition"):
        HeadPlan(head=Head(), verticals=verticals)


def test_the_loop_trains_by_parts_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (24, 16, 16, 1), np.uint8)
    labels = np.tile(np.array([[0, 3], [1, 2], [5, 6]], np.int32), (8, 1))
    values = np.tile(np.array([[0.8, 0.2]], np.float32), (24, 1))
    fit = Fit(epochs=4, batch_size=8, learning_rate=0.02, precision="f32", augment=False)
    loss = SparseSigmoid(SparseTargets(labels, values), list(UNEVEN.values()), CPU)

    def trained(folder: Path, stop: bool) -> tuple[list[float], dict[str, Tensor]]:
        network = build("cnn3@0.25", classes=9, channels=1, seed=1)
        place(network, uneven("sc-sc", 0, "class"), (1, 16, 16), 1, "cnn3@0.25").in_parts = True

        def on_epoch(record: object) -> None:
            if stop and len(seen) == 1:
                raise KeyboardInterrupt
            seen.append(record)

        seen: list[object] = []
        records = train(network, images, loss, fit, Preprocessing(), seed=1, folder=folder, on_epoch=on_epoch)
        return [record.loss for record in records], network.state_dict()

    losses, weights = trained(tmp_path / "whole", False)
    assert losses[-1] < losses[0]
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "torn", True)
    again, others = trained(tmp_path / "torn", False)
    assert again == losses
    assert all(torch.equal(weights[name], others[name]) for name in weights)
