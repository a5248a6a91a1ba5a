from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from consilience.common.errors import StudentError
from consilience.common.nets import build
from consilience.common.nets.architectures import ARCHITECTURES
from consilience.common.nets.tapped import Tapped, tap_layouts, tap_names, tap_shapes
from consilience.common.nets.taps import features, taps

VISION = ["resnet18", "mobilenet_v2", "densenet121", "vgg11_bn"]


def network(name: str, channels: int = 1, seed: int = 1) -> nn.Module:
    """A network whose batch normalisation has seen something."""
    made = build(name, classes=5, channels=channels, seed=seed)
    with torch.no_grad():
        made(torch.randn(4, channels, 32, 32, generator=torch.Generator().manual_seed(0)))
    return made.eval()


def images(channels: int = 1, count: int = 3) -> Tensor:
    return torch.randn(count, channels, 32, 32, generator=torch.Generator().manual_seed(2))


def module_at(whole: nn.Module, name: str) -> nn.Module:
    return dict(whole.named_modules())[name]


@pytest.mark.parametrize("name", [*ARCHITECTURES, "vgg6@1.25", "resnet8@0.5"])
def test_our_taps_are_those_of_layers(name: str) -> None:
    whole, given = network(name), images()
    names = tap_names(whole)
    assert names == (*(tap.name for tap in taps(whole)[:-1]), "penultimate")
    assert list(tap_layouts(whole).values()) == list(taps(whole)[:-1])
    expected = features(whole, given)
    scores, found = Tapped(whole, names)(given)
    assert torch.equal(scores, whole(given))
    assert all(torch.equal(held, expected[at]) for at, held in zip(names[:-1], found[:-1], strict=True))
    last = next(module for module in whole.modules() if isinstance(module, nn.Linear))
    assert torch.equal(last(found[-1]), scores)


@pytest.mark.parametrize("name", VISION)
def test_taps_of_other_networks_are_their_modules(name: str) -> None:
    whole, given = network(name, 3), images(3)
    names = list(tap_shapes(whole, given))
    expected: dict[str, Tensor] = {}

    def keep(at: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_: nn.Module, __: Any, out: Tensor) -> None:
            expected[at] = out.clone()

        return hook

    for at in names[:-1]:
        module_at(whole, at).register_forward_hook(keep(at))
    scores, found = Tapped(whole, names)(given)
    assert torch.equal(scores, whole(given))
    assert list(expected) == names[:-1]  # from the input to the output, each once
    assert all(torch.equal(held, expected[at]) for at, held in zip(names[:-1], found[:-1], strict=True))
    assert names[-1] == "penultimate"
    last = [module for module in whole.modules() if isinstance(module, nn.Linear)][-1]
    assert torch.equal(last(found[-1]), scores)


def test_what_comes_next_does_not_write_into_a_tap() -> None:
    whole = network("resnet18", 3)
    _, (before, after) = Tapped(whole, ["layer1.0.bn1", "layer1.0.conv2"])(images(3))
    assert (before < 0).any()
    assert torch.equal(after, module_at(whole, "layer1.0.conv2")(before.relu()))


def test_scores_and_what_gives_them_are_no_tap() -> None:
    assert "fc" not in tap_shapes(network("resnet18", 3), images(3))
    names = tap_shapes(network("vgg11_bn", 3), images(3)).keys()
    assert {"classifier", "classifier.6"}.isdisjoint(names)
    assert {"features", "avgpool", "classifier.5"} <= set(names)


def test_modules_of_a_grey_network_are_named_as_those_of_a_coloured_one() -> None:
    grey, coloured = network("resnet18", 1), network("resnet18", 3)
    assert tap_names(grey) == tap_names(coloured)
    scores, (found,) = Tapped(grey, ["layer2"])(images())
    coloured.load_state_dict({key.removeprefix("network."): held for key, held in grey.state_dict().items()})
    assert torch.equal(found, Tapped(coloured, ["layer2"])(images().expand(-1, 3, -1, -1))[1][0])
    assert torch.equal(scores, grey(images()))


@pytest.mark.parametrize(("name", "taken"), [("vgg6", "layer3"), ("resnet8", "penultimate"), ("resnet18", "layer2")])
def test_gradients_flow_to_the_network_in_training(name: str, taken: str) -> None:
    plain, whole = network(name, 3).train(), network(name, 3).train()
    tapped, given = Tapped(whole, [taken]).train(), images(3)
    scores, (found,) = tapped(given)
    (scores.square().mean() + found.square().mean()).backward()
    assert [id(p) for p in tapped.parameters()] == [id(p) for p in whole.parameters()]
    seen: list[Tensor] = []
    if taken == "penultimate":
        last = [module for module in plain.modules() if isinstance(module, nn.Linear)][-1]
        last.register_forward_pre_hook(lambda _, fed: seen.append(fed[0]))
    elif name == "vgg6":
        norms = [module for module in plain.modules() if isinstance(module, nn.BatchNorm2d)]
        norms[2].register_forward_hook(lambda _, __, out: seen.append(out.clone()))
    else:
        module_at(plain, taken).register_forward_hook(lambda _, __, out: seen.append(out.clone()))
    (plain(given).square().mean() + seen[0].square().mean()).backward()
    for one, other in zip(whole.parameters(), plain.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)
    for one, other in zip(whole.buffers(), plain.buffers(), strict=True):
        assert torch.equal(one, other)  # the statistics of a training batch are taken in once


@pytest.mark.parametrize("name", ["vgg6", "resnet18"])
def test_a_copy_and_mode_follow_the_network(name: str) -> None:
    tapped = Tapped(network(name, 3), ["penultimate"])
    assert set(tapped.state_dict()) == {f"network.{key}" for key in tapped.network.state_dict()}
    tapped.train()
    assert all(module.training for module in tapped.network.modules())
    other = copy.deepcopy(tapped.eval())
    with torch.no_grad():
        for parameter in tapped.parameters():
            parameter.zero_()
    scores, (found,) = other(images(3))
    assert torch.equal(scores, other.network(images(3)))
    assert found.abs().max() > 0
    assert not tapped(images(3))[1][0].abs().max() > 0


def test_no_images_give_no_features() -> None:
    scores, found = Tapped(network("cnn3"), ["layer2", "penultimate"])(torch.empty(0, 1, 32, 32))
    assert scores.shape == (0, 5)
    assert [tuple(held.shape) for held in found] == [(0, 64, 16, 16), (0, 128)]


def test_an_unknown_tap_is_refused_with_those_there_are() -> None:
    with pytest.raises(StudentError, match="has no tap 'layer9'; it has: layer1, layer2, layer3, penultimate"):
        Tapped(network("cnn3"), ["layer1", "layer9"])
    with pytest.raises(StudentError, match="no tap 'scores'"):
        Tapped(network("cnn3"), ["scores"])


def test_a_module_that_gives_no_features_is_told() -> None:
    whole = network("resnet18", 3)
    assert "layer1.0.relu" not in tap_shapes(whole, images(3))
    with pytest.raises(StudentError, match=r"'layer1\.0\.relu' gives no features of a sample: its module runs 2 times"):
        Tapped(whole, ["layer1.0.relu"])(images(3))


def test_a_network_without_a_linear_layer_has_no_penultimate_tap() -> None:
    whole = network("squeezenet1_1", 3)
    assert "penultimate" not in tap_names(whole)
    _, (found,) = Tapped(whole, ["features"])(images(3))
    assert found.shape[:2] == (3, 512)


class HeadFirst(nn.Module):
    """Registers its head before its body, whose own last layer has as many outputs as there are scores."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 5)
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8))

    def forward(self, given: Tensor) -> Tensor:
        return self.head(input=self.body(given))  # type: ignore[no-any-return]


class Product(nn.Module):
    """A head that is no layer of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 5, generator=torch.Generator().manual_seed(0)))

    def forward(self, given: Tensor) -> Tensor:
        return given @ self.weight


def made(*after: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), *after)


CONVOLVED = (nn.Dropout(), nn.Conv2d(8, 5, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
"""How squeezenet makes its scores."""
HEADS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "registered before the body": (HeadFirst, ["body.0", "body.1", "body.2", "body.3", "body", "penultimate"]),
    "normalised": (lambda: made(nn.Linear(8, 5), nn.LogSoftmax(1)), ["0", "1", "2", "penultimate"]),
    "as wide as a layer before": (
        lambda: made(nn.Linear(8, 5), nn.Sigmoid(), nn.Linear(5, 5)),
        ["0", "1", "2", "3", "4", "penultimate"],
    ),
    "of a convolution": (
        lambda: nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Sequential(*CONVOLVED), nn.Flatten()),
        ["0", "1", "2.0"],
    ),
    "of another kind": (lambda: made(Product()), ["0", "1", "2"]),
    "of another kind, normalised": (lambda: made(Product(), nn.LogSoftmax(1)), ["0", "1", "2"]),
    "of another kind, as probabilities": (lambda: made(Product(), nn.Softmax(1)), ["0", "1", "2"]),
    "of one class": (lambda: made(nn.Linear(8, 1)), ["0", "1", "2", "penultimate"]),
}


@pytest.mark.parametrize("head", HEADS)
def test_scores_are_no_tap_however_they_are_made(head: str) -> None:
    build_one, names = HEADS[head]
    whole, given = build_one().eval(), images()
    assert list(tap_shapes(whole, given)) == names
    scores, found = Tapped(whole, names)(given)
    assert torch.equal(scores, whole(given))
    if names[-1] == "penultimate":
        last = [module for module in whole.modules() if isinstance(module, nn.Linear)]
        head_layer = whole.head if isinstance(whole, HeadFirst) else last[-1]
        assert isinstance(head_layer, nn.Linear)
        assert torch.allclose(head_layer(found[-1]).log_softmax(1), scores.log_softmax(1), atol=1e-6)
        assert list(tap_shapes(whole, given).values())[-1] == (head_layer.in_features,)


def test_a_vision_network_of_convolutions_alone_tells_no_scores() -> None:
    whole = network("squeezenet1_1", 3)
    names = list(tap_shapes(whole, images(3)))
    assert names[-1] == "classifier.0"
    assert {"classifier", "classifier.1", "classifier.2", "classifier.3"}.isdisjoint(names)
