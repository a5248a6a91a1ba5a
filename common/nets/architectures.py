"""The networks that are known by name.

Lives here: small convolutional classifiers for images of 16 pixels and more, their registry, and `build`. Does not
live here: torchvision's models (vision) and weights (inference).

Each of ours maps (n, C, H, W) float32 to (n, classes) logits, normalises by batch and averages over all positions,
so that the number of parameters does not depend on H and W.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from consilience.common.errors import MissingExtraError, SettingsError
from consilience.common.nets.seeding import derive, seeded

TORCHVISION = "torchvision:"
"""Prefix that says a name is torchvision's; without it ours are looked up first."""


def build(name: str, *, classes: int, channels: int, seed: int) -> nn.Module:
    """Return the network `name` with `classes` outputs for images of `channels` (1 or 3), freshly initialised.

    The weights depend on the arguments alone; the global random generator is left as it was. Building is serial:
    threads take turns. Raises `SettingsError` for an unknown name and `MissingExtraError` when torchvision is needed
    and not installed.
    """
    with seeded(derive(seed, "initial weights")):
        if name in ARCHITECTURES:
            network = ARCHITECTURES[name](classes, channels)
            _initialise(network)
            return network
        network = _torchvision(name, classes)
        return GreyToColour(network) if channels == 1 else network


def _torchvision(name: str, classes: int) -> nn.Module:
    try:
        vision = importlib.import_module("consilience.common.nets.vision")
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"Architecture {name!r} is none of ours ({', '.join(ARCHITECTURES)}), and torchvision's need the module "
            f"{error.name}",
            hint="pip install 'consilience[vision]'",
        ) from error
    bare = name.removeprefix(TORCHVISION)
    known: list[str] = vision.model_names()
    if bare not in known:
        raise SettingsError(
            f"Architecture {name!r} is unknown; allowed: {', '.join(ARCHITECTURES)}, and torchvision's classifiers: "
            f"{', '.join(known)}",
            hint="Correct the field architecture",
        )
    network: nn.Module = vision.build_model(bare, classes)
    return network


class GreyToColour(nn.Module):
    """A network for three channels that is fed one: the grey channel is given three times."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Map (n, 1, H, W) to the network's logits."""
        logits: Tensor = self.network(images.expand(-1, 3, -1, -1))
        return logits


def _convolution(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution without bias and the batch normalisation that has one."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(outputs)]


def _classifier(width: int, classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)]


def _plain(classes: int, channels: int, *, widths: tuple[int, ...], depth: int) -> nn.Module:
    """Stages of `depth` 3x3 convolutions each, with halving between stages."""
    layers: list[nn.Module] = []
    inputs = channels
    for stage, width in enumerate(widths):
        if stage:
            layers.append(nn.MaxPool2d(2))
        for _ in range(depth):
            layers += [*_convolution(inputs, width), nn.ReLU(inplace=True)]
            inputs = width
    return nn.Sequential(*layers, *_classifier(inputs, classes))


class _Residual(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al., CVPR 2016); a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_convolution(inputs, outputs, stride=stride), nn.ReLU(inplace=True), *_convolution(outputs, outputs)
        )
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(*_convolution(inputs, outputs, 1, stride))

    def forward(self, features: Tensor) -> Tensor:
        """Map (n, inputs, H, W) to (n, outputs, H / stride, W / stride)."""
        return F.relu(self.body(features) + self.shortcut(features), inplace=True)


def _residual(classes: int, channels: int, *, blocks: int) -> nn.Module:
    """Three stages of 16, 32 and 64 channels with `blocks` residual blocks each: 6 * blocks + 2 layers."""
    layers: list[nn.Module] = [*_convolution(channels, 16), nn.ReLU(inplace=True)]
    inputs = 16
    for width in (16, 32, 64):
        for block in range(blocks):
            layers.append(_Residual(inputs, width, stride=2 if block == 0 and width > 16 else 1))
            inputs = width
    return nn.Sequential(*layers, *_classifier(inputs, classes))


def _mobilenet(classes: int, channels: int) -> nn.Module:
    """Depthwise separable convolutions (Howard et al., 2017): few parameters, but slow for their size on a CPU."""
    layers: list[nn.Module] = [*_convolution(channels, 32), nn.ReLU(inplace=True)]
    inputs = 32
    for width, stride in ((64, 1), (128, 2), (128, 1), (128, 1), (256, 2)):
        layers += [*_convolution(inputs, inputs, stride=stride, groups=inputs), nn.ReLU(inplace=True)]
        layers += [*_convolution(inputs, width, 1), nn.ReLU(inplace=True)]
        inputs = width
    return nn.Sequential(*layers, *_classifier(inputs, classes))


def _initialise(network: nn.Module) -> None:
    """Draw convolutions as He et al. (ICCV 2015) do for ReLU; the rest as torch does."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


ARCHITECTURES: dict[str, Callable[[int, int], nn.Module]] = {
    "cnn3": lambda classes, channels: _plain(classes, channels, widths=(32, 64, 128), depth=1),
    "resnet8": lambda classes, channels: _residual(classes, channels, blocks=1),
    "resnet20": lambda classes, channels: _residual(classes, channels, blocks=3),
    "vgg6": lambda classes, channels: _plain(classes, channels, widths=(32, 64, 128), depth=2),
    "mobilenet-small": _mobilenet,
}
"""Ours by name: functions of (classes, channels)."""
