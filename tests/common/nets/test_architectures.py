from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from consilience.common.errors import MissingExtraError, SettingsError
from consilience.common.nets import build
from consilience.common.nets.architectures import ARCHITECTURES


@pytest.mark.parametrize(("size", "channels"), [(28, 1), (32, 3), (16, 3)])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_forward_and_backward(name: str, size: int, channels: int) -> None:
    network = build(name, classes=7, channels=channels, seed=0)
    logits = network(torch.randn(2, channels, size, size))
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    for parameter in network.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_last_features_are_a_quarter_of_the_size(name: str) -> None:
    network = build(name, classes=7, channels=1, seed=0)
    pooling = next(module for module in network.modules() if isinstance(module, nn.AdaptiveAvgPool2d))
    shapes: list[torch.Size] = []
    pooling.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    network(torch.randn(2, 1, 28, 20))
    assert shapes[0][2:] == (7, 5)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("cnn3", 95_000), ("resnet8", 78_000), ("resnet20", 273_000), ("vgg6", 289_000), ("mobilenet-small", 86_000)],
)
def test_number_of_parameters(name: str, parameters: int) -> None:
    network = build(name, classes=10, channels=3, seed=0)
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(parameters, rel=0.005)


@pytest.mark.parametrize("name", ["resnet8", "torchvision:squeezenet1_1"])
def test_weights_depend_on_the_seed_alone(name: str) -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = build(name, classes=3, channels=3, seed=5).state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    again = build(name, classes=3, channels=3, seed=5).state_dict()
    other = build(name, classes=3, channels=3, seed=6).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


def test_convolutions_start_for_relu() -> None:
    weights = next(build("vgg6", classes=10, channels=3, seed=0).parameters())
    assert weights.std().item() == pytest.approx((2 / (32 * 9)) ** 0.5, rel=0.1)


@pytest.mark.parametrize(("name", "channels"), [("resnet18", 3), ("torchvision:shufflenet_v2_x0_5", 1)])
def test_torchvision_by_name(name: str, channels: int) -> None:
    network = build(name, classes=4, channels=channels, seed=0)
    assert network(torch.randn(2, channels, 32, 32)).shape == (2, 4)


def test_torchvision_networks_with_several_heads_give_one() -> None:
    network = build("googlenet", classes=4, channels=3, seed=0).train()
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 4)


def test_grey_is_repeated() -> None:
    grey = build("shufflenet_v2_x0_5", classes=4, channels=1, seed=0).eval()
    colour = build("shufflenet_v2_x0_5", classes=4, channels=3, seed=0).eval()
    image = torch.randn(2, 1, 32, 32)
    assert torch.allclose(grey(image), colour(image.repeat(1, 3, 1, 1)), atol=1e-6)


@pytest.mark.parametrize("name", ["resnet9", "torchvision:cnn3", "ResNet", "torchvision:fcn_resnet50"])
def test_unknown_name(name: str) -> None:
    with pytest.raises(SettingsError, match=f"'{name}' is unknown; allowed: cnn3, .*resnet18.* architecture"):
        build(name, classes=3, channels=3, seed=0)


def test_without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "consilience.common.nets.vision", raising=False)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(MissingExtraError, match=r"'resnet18' is none of ours .* pip install 'consilience\[vision\]'"):
        build("resnet18", classes=3, channels=3, seed=0)
    build("cnn3", classes=3, channels=3, seed=0)
