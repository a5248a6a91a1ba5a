"""Where layer-wise amalgamation looks into a network: its taps.

Lives here: cutting one of our architectures into units that end at a tap, the features there, and whether networks
have one layout. Does not live here: what features are joined to, and training (server/student).

A tap is a layer's output *before* its activation (Shen et al., AAAI 2019; methods.md 1.2), and after batch
normalisation, which is part of the layer: in evaluation it is an affine map of each channel. A tap must take a 1x1
convolution of its channels that afterwards goes into the weights before it (methods.md 1.3). Hence
* a convolution and its batch normalisation are one unit;
* a residual block is one unit whose tap is the sum of body and shortcut, for A(body + shortcut) = A body + A shortcut
  needs A in both at once, and inside the body nothing would be adapted to the shortcut;
* a depthwise convolution and the 1x1 convolution after it are one unit: a depthwise one mixes no channels, so it
  cannot hold A;
* the classifier is the last unit; its tap is the scores.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from consilience.common.errors import StudentError
from consilience.common.nets.architectures import Residual

SCORES = "scores"
"""Name of the last tap."""


@dataclass(frozen=True)
class Tap:
    """One tap: its name, what leads from the tap before to it (widths left out), and its channels."""

    name: str
    unit: str
    channels: int


class Unit(nn.Module):
    """What leads from one tap to the next: first what has no weights (ReLU, pooling), then the layers that learn.

    Shares its weights with the network that it was cut from: who trains a unit trains that part of the network. Input
    (n, C, H, W) is the tap before, or the images; it is left as it is.
    """

    def __init__(self, tap: Tap, between: Sequence[nn.Module], learned: Sequence[nn.Module]) -> None:
        super().__init__()
        self.tap, self.between, self.learned = tap, nn.Sequential(*between), nn.Sequential(*learned)

    def forward(self, features: Tensor) -> Tensor:
        """Map the tap before to this one, (n, channels, H', W'), or (n, classes) for the scores."""
        features = self.between(features)
        for module in self.learned:
            features = module.joined(features) if isinstance(module, Residual) else module(features)
        return features


def units(network: nn.Module) -> list[Unit]:
    """Cut `network`, one of ours (`architectures.build`), into its units, in order; run in turn, they are it.

    Raises `StudentError` for any other network.
    """
    found: list[Unit] = []
    between: list[nn.Module] = []
    learned: list[nn.Module] = []
    ours = isinstance(network, nn.Sequential) and all(isinstance(module, _PARTS) for module in network.modules())
    for module in network if isinstance(network, nn.Sequential) and ours else []:
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d | Residual):
            learned.append(module)
        elif learned:  # only the activation inside a depthwise separable unit
            learned.append(_fresh(module))
        else:
            between.append(_fresh(module))
        if _ends(module, learned):
            name = SCORES if isinstance(module, nn.Linear) else f"layer{len(found) + 1}"
            unit = " ".join(_written(part) for part in (*between, *learned))
            found.append(Unit(Tap(name, unit, _channels(module)), between, learned))
            between, learned = [nn.ReLU()] if isinstance(module, Residual) else [], []
    # a classifier that needs more than its linear layer has layers before it that are none of ours
    if not found or between or learned or found[-1].tap.name != SCORES or len(found[-1].learned) != 1:
        raise StudentError(
            f"A network {type(network).__name__} is not laid out as one of our architectures, so it has no taps that "
            "layer-wise amalgamation could use",
            hint=_NEXT,
        )
    return found


def taps(network: nn.Module) -> tuple[Tap, ...]:
    """Return the taps of `network`, one of ours, in order. Raises `StudentError` for any other."""
    return tuple(unit.tap for unit in units(network))


def features(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Return every tap's features for normalised `images` (n, C, H, W), by name; the last are the scores (n, K).

    In the mode that the network is in: what is amalgamated is meant to be taken in evaluation. Raises `StudentError`
    for a network that is none of ours.
    """
    found: dict[str, Tensor] = {}
    for unit in units(network):
        images = unit(images)
        found[unit.tap.name] = images
    return found


def one_layout(networks: Mapping[str, Sequence[Tap]]) -> None:
    """Check that networks, by owner, correspond layer by layer: the same units in the same order, of any width.

    Raises `StudentError` that names two owners that differ and where.
    """
    for first, other in itertools.pairwise(networks):
        pairs = zip(networks[first], networks[other], strict=False)
        differing = next((pair for pair in pairs if pair[0].unit != pair[1].unit), None)
        if differing is not None:
            where = f"at {differing[0].name}: {differing[0].unit} and {differing[1].unit}"
        elif len(networks[first]) != len(networks[other]):
            where = f"in depth: {len(networks[first])} and {len(networks[other])} layers"
        else:
            continue
        raise StudentError(f"The networks of {first} and {other} differ in layout {where}", hint=_NEXT)


_NEXT = (
    "Layer-wise amalgamation needs teachers of one architecture of ours; for others use common-feature learning, which "
    "takes any"
)


_PARTS = (
    nn.Sequential,
    nn.Conv2d,
    nn.BatchNorm2d,
    nn.Linear,
    nn.ReLU,
    nn.MaxPool2d,
    nn.AdaptiveAvgPool2d,
    nn.Flatten,
    nn.Identity,
    Residual,
)
"""What our architectures are made of. Not of group normalisation, which private training puts in: it mixes channels, so
that it is no affine map of each."""


def _ends(module: nn.Module, learned: Sequence[nn.Module]) -> bool:
    """Whether a unit is complete with `module`, the last of `learned`."""
    if isinstance(module, nn.BatchNorm2d):
        before = learned[-2] if len(learned) > 1 else None
        return isinstance(before, nn.Conv2d) and before.groups == 1
    return isinstance(module, nn.Linear | Residual)


def _fresh(module: nn.Module) -> nn.Module:
    """Return a module without weights for a unit's own use: a ReLU in place would overwrite the tap before."""
    return nn.ReLU() if isinstance(module, nn.ReLU) else module


def _channels(module: nn.Module) -> int:
    if isinstance(module, Residual):
        return _channels(module.body[-1])
    assert isinstance(module, nn.BatchNorm2d | nn.Linear)
    return module.num_features if isinstance(module, nn.BatchNorm2d) else module.out_features


def _written(module: nn.Module) -> str:
    """Return what a module does, without its widths. How a shortcut is made does not matter: its sum is tapped."""
    if isinstance(module, nn.Conv2d):
        height, width = module.kernel_size
        depthwise = " depthwise" if module.groups > 1 else ""
        return f"conv{height}x{width}{depthwise}/{module.stride[0]}"
    if isinstance(module, Residual):
        return f"residual({' '.join(_written(part) for part in module.body)})"
    if isinstance(module, nn.MaxPool2d):
        return f"maxpool{module.kernel_size}"
    return {nn.BatchNorm2d: "norm", nn.ReLU: "relu", nn.AdaptiveAvgPool2d: "mean", nn.Flatten: "flatten"}.get(
        type(module), type(module).__name__.lower()
    )
