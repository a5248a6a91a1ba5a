"""Tails here and at a site: equal outputs and gradients, what asking costs, and answers that are none."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from consilience.common.errors import ProtocolError, StudentError
from consilience.common.nets.blocks import Blocks, export_tail, frozen, rebuild_tail
from consilience.server.student.remote_tail import RemoteTail
from consilience.server.student.tails import LocalTail, TeacherTail, need_one_layout, through
from helpers.feature_answers import teacher
from helpers.filtered import Floats, StandIn, local

pytestmark = pytest.mark.usefixtures("one_thread")

ARCHITECTURES = ["cnn3@0.2", "resnet8@0.5", "mobilenet-small@0.3"]


def features(network: nn.Module, block: int, count: int = 5) -> Tensor:
    """Features as a student might give them, at a block of the network."""
    images = torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(block))
    with torch.no_grad():
        held = Blocks(network).run(images, 0, block)
        return held + 0.3 * torch.randn(held.shape, generator=torch.Generator().manual_seed(9))


def loss(outputs: Tensor) -> Tensor:
    """Not linear in the outputs, so that the gradient of each depends on them."""
    return -(outputs.log_softmax(dim=1)[:, 0]).mean() + outputs.square().mean()


def gradient(tail: TeacherTail, block: int, given: Tensor) -> tuple[Tensor, Tensor]:
    leaf = given.clone().requires_grad_()
    (outputs,) = through([tail], block, [leaf])
    torch.autograd.backward(loss(outputs))
    assert leaf.grad is not None
    return outputs.detach(), leaf.grad


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_remote_gradients_are_those_of_the_network(name: str) -> None:
    network = teacher(name, 1)
    blocks = Blocks(network)
    for block in range(1, blocks.count + 1):
        given = features(network, block)
        leaf = given.clone().requires_grad_()
        direct = blocks.run(leaf, block, blocks.count + 1)
        torch.autograd.backward(loss(direct))
        assert leaf.grad is not None
        largest = float(leaf.grad.abs().max())
        assert largest > 0
        lent = LocalTail("here", rebuild_tail(export_tail(network, name, 1)), name)
        for tail in (lent, local("here", name, network, block), StandIn(network).remote("there")):
            outputs, found = gradient(tail, block, given)
            assert torch.allclose(outputs, direct, atol=1e-4)
            assert float((found - leaf.grad).abs().max()) < 1e-4 * largest


def test_gradients_are_those_of_finite_differences() -> None:
    network = teacher("cnn3@0.2", 1)
    given = features(network, 2, 1)
    found = gradient(StandIn(network).remote("there"), 2, given)[1].flatten()
    blocks, step = frozen(Blocks(network)).double(), 1e-6
    for at in range(0, given.numel(), 37):
        moved = [given.double().flatten() for _ in range(2)]
        moved[0][at] += step
        moved[1][at] -= step
        high, low = (float(loss(blocks.run(each.view(given.shape), 2, 4))) for each in moved)
        assert float(found[at]) == pytest.approx((high - low) / (2 * step), abs=1e-5)


def test_a_tail_learns_nothing() -> None:
    network = teacher("resnet8@0.5", 1).train()
    tail = local("here", "resnet8@0.5", network)
    lent = tail.lent
    assert lent is not None
    before = {name: held.clone() for name, held in lent[0].state_dict().items()}
    gradient(tail, 1, features(network.eval(), 1))
    assert all(torch.equal(held, before[name]) for name, held in lent[0].state_dict().items())
    assert all(p.grad is None for p in lent[0].parameters())
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(held, before[name]) for name, held in lent[0].state_dict().items())  # a copy


def test_a_samples_outputs_do_not_depend_on_the_others() -> None:
    network = teacher("cnn3@0.2", 1).train()
    tail, given = local("here", "cnn3@0.2", network), features(network.eval(), 1)
    alone = torch.cat([tail.outputs(1, each[None]) for each in given])
    assert torch.allclose(tail.outputs(1, given), alone, atol=1e-5)


def test_rounds_and_bytes_are_counted() -> None:
    network = teacher("cnn3@0.2", 1, classes=4)
    site = StandIn(network)
    tail = site.remote("there", most=2)
    given = features(network, 2)
    values = given[0].numel()
    gradient(tail, 2, given)
    assert site.asked == [(kind, 2, count) for kind in ("outputs", "vjp") for count in (2, 2, 1)]
    assert (tail.spent.rounds, tail.spent.samples) == (6, 10)
    assert tail.spent.sent == 4 * 5 * (2 * values + 4)
    assert tail.spent.received == 4 * 5 * (values + 4)
    tail.outputs(2, given)
    assert (tail.spent.rounds, tail.spent.samples) == (9, 15)


def test_a_batch_in_parts_gives_what_it_gives_whole() -> None:
    network = teacher("cnn3@0.2", 1)
    given = features(network, 1)
    whole, parts = (gradient(StandIn(network).remote("there", most=most), 1, given) for most in (1024, 2))
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(whole, parts, strict=True))


def test_without_a_gradient_none_is_asked_for() -> None:
    network = teacher("cnn3@0.2", 1)
    site = StandIn(network)
    with torch.no_grad():
        (outputs,) = through([site.remote("there")], 1, [features(network, 1)])
    assert not outputs.requires_grad
    assert site.asked == [("outputs", 1, 5)]


def test_nobody_is_asked_about_nothing() -> None:
    network = teacher("cnn3@0.2", 1)
    site, other = StandIn(network), StandIn(network)
    given = features(network, 1).requires_grad_()
    outputs = through([site.remote("a"), other.remote("b")], 1, [given[:0], given])
    assert outputs[0].shape == (0, 3)
    torch.autograd.backward(outputs[0].sum() + outputs[1].sum())
    assert site.asked == []
    assert other.asked == [("outputs", 1, 5), ("vjp", 1, 5)]


def test_outputs_that_no_loss_uses_are_not_pulled_back() -> None:
    network = teacher("cnn3@0.2", 1)
    site, other = StandIn(network), StandIn(network)
    given = features(network, 1).requires_grad_()
    outputs = through([site.remote("a"), other.remote("b")], 1, [given, given])
    torch.autograd.backward(outputs[1].sum())
    assert [kind for kind, *_ in site.asked] == ["outputs"]
    assert [kind for kind, *_ in other.asked] == ["outputs", "vjp"]


@pytest.mark.parametrize("learning", [True, False])
def test_a_tail_given_twice_is_asked_once(learning: bool) -> None:
    network = teacher("cnn3@0.2", 1)
    site, other = StandIn(network), StandIn(teacher("cnn3@0.2", 2))
    tails = [site.remote("a"), other.remote("b")]
    given = [features(network, 1, count).requires_grad_() for count in (2, 3, 1)]
    order = [tails[0], tails[1], tails[0]]
    with torch.set_grad_enabled(learning):
        outputs = through(order, 1, given)
    assert site.asked == [("outputs", 1, 3)]
    for tail, each, told in zip(order, given, outputs, strict=True):
        assert torch.allclose(told, tail.outputs(1, each), atol=1e-5)
    if learning:
        torch.autograd.backward(sum((loss(each) for each in outputs), start=torch.zeros(())))
        assert [kind for kind, *_ in site.asked].count("vjp") == 1
        for tail, each in zip(order, given, strict=True):
            assert each.grad is not None
            assert torch.allclose(each.grad, gradient(tail, 1, each.detach())[1], atol=1e-5)


def test_sites_are_asked_at_the_same_time() -> None:
    network = teacher("cnn3@0.2", 1)
    sites = [StandIn(network) for _ in range(3)]
    together = threading.Barrier(3, timeout=20)
    tails: list[TeacherTail] = []
    for at, site in enumerate(sites):

        def ask(block: int, held: Floats, site: StandIn = site) -> Floats:
            together.wait()  # breaks unless all three are here
            return site.ask(block, held)

        def pull(block: int, held: Floats, given: Floats, site: StandIn = site) -> Floats:
            together.wait()
            return site.ask_vjp(block, held, given)

        tails.append(RemoteTail(f"site-{at}", "", site.blocks.taps, 1, ask, pull))
    given = features(network, 1).requires_grad_()
    mixed = [*tails, local("here", "cnn3@0.2", network)]
    outputs = through(mixed, 1, [given] * 4)
    torch.autograd.backward(sum((loss(each) for each in outputs), start=torch.zeros(())))
    assert given.grad is not None
    assert torch.allclose(given.grad, 4 * gradient(mixed[3], 1, given.detach())[1], atol=1e-5)


Answer = Callable[[Floats], Any]
WRONG: list[tuple[Answer, str]] = [
    (lambda held: held[:-1], r"\(4, {k}.*\) float32; expected \(5, {k}"),
    (lambda held: held[..., None], "expected"),
    (lambda held: held.astype(np.float64), "float64; expected"),
    (lambda held: np.where(held == held.max(), np.float32(np.nan), held), "with a value that is not finite; expected"),
    (lambda held: np.full_like(held, -np.inf), "with a value that is not finite; expected"),
    (lambda held: held.tolist(), "list; expected"),
    (lambda _: None, "NoneType; expected"),
]


@pytest.mark.parametrize(("answer", "message"), WRONG)
@pytest.mark.parametrize("kind", ["outputs", "gradients"])
def test_answers_that_are_none(answer: Answer, message: str, kind: str) -> None:
    network = teacher("cnn3@0.2", 1)
    site = StandIn(network)

    def ask(block: int, held: Floats) -> Floats:
        found = site.ask(block, held)
        return answer(found) if kind == "outputs" else found  # type: ignore[no-any-return]

    def pull(block: int, held: Floats, given: Floats) -> Floats:
        return answer(site.ask_vjp(block, held, given))  # type: ignore[no-any-return]

    tail = RemoteTail("liar", "", site.blocks.taps, 1, ask, pull)
    wanted = message.replace("{k}", "3" if kind == "outputs" else "13")
    with pytest.raises(ProtocolError, match=f"tail of site liar answered {kind} .*{wanted}.*Have the site"):
        gradient(tail, 2, features(network, 2))


@pytest.mark.parametrize("remote", [True, False])
def test_features_that_a_tail_does_not_take(remote: bool) -> None:
    network = teacher("cnn3@0.2", 1)
    tail = StandIn(network).remote("x", 2) if remote else local("x", "cnn3@0.2", network, 2)
    with pytest.raises(StudentError, match=r"does not take features at block 1|cannot be run: held are 3 to 3"):
        through([tail], 1, [features(network, 1)])
    with pytest.raises(StudentError, match=r"at block 2 have shape .*allowed: \(n, 13, H, W\)"):
        through([tail], 2, [features(network, 1)])


def test_a_tail_of_all() -> None:
    network = teacher("cnn3@0.2", 1)
    with pytest.raises(StudentError, match="begins at block 0, which is the images"):
        local("x", "cnn3@0.2", network, 0)
    with pytest.raises(ProtocolError, match="offers the tail after block 0 of 3"):
        StandIn(network).remote("x", 0)
    with pytest.raises(ProtocolError, match="offers the tail after block 4 of 3"):
        StandIn(network).remote("x", 4)


def test_tails_are_told_apart() -> None:
    networks = [teacher("cnn3@0.2", seed) for seed in (1, 2)]
    found = {local("x", "cnn3@0.2", network, first).fingerprint for network in networks for first in (1, 2)}
    assert len(found) == 4
    assert local("x", "cnn3@0.2", networks[0], 2).fingerprint in found


def test_blocks_of_another_layout() -> None:
    student = Blocks(teacher("resnet8@1", 0))
    need_one_layout(student.taps, "resnet8@1", [local("a", "resnet8", teacher("resnet8", 1), 2)])
    with pytest.raises(StudentError, match=r"student \(resnet8@1\) and site b differ in layout at .*NAME@TIMES"):
        need_one_layout(student.taps, "resnet8@1", [local("b", "cnn3@0.2", teacher("cnn3@0.2", 1))])
    with pytest.raises(StudentError, match=r"and site c differ in layout at layer3"):
        need_one_layout(student.taps, "resnet8@1", [StandIn(teacher("resnet20@0.2", 1)).remote("c")])
