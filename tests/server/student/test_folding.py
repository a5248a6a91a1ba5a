"""Folding an affine map into what comes before it: outputs before and after."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from consilience.common.errors import StudentError
from consilience.common.nets import build
from consilience.common.nets.architectures import ARCHITECTURES, Residual
from consilience.common.nets.taps import units
from consilience.server.student.autoencoder import Affine
from consilience.server.student.folding import fold, settle


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def drawn(channels: int, seed: int = 0) -> Affine:
    rng = np.random.default_rng(seed)
    return Affine(rng.normal(size=(channels, channels)) / channels**0.5, rng.normal(size=channels))


def applied(adapter: Affine, features: Tensor) -> Tensor:
    return torch.from_numpy(adapter(features.detach().double().numpy()))


def seen(module: nn.Module, *shape: int) -> nn.Module:
    """Give batch normalisation weights, biases and statistics that are nothing special."""
    with torch.no_grad():
        for each in module.modules():
            if isinstance(each, nn.BatchNorm1d | nn.BatchNorm2d):
                if each.running_mean is not None and each.running_var is not None:
                    each.running_mean.normal_()
                    each.running_var.uniform_(0.2, 3)
                if each.affine:
                    each.weight.normal_()
                    each.bias.normal_()
    return module.eval()


LAYERS: dict[str, Callable[[], list[nn.Module]]] = {
    "linear": lambda: [nn.Linear(4, 6)],
    "linear without bias": lambda: [nn.Linear(4, 6, bias=False)],
    "linear, normalised": lambda: [nn.Linear(4, 6), nn.BatchNorm1d(6)],
    "convolution": lambda: [nn.Conv2d(4, 6, 3)],
    "convolution without bias": lambda: [nn.Conv2d(4, 6, 3, bias=False)],
    "strided, padded, dilated": lambda: [nn.Conv2d(4, 6, (3, 5), stride=(2, 1), padding=(1, 4), dilation=2)],
    "padded by reflection": lambda: [nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect")],
    "normalised": lambda: [nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)],
    "with bias, normalised": lambda: [nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6)],
    "normalised without affine": lambda: [nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False)],
    "normalised, large eps": lambda: [nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, eps=0.1)],
    "after another": lambda: [nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)],
    "residual": lambda: [Residual(4, 6, stride=2)],
    "residual, identity": lambda: [nn.Conv2d(4, 6, 1), nn.ReLU(), Residual(6, 6, stride=1)],
    "residual, projected": lambda: [nn.Conv2d(4, 6, 1), nn.ReLU(), Residual(6, 6, stride=1, projected=True)],
}


def run(layers: nn.Sequential, features: Tensor) -> Tensor:
    *first, last = layers
    for layer in first:
        features = layer(features)
    found: Tensor = last.joined(features) if isinstance(last, Residual) else last(features)
    return found


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_are_as_before(name: str, kind: torch.dtype) -> None:
    layers = nn.Sequential(*LAYERS[name]()).to(kind)
    seen(layers)
    features = torch.randn(5, 4, dtype=kind) if "linear" in name else torch.randn(3, 4, 9, 9, dtype=kind)
    adapter = drawn(6)
    expected = applied(adapter, run(layers, features))
    types = [type(layer) for layer in layers]
    fold(adapter, layers)
    assert [type(layer) for layer in layers] == types
    found = run(layers, features)
    assert found.dtype == kind
    # fp32: the folded convolution rounds at the size of its terms
    assert torch.allclose(found.double(), expected, atol=1e-5 if kind == torch.float32 else 1e-10, rtol=1e-5)


@pytest.mark.parametrize("times", ["@1", "@1.3"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_maps_before_every_activation_of_a_network(name: str, times: str) -> None:
    network = seen(build(name + times, classes=4, channels=1, seed=0)).double()
    names = {key: held.shape for key, held in network.state_dict().items()}
    images = torch.randn(2, 1, 16, 16, dtype=torch.float64)
    adapters = [drawn(unit.tap.channels, seed) for seed, unit in enumerate(units(network))]
    expected = images
    for unit, adapter in zip(units(network), adapters, strict=True):
        expected = applied(adapter, unit(expected))
    for unit, adapter in zip(units(network), adapters, strict=True):
        fold(adapter, unit)
    assert torch.allclose(network(images), expected, atol=1e-5, rtol=1e-8)
    assert {key: held.shape for key, held in network.state_dict().items()} == names


def test_an_identity_shortcut_becomes_that_of_the_projected_layout() -> None:
    network = seen(build("resnet20", classes=4, channels=1, seed=0))
    for unit in units(network):
        fold(Affine.identity(unit.tap.channels), unit)
    images = torch.randn(2, 1, 16, 16)
    projected = build("resnet20@1", classes=4, channels=1, seed=0).eval()
    projected.load_state_dict(network.state_dict())
    assert torch.allclose(projected(images), network(images), atol=1e-5)
    original = seen(build("resnet20", classes=4, channels=1, seed=0))
    assert original.state_dict().keys() < network.state_dict().keys()


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([nn.Conv2d(6, 6, 3, groups=6)], "in 6 groups; allowed"),
        ([nn.Conv2d(6, 5, 3)], "of 5 outputs in 1 groups"),
        ([nn.Conv2d(6, 6, 3), nn.ReLU()], "end with Conv2d ReLU; allowed"),
        ([nn.ReLU(), nn.BatchNorm2d(6)], "end with ReLU BatchNorm2d"),
        ([nn.BatchNorm2d(6)], "end with BatchNorm2d"),
        ([], "end with no layer"),
        ([nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6, track_running_stats=False)], "keeps no statistics"),
    ],
)
def test_layers_that_cannot_hold_a_map(layers: list[nn.Module], message: str) -> None:
    with pytest.raises(StudentError, match=message):
        fold(drawn(6), nn.Sequential(*layers).eval())


def test_batch_normalisation_in_training_is_no_fixed_map() -> None:
    layers = nn.Sequential(nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6))
    before = {key: held.clone() for key, held in layers.state_dict().items()}
    with pytest.raises(StudentError, match=r"is in training mode.*Call eval\(\)"):
        fold(drawn(6), layers)
    assert all(torch.equal(held, before[key]) for key, held in layers.state_dict().items())


@pytest.fixture
def folded() -> nn.Module:
    network = seen(build("resnet8@1", classes=4, channels=1, seed=0))
    for unit in units(network):
        fold(drawn(unit.tap.channels), unit)
    return network


def test_settling_changes_nothing_in_evaluation_and_makes_training_like_it(folded: nn.Module) -> None:
    images = torch.randn(64, 1, 16, 16)
    expected = folded(images).detach()
    unlike = (copy.deepcopy(folded).train()(images).detach() - expected).abs().max()
    settle(folded, [block.numpy() for block in images.split(24)])
    assert torch.allclose(folded(images), expected, atol=1e-4 * expected.abs().max().item())
    assert not folded.training
    again = folded.train()(images).detach()
    assert (again - expected).abs().max() < 1e-3 * expected.abs().max()
    assert unlike > 0.1 * expected.abs().max()


def test_settled_statistics_are_those_of_all_blocks(folded: nn.Module) -> None:
    images = torch.randn(10, 1, 16, 16)
    blocks = [np.zeros((0, 1, 16, 16), np.float32), *(block.numpy() for block in images.split(3))]
    for block in blocks:
        block.flags.writeable = False  # as of a memory map
    settle(folded, blocks)
    convolution, norm, *_ = cast(Any, folded)
    given = convolution(images).double()
    assert torch.allclose(norm.running_mean.double(), given.mean(dim=(0, 2, 3)), atol=1e-5)
    assert torch.allclose(norm.running_var.double(), given.var(dim=(0, 2, 3), correction=0), rtol=1e-4)


def test_settling_on_nothing(folded: nn.Module) -> None:
    with pytest.raises(StudentError, match="there are no images"):
        settle(folded, [])
    with pytest.raises(StudentError, match="no weight and bias"):
        settle(nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, affine=False)), [np.ones((2, 1, 3, 3), np.float32)])
    assert not any(module._forward_pre_hooks for module in folded.modules())
