"""The networks that are known by name.

Lives here: small convolutional classifiers for images of 16 pixels and more, their registry, and `build`. Does not
live here: torchvision's models (vision), those that a user wrote (own_networks) and weights (inference).

Each of ours maps (n, C, H, W) float32 to (n, classes) logits, normalises by batch and averages over all positions,
so that the number of parameters does not depend on H and W.

`NAME@TIMES`, such as `vgg6@1.25`, is one of ours in the form that a student of layer-wise amalgamation needs: every
width TIMES that of NAME, rounded, and every shortcut of a residual network a 1x1 convolution. Such a shortcut can hold
any linear map of its channels, an identity cannot; the layout is NAME's, so that its taps (see taps) are NAME's.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from consilience.common.errors import MissingExtraError, SettingsError
from consilience.common.nets.own_networks import PYTHON, build_own
from consilience.common.nets.seeding import seeded
from consilience.common.seeds import derive

TORCHVISION = "torchvision:"
"""Prefix that says a name is torchvision's; without it ours are looked up first."""
TIMES = (0.1, 16.0)
"""How much narrower or wider than itself an architecture of ours can be built."""


def build(name: str, *, classes: int, channels: int, seed: int) -> nn.Module:
    """Return the network `name` with `classes` outputs for images of `channels` (1 or 3), freshly initialised.

    The weights depend on the arguments alone; the global random generator is left as it was. Building is serial:
    threads take turns. Raises `SettingsError` for an unknown name and as `build_own`, and `MissingExtraError` when
    torchvision is needed and not installed.
    """
    with seeded(derive(seed, "initial weights")):
        if name.startswith(PYTHON):
            return build_own(name, classes, channels)
        bare, at, times = name.partition("@")
        if bare in ARCHITECTURES:
            network = ARCHITECTURES[bare](classes, channels, _times(name, times) if at else None)
            _initialise(network)
            return network
        network = _torchvision(name, classes)
        return GreyToColour(network) if channels == 1 else network


def _times(name: str, times: str) -> float:
    """Return the number that stands after @. Raises `SettingsError` unless it is one and in `TIMES`."""
    least, most = TIMES
    if not re.fullmatch(r"[0-9]{1,3}(\.[0-9]{1,6})?", times) or not least <= float(times) <= most:
        raise SettingsError(
            f"Architecture {name!r} asks for {times!r} times the width; allowed: a number from {least:g} to {most:g}",
            hint="Correct the field architecture, for example vgg6@1.25",
        )
    return float(times)


def _wide(width: int, times: float | None) -> int:
    return width if times is None else max(1, round(width * times))


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
            f"Architecture {name!r} is unknown; allowed: {', '.join(ARCHITECTURES)}, "
            f"{PYTHON}package.module:function, and torchvision's classifiers: {', '.join(known)}",
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


def _plain(classes: int, channels: int, times: float | None, *, widths: tuple[int, ...], depth: int) -> nn.Module:
    """Stages of `depth` 3x3 convolutions each, with halving between stages."""
    layers: list[nn.Module] = []
    inputs = channels
    for stage, width in enumerate(_wide(width, times) for width in widths):
        if stage:
            layers.append(nn.MaxPool2d(2))
        for _ in range(depth):
            layers += [*_convolution(inputs, width), nn.ReLU(inplace=True)]
            inputs = width
    return nn.Sequential(*layers, *_classifier(inputs, classes))


class Residual(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al., CVPR 2016), and ReLU after their sum.

    The shortcut is a 1x1 convolution where the shape changes, or where it is to be `projected` all the same.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, *, projected: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_convolution(inputs, outputs, stride=stride), nn.ReLU(inplace=True), *_convolution(outputs, outputs)
        )
        same = inputs == outputs and stride == 1 and not projected
        self.shortcut = nn.Identity() if same else nn.Sequential(*_convolution(inputs, outputs, 1, stride))

    def forward(self, features: Tensor) -> Tensor:
        """Map (n, inputs, H, W) to (n, outputs, H / stride, W / stride)."""
        return F.relu(self.joined(features), inplace=True)

    def joined(self, features: Tensor) -> Tensor:
        """Return the sum of body and shortcut, which `forward` applies ReLU to."""
        total: Tensor = self.body(features) + self.shortcut(features)
        return total


def _residual(classes: int, channels: int, times: float | None, *, blocks: int) -> nn.Module:
    """Three stages of 16, 32 and 64 channels with `blocks` residual blocks each: 6 * blocks + 2 layers."""
    inputs = _wide(16, times)
    layers: list[nn.Module] = [*_convolution(channels, inputs), nn.ReLU(inplace=True)]
    for stage, width in enumerate(_wide(width, times) for width in (16, 32, 64)):
        for block in range(blocks):
            stride = 2 if stage and block == 0 else 1
            layers.append(Residual(inputs, width, stride, projected=times is not None))
            inputs = width
    return nn.Sequential(*layers, *_classifier(inputs, classes))


def _mobilenet(classes: int, channels: int, times: float | None) -> nn.Module:
    """Depthwise separable convolutions (Howard et al., 2017): few parameters, but slow for their size on a CPU."""
    inputs = _wide(32, times)
    layers: list[nn.Module] = [*_convolution(channels, inputs), nn.ReLU(inplace=True)]
    for width, stride in ((64, 1), (128, 2), (128, 1), (128, 1), (256, 2)):
        layers += [*_convolution(inputs, inputs, stride=stride, groups=inputs), nn.ReLU(inplace=True)]
        layers += [*_convolution(inputs, _wide(width, times), 1), nn.ReLU(inplace=True)]
        inputs = _wide(width, times)
    return nn.Sequential(*layers, *_classifier(inputs, classes))


def _initialise(network: nn.Module) -> None:
    """Draw convolutions as He et al. (ICCV 2015) do for ReLU; the rest as torch does."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


ARCHITECTURES: dict[str, Callable[[int, int, float | None], nn.Module]] = {
    "cnn3": functools.partial(_plain, widths=(32, 64, 128), depth=1),
    "resnet8": functools.partial(_residual, blocks=1),
    "resnet20": functools.partial(_residual, blocks=3),
    "vgg6": functools.partial(_plain, widths=(32, 64, 128), depth=2),
    "mobilenet-small": _mobilenet,
}
"""Ours by name: functions of (classes, channels, times); `times` as after @, None where there is no @."""
