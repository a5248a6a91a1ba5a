from __future__ import annotations

import pytest
import torch
from torch import nn

from consilience.common.errors import SettingsError, StudentError
from consilience.common.nets import build
from consilience.common.nets.architectures import ARCHITECTURES
from consilience.common.nets.taps import features, one_layout, taps, units


def network(name: str, channels: int = 1) -> nn.Module:
    """A network whose batch normalisation has seen something."""
    made = build(name, classes=5, channels=channels, seed=1)
    with torch.no_grad():
        made(torch.randn(8, channels, 16, 16, generator=torch.Generator().manual_seed(0)))
    return made.eval()


@pytest.mark.parametrize("times", ["", "@1", "@0.3", "@1.25"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_units_in_turn_are_the_network(name: str, times: str) -> None:
    whole = network(name + times)
    images = torch.randn(3, 1, 16, 16)
    before = images.clone()
    found = features(whole, images)
    assert torch.equal(found["scores"], whole(images))
    assert torch.equal(images, before)
    assert [(tap.name, tap.channels) for tap in taps(whole)] == [(key, held.shape[1]) for key, held in found.items()]
    last = images
    for unit, held in zip(units(whole), found.values(), strict=True):
        assert torch.equal(unit(last), held)  # no unit writes into the tap before
        last = held
    assert {id(p) for unit in units(whole) for p in unit.parameters()} == {id(p) for p in whole.parameters()}


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("cnn3", [32, 64, 128]),
        ("vgg6", [32, 32, 64, 64, 128, 128]),
        ("vgg6@1.25", [40, 40, 80, 80, 160, 160]),
        ("resnet8@1.5", [24, 24, 48, 96]),
        ("resnet20", [16] * 4 + [32] * 3 + [64] * 3),
        ("mobilenet-small@0.5", [16, 32, 64, 64, 64, 128]),
    ],
)
def test_taps(name: str, channels: list[int]) -> None:
    found = taps(network(name))
    assert [tap.channels for tap in found] == [*channels, 5]
    assert [tap.name for tap in found] == [*(f"layer{i + 1}" for i in range(len(channels))), "scores"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_taps_lie_before_an_activation_that_comes_next(name: str) -> None:
    found = features(network(name), torch.randn(4, 1, 16, 16))
    assert all((held < 0).any() for held in found.values())
    assert all(unit.between[0].__class__ is nn.ReLU for unit in units(network(name))[1:])


def test_taps_of_a_plain_network_are_what_its_normalisation_gives() -> None:
    whole, images = network("vgg6"), torch.randn(2, 1, 16, 16)
    given: list[torch.Tensor] = []
    for module in whole.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda _, __, output: given.append(output.clone()))
    found = list(features(whole, images).values())
    assert all(torch.equal(one, other) for one, other in zip(given, found, strict=False))
    assert len(given) == len(found) - 1


def test_the_tap_of_a_residual_block_is_its_sum() -> None:
    whole, images = network("resnet8"), torch.randn(2, 1, 16, 16)
    given: list[torch.Tensor] = []
    for module in whole.modules():
        if type(module).__name__ == "Residual":
            module.register_forward_hook(lambda _, __, output: given.append(output.clone()))
    found = [held.relu() for name, held in features(whole, images).items() if name in ("layer2", "layer3", "layer4")]
    assert len(given) == 0  # blocks are run up to their sum
    whole(images)
    assert all(torch.equal(one, other) for one, other in zip(given, found, strict=True))


@pytest.mark.parametrize("other", [nn.Linear(3, 2), nn.Sequential(), nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())])
def test_networks_without_taps(other: nn.Module) -> None:
    with pytest.raises(StudentError, match=f"A network {type(other).__name__} is not laid out.*common-feature"):
        taps(other)


@pytest.mark.parametrize("name", ["cnn3", "resnet8", "mobilenet-small"])
def test_networks_with_group_normalisation_have_no_taps(name: str) -> None:
    def regroup(module: nn.Module) -> nn.Module:
        for at, child in module.named_children():
            setattr(module, at, nn.GroupNorm(4, child.num_features) if isinstance(child, nn.BatchNorm2d) else child)
            regroup(child)
        return module

    with pytest.raises(StudentError, match="is not laid out"):
        taps(regroup(network(name)))
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(StudentError, match="is not laid out"):
        taps(plain)


def test_one_layout() -> None:
    one_layout({"a": taps(network("resnet8")), "b": taps(network("resnet8@1.4", channels=3))})
    one_layout({"a": taps(network("cnn3"))})
    one_layout({})


@pytest.mark.parametrize(
    ("other", "where"),
    [
        ("vgg6", "at layer2: relu maxpool2 conv3x3/1 norm and relu conv3x3/1 norm"),
        ("resnet8", r"at layer2: .* and relu residual\(conv3x3/1 norm relu conv3x3/1 norm\)"),
    ],
)
def test_other_layouts(other: str, where: str) -> None:
    first = taps(network("cnn3"))
    with pytest.raises(StudentError, match=f"teachers of b and c differ in layout {where}.*use common-feature"):
        one_layout({"a": first, "b": first, "c": taps(network(other))})


def test_another_depth() -> None:
    with pytest.raises(StudentError, match="differ in layout in depth: 2 and 4 layers"):
        one_layout({"a": taps(network("cnn3"))[:2], "b": taps(network("cnn3"))})


@pytest.mark.parametrize("name", ["vgg6@", "vgg6@0", "vgg6@0.01", "vgg6@17", "vgg6@1e1", "vgg6@-1", "cnn3@wide"])
def test_widths_that_are_none(name: str) -> None:
    with pytest.raises(SettingsError, match=f"'{name}' asks for .* times the width; allowed: a number from 0.1 to 16"):
        build(name, classes=2, channels=1, seed=0)


@pytest.mark.parametrize("name", ["resnet18@2", "nothing@2"])
def test_only_ours_have_widths(name: str) -> None:
    with pytest.raises(SettingsError, match=f"'{name}' is unknown"):
        build(name, classes=2, channels=3, seed=0)


def test_every_shortcut_of_a_wider_residual_network_is_a_convolution() -> None:
    assert any(isinstance(module, nn.Identity) for module in network("resnet20").modules())
    assert not any(isinstance(module, nn.Identity) for module in network("resnet20@1").modules())
