"""A network that gives the features of its taps beside its scores.

Lives here: taps by name, of any network, in one forward pass. Does not live here: how one of our architectures is cut
at its taps (taps), and what is done with features (client/features, server/student).

The names are, from the input to the output,
* of one of our architectures `layer1`, `layer2` and so on, as `taps.taps` names them: before the activation;
* of any other network the names of its modules, as `named_modules` gives them: what each module returns. The modules of
  a network that is fed one channel for three are named as without that. The last linear layer and what it lies in give
  the scores, which are no tap;
* `penultimate`: what the last linear layer is fed, (n, d).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from consilience.common.errors import StudentError
from consilience.common.nets.architectures import GreyToColour
from consilience.common.nets.taps import SCORES, Tap, Unit, units

PENULTIMATE = "penultimate"
"""Name of the tap that the scores are made of."""


class Tapped(nn.Module):
    """`network`, which gives the features of the taps `names` too. Its parameters and its mode are the network's.

    Not for two threads at once.
    """

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        """Look `names` up, in any order. Raises `StudentError` for a name that is no tap of the network."""
        super().__init__()
        self.network, self.names = network, tuple(names)
        known = tap_names(network)
        for name in self.names:
            if name not in known:
                raise StudentError(
                    f"A network {type(_inside(network)).__name__} has no tap {name!r}; it has: {', '.join(known)}",
                    hint="Name one of these taps",
                )
        self._units = tuple(_units(network))  # a tuple, so that the weights stay the network's alone

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the scores (n, classes) of normalised `images` (n, C, H, W), and the taps' features in turn.

        Features are (n, C) or (n, C, H, W). Raises `StudentError` for a module that does not give one such tensor once.
        """
        scores, found = self._by_units(images) if self._units else self._by_hooks(images)
        return scores, tuple(_one(found.get(name, []), name, len(images)) for name in self.names)

    def _by_units(self, images: Tensor) -> tuple[Tensor, dict[str, list[Any]]]:
        found: dict[str, list[Any]] = {}
        for unit in self._units[:-1]:
            images = unit(images)
            found[unit.tap.name] = [images]
        fed = self._units[-1].between(images)
        found[PENULTIMATE] = [fed]
        return self._units[-1].learned(fed), found

    def _by_hooks(self, images: Tensor) -> tuple[Tensor, dict[str, list[Any]]]:
        found: dict[str, list[Any]] = {name: [] for name in self.names}
        modules, last = dict(_inside(self.network).named_modules()), _last_linear(self.network)
        hooks = []
        try:
            for name, given in found.items():
                if name == PENULTIMATE and last is not None:
                    hooks.append(last.register_forward_pre_hook(_taking_input(given)))
                else:
                    hooks.append(modules[name].register_forward_hook(_taking_output(given)))
            scores: Tensor = self.network(images)
        finally:
            for hook in hooks:
                hook.remove()
        return scores, found


def tap_names(network: nn.Module) -> tuple[str, ...]:
    """Return the names of the network's taps from the input to the output, `penultimate` last where it has that.

    Not every module of a network that is none of ours gives features: `tap_shapes` finds out which do.
    """
    ours = tuple(unit.tap.name for unit in _units(network) if unit.tap.name != SCORES)
    last = _last_linear(network)
    names = ours or tuple(name for name, module in _in_turn(_inside(network)) if last not in set(module.modules()))
    return (*names, PENULTIMATE) if last is not None and PENULTIMATE not in names else names


def tap_shapes(network: nn.Module, images: Tensor) -> dict[str, tuple[int, ...]]:
    """Return the shape of a sample's features, (C,) or (C, H, W), of each tap that gives some for `images`.

    In the order of `tap_names`. Of evaluation mode, in which the network is left; `images` (n, C, H, W), n >= 1.
    """
    tapped = Tapped(network.eval(), tap_names(network))
    with torch.no_grad():
        _, found = tapped._by_units(images) if tapped._units else tapped._by_hooks(images)
    shapes = {}
    for name in tapped.names:
        if not _problem(found.get(name, []), len(images)):
            shapes[name] = tuple(found[name][0].shape[1:])
    return shapes


def tap_layouts(network: nn.Module) -> dict[str, Tap]:
    """Return the taps of one of our architectures by name, the scores left out; empty for any other network."""
    return {unit.tap.name: unit.tap for unit in _units(network) if unit.tap.name != SCORES}


def _units(network: nn.Module) -> list[Unit]:
    """Return the units of one of our architectures; none of any other network."""
    try:
        return units(network)
    except StudentError:
        return []


def _inside(network: nn.Module) -> nn.Module:
    return network.network if isinstance(network, GreyToColour) else network


def _last_linear(network: nn.Module) -> nn.Linear | None:
    found = [module for module in network.modules() if isinstance(module, nn.Linear)]
    return found[-1] if found else None


def _in_turn(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules inside `module` by name, each after those that it is made of."""
    for part, inner in module.named_children():
        full = f"{name}.{part}" if name else part
        yield from _in_turn(inner, full)
        yield full, inner


def _taking_input(into: list[Any]) -> Callable[[nn.Module, Any], None]:
    def hook(_: nn.Module, fed: Any) -> None:
        into.append(fed[0])

    return hook


def _taking_output(into: list[Any]) -> Callable[[nn.Module, Any, Any], None]:
    """A hook that keeps a copy: what comes next may write into the output, as a ReLU in place does."""

    def hook(_: nn.Module, __: Any, out: Any) -> None:
        into.append(out.clone() if isinstance(out, Tensor) else out)

    return hook


def _one(found: list[Any], name: str, samples: int) -> Tensor:
    if problem := _problem(found, samples):
        raise StudentError(f"Tap {name!r} gives no features of a sample: {problem}", hint="Name another tap")
    one: Tensor = found[0]
    return one


def _problem(found: list[Any], samples: int) -> str:
    """Say why what a tap gave in one forward pass is not (samples, C) or (samples, C, H, W) features; else nothing."""
    if len(found) != 1:
        return f"its module runs {len(found)} times for one image"
    if not isinstance(found[0], Tensor) or not found[0].is_floating_point():
        return f"its module gives {type(found[0]).__name__}, not one tensor of floating numbers"
    if found[0].ndim not in (2, 4) or len(found[0]) != samples:
        return f"its module gives {tuple(found[0].shape)} for {samples} images"
    return ""
