"""Networks in blocks, and tails that are lent: equal to the network, and refused where they are not exactly its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from consilience.common.errors import ProtocolError, StudentError
from consilience.common.nets import build
from consilience.common.nets.architectures import ARCHITECTURES
from consilience.common.nets.blocks import MOST_OUTPUTS, Blocks, LentTail, export_tail, rebuild_tail, skeleton

IMAGES = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def network(name: str, classes: int = 5) -> nn.Module:
    """A network whose batch normalisation has seen something."""
    made = build(name, classes=classes, channels=1, seed=1)
    with torch.no_grad():
        made(torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(0)))
    return made.eval()


LENT = export_tail(network("cnn3@0.2"), "cnn3@0.2", 2)


@pytest.mark.parametrize("name", [*ARCHITECTURES, "resnet8@1.3"])
@torch.no_grad()
def test_blocks_in_turn_are_the_network(name: str) -> None:
    whole = network(name)
    blocks = Blocks(whole)
    expected = whole(IMAGES)
    assert blocks.head.out_features == 5
    for cut in range(1, blocks.count + 1):
        before = blocks.run(IMAGES, 0, cut)
        assert before.shape[1] == blocks.taps[cut - 1].channels
        assert torch.equal(blocks.run(before, cut, blocks.count + 1), expected)
        assert torch.equal(Blocks(whole, cut)(before), expected)
        assert torch.equal(blocks.run(before, cut, cut), before)
    assert {id(p) for p in blocks.parameters()} == {id(p) for p in whole.parameters()}


@pytest.mark.parametrize("name", [*ARCHITECTURES, "vgg6@0.3"])
@torch.no_grad()
def test_a_lent_tail_is_the_networks(name: str) -> None:
    whole = network(name)
    blocks = Blocks(whole)
    for block in range(1, blocks.count + 1):
        tail = rebuild_tail(export_tail(whole, name, block))
        assert torch.equal(tail(blocks.run(IMAGES, 0, block)), whole(IMAGES))
        assert (tail.first, tail.taps) == (block, blocks.taps)
        assert not any(parameter.requires_grad for parameter in tail.parameters())
        assert not any(module.training for module in tail.modules())


def test_a_tail_has_nothing_of_the_blocks_before() -> None:
    whole = network("cnn3@0.2")
    with torch.no_grad():
        for parameter in Blocks(whole).units[1].parameters():
            parameter.add_(1.0)
    assert export_tail(whole, "cnn3@0.2", 2) == LENT
    held = safetensors.torch.load(LENT.tensors)
    # of widths 6, 13 and 26: a convolution, its normalisation, and the head
    assert sum(each.numel() for each in held.values()) == 26 * 13 * 9 + 4 * 26 + 26 * 5 + 5


def test_the_temperature_divides_the_scores() -> None:
    whole = network("resnet8")
    before = Blocks(whole).run(IMAGES, 0, 2).detach()
    tail = rebuild_tail(export_tail(whole, "resnet8", 2, temperature=2.5))
    assert torch.allclose(tail(before) * 2.5, whole(IMAGES), atol=1e-5)
    each = 1.0 + torch.arange(whole(IMAGES).shape[1])
    tail = rebuild_tail(export_tail(whole, "resnet8", 2, temperature=each.tolist()))
    assert torch.allclose(tail(before) * each, whole(IMAGES), atol=1e-5)


@pytest.mark.parametrize(
    "other",
    [
        nn.Linear(3, 2),
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)),
        build("resnet18", classes=2, channels=3, seed=0),
    ],
)
def test_networks_that_cannot_be_cut(other: nn.Module) -> None:
    with pytest.raises(StudentError, match=r"cannot be cut into blocks.*cnn3, vgg6.*common-feature"):
        Blocks(other)


@pytest.mark.parametrize(("first", "last"), [(1, 0), (0, 5), (-1, 2), (4, 6)])
def test_blocks_that_are_not_held(first: int, last: int) -> None:
    with pytest.raises(StudentError, match="held are 1 to 3, and the head as 4"):
        Blocks(network("cnn3")).run(IMAGES, first, last)
    with pytest.raises(StudentError, match="held are 3 to 3"):
        Blocks(network("cnn3"), 2).run(IMAGES, 1, 3)


def test_a_block_that_the_network_has_not() -> None:
    with pytest.raises(StudentError, match="A network of 3 blocks has none after block 4"):
        Blocks(network("cnn3"), 4)
    with pytest.raises(StudentError, match="Block 0 is the images"):
        export_tail(network("cnn3"), "cnn3", 0)


@pytest.mark.parametrize("shape", [(2, 31, 8, 8), (2, 32), (32, 8, 8)])
def test_features_of_other_channels(shape: tuple[int, ...]) -> None:
    with pytest.raises(StudentError, match=r"Features at block 1 have shape .*allowed: \(n, 32, H, W\)"):
        Blocks(network("cnn3")).run(torch.zeros(shape), 1, 2)


@pytest.mark.parametrize("name", ["cnn3@0.3", "resnet8"])
def test_the_wrong_architecture_is_not_lent(name: str) -> None:
    with pytest.raises(StudentError, match=r"The network is not .*Name the architecture"):
        export_tail(network("cnn3@0.2"), name, 2)


def test_weights_that_are_not_finite_are_not_lent() -> None:
    whole = network("cnn3@0.2")
    with torch.no_grad():
        Blocks(whole).head.bias[0] = torch.nan
    with pytest.raises(StudentError, match=r"units\.1\.learned\.0\.bias is not finite"):
        export_tail(whole, "cnn3@0.2", 2)


@pytest.mark.parametrize(
    "name",
    ["python:os:system", "torchvision:resnet18", "resnet18", "cnn3@99", "cnn3@x", "", "cnn3\n", "../cnn3", "a" * 999],
)
def test_architectures_that_are_not_taken(name: str) -> None:
    with pytest.raises(ProtocolError, match=r"A lent tail has .*Architecture .*(none of ours|asks for)"):
        rebuild_tail(dataclasses.replace(LENT, architecture=name))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block": 0}, "outputs after block 0"),
        ({"block": -1}, "outputs after block -1"),
        ({"block": 4}, "none after block 4"),
        ({"block": 1}, "bytes; the blocks after 1"),
        ({"classes": 0}, "0 outputs"),
        ({"classes": MOST_OUTPUTS + 1}, "outputs after block 2; allowed"),
        ({"classes": 6}, "units"),
        ({"architecture": "cnn3"}, "the blocks after 2 of cnn3 have"),
        ({"tensors": b""}, "0 bytes"),
        ({"tensors": LENT.tensors[:-1]}, "no safetensors file"),
        ({"tensors": LENT.tensors + b"x"}, "no safetensors file"),
        ({"tensors": b"\xff" * len(LENT.tensors)}, "no safetensors file"),
        ({"tensors": LENT.tensors + bytes(9999)}, "bytes; the blocks after 2"),
    ],
)
def test_tails_that_are_none(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        rebuild_tail(dataclasses.replace(LENT, **changes))  # type: ignore[arg-type]


Tensors = dict[str, Tensor]


def without(tensors: Tensors) -> None:
    del tensors["units.1.learned.0.bias"]


def more(tensors: Tensors) -> None:
    tensors["units.9.learned.0.bias"] = torch.zeros(1)


def renamed(tensors: Tensors) -> None:
    tensors["units.1.learned.0.bias\x00"] = tensors.pop("units.1.learned.0.bias")


def transposed(tensors: Tensors) -> None:
    tensors["units.1.learned.0.weight"] = tensors["units.1.learned.0.weight"].T.contiguous()


def integers(tensors: Tensors) -> None:
    tensors["units.1.learned.0.bias"] = tensors["units.1.learned.0.bias"].int()


def infinite(tensors: Tensors) -> None:
    tensors["units.0.learned.0.weight"][0, 0, 0, 0] = torch.inf


def negative(tensors: Tensors) -> None:
    tensors["units.0.learned.1.running_var"][0] = -1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without, "no tensor 'units.1.learned.0.bias'"),
        (more, "a tensor 'units.9.learned.0.bias' that its blocks have not"),
        (renamed, "no tensor"),
        (transposed, r"'units.1.learned.0.weight' of \(26, 5\).*have \(5, 26\) float32"),
        (integers, r"'units.1.learned.0.bias' of \(5,\) torch.int32"),
        (infinite, "'units.0.learned.0.weight' with a value that is not finite"),
        (negative, "a variance 'units.0.learned.1.running_var' below 0"),
    ],
)
def test_tensors_that_are_not_the_blocks(change: Callable[[Tensors], None], message: str) -> None:
    tensors = safetensors.torch.load(LENT.tensors)
    change(tensors)
    with pytest.raises(ProtocolError, match=message):
        rebuild_tail(dataclasses.replace(LENT, tensors=safetensors.torch.save(tensors)))


def test_a_tail_that_is_too_large_is_refused_before_it_is_made() -> None:
    huge = LentTail("resnet20@16", 1, MOST_OUTPUTS, b"")
    with pytest.raises(ProtocolError, match=r"bytes of tensors; allowed are 268,435,456"):
        rebuild_tail(huge)
    size = 4 * sum(p.numel() for p in safetensors.torch.load(LENT.tensors).values())
    with pytest.raises(ProtocolError, match=f"{size:,} bytes of tensors; allowed are {size - 1:,}"):
        rebuild_tail(LENT, most=size - 1)
    assert rebuild_tail(LENT, most=size).count == 3


@given(st.integers(0, len(LENT.tensors) - 1), st.integers(0, 255))
def test_one_wrong_byte_is_refused_or_a_weight(at: int, value: int) -> None:
    changed = bytearray(LENT.tensors)
    changed[at] = value
    try:
        tail = rebuild_tail(dataclasses.replace(LENT, tensors=bytes(changed)))
    except ProtocolError:
        return
    assert all(bool(held.isfinite().all()) for held in tail.state_dict().values())


def test_a_skeleton_takes_no_memory() -> None:
    made = skeleton("vgg6@16", MOST_OUTPUTS, 1)
    assert all(held.is_meta for held in made.state_dict().values())
    assert [tap.channels for tap in made.taps] == [512, 512, 1024, 1024, 2048, 2048, MOST_OUTPUTS]
