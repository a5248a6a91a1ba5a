"""A network that gives the features of its taps beside its scores.

Lives here: taps by name, of any network, in one forward pass. Does not live here: how one of our architectures is cut
at its taps (taps), and what is done with features (client/features, server/student).

The names are, from the input to the output,
* of one of our architectures `layer1`, `layer2` and so on, as `taps.taps` names them: before the activation;
* of any other network the names of its modules, as `named_modules` gives them: what each module returns. The modules of
  a network that is fed one channel for three are named as without that. The layer that gives the scores, what it lies
  in and what runs after it are no taps (`tap_shapes`);
* `penultimate`: what the linear layer that gives the scores is fed, (n, d). It is the last to run of those with as many
  outputs as there are scores: where a module stands in its network says nothing about when it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from consilience.common.errors import StudentError
from consilience.common.nets.architectures import GreyToColour
from consilience.common.nets.taps import SCORES, Tap, Unit, units

_CONVOLUTIONS = nn.Conv1d | nn.Conv2d | nn.Conv3d
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
        scores, found = self._by_units(images) if self._units else self._by_hooks(images, [])
        return scores, tuple(_one(found.get(name, []), name, len(images)) for name in self.names)

    def _by_units(self, images: Tensor) -> tuple[Tensor, dict[str, list[Any]]]:
        found: dict[str, list[Any]] = {}
        for unit in self._units[:-1]:
            images = unit(images)
            found[unit.tap.name] = [images]
        fed = self._units[-1].between(images)
        found[PENULTIMATE] = [fed]
        return self._units[-1].learned(fed), found

    def _by_hooks(self, images: Tensor, done: list[nn.Module]) -> tuple[Tensor, dict[str, list[Any]]]:
        """Run the network. `done` gets the modules that have taps, in the order in which they finish."""
        found: dict[str, list[Any]] = {name: [] for name in self.names}
        modules, fed = dict(_inside(self.network).named_modules()), dict[int, _Fed]()
        hooks = []
        try:
            for name in self.names:
                if name in modules:
                    hooks.append(modules[name].register_forward_hook(_taking_output(found[name], done)))
            for linear in _linears(self.network) if PENULTIMATE in found else ():
                hooks.append(linear.register_forward_pre_hook(_taking_input(fed), with_kwargs=True))
            scores: Tensor = self.network(images)
        finally:
            for hook in hooks:
                hook.remove()
        if PENULTIMATE in found and (classes := _classes(scores)) in fed:
            found[PENULTIMATE] = fed[classes].given
        return scores, found


def tap_names(network: nn.Module) -> tuple[str, ...]:
    """Return the names of what may be the network's taps, as they are registered, `penultimate` last where it has that.

    Not every module of a network that is none of ours gives features, and some give the scores: `tap_shapes` finds out.
    """
    ours = tuple(unit.tap.name for unit in _units(network) if unit.tap.name != SCORES)
    names = ours or tuple(name for name, _ in _in_turn(_inside(network)))
    return (*names, PENULTIMATE) if _linears(network) and PENULTIMATE not in names else names


def tap_shapes(network: nn.Module, images: Tensor) -> dict[str, tuple[int, ...]]:
    """Return the shape of a sample's features, (C,) or (C, H, W), of each tap that gives some for `images`.

    In the order in which they are computed. What runs at or after the layer that gives the scores is left out, and what
    gives the scores by whatever layer. Of evaluation mode, in which the network is left; `images` (n, C, H, W), n >= 1.
    """
    tapped, done = Tapped(network.eval(), tap_names(network)), list[nn.Module]()
    with torch.no_grad():
        scores, found = tapped._by_units(images) if tapped._units else tapped._by_hooks(images, done)
    modules, late = dict(_inside(network).named_modules()), _at_or_after_the_scores(done, _classes(scores))
    shapes = {}
    turn = {id(module): at for at, module in enumerate(done)}
    for name in sorted(tapped.names, key=lambda name: turn.get(id(modules.get(name)), len(done))):
        if modules.get(name) in late or _problem(found.get(name, []), len(images)):
            continue
        one: Tensor = found[name][0]
        if tapped._units or not _same(one, scores):
            shapes[name] = tuple(one.shape[1:])
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


def _linears(network: nn.Module) -> list[nn.Linear]:
    return [module for module in network.modules() if isinstance(module, nn.Linear)]


def _classes(scores: Any) -> int:
    """Return how many scores a sample has; 0 for what is no row of scores a sample."""
    return scores.shape[1] if isinstance(scores, Tensor) and scores.ndim == 2 else 0


def _at_or_after_the_scores(done: Sequence[nn.Module], classes: int) -> set[nn.Module]:
    """Return the modules that finish with or after the layer that gives the scores: of `done`, in their order.

    That layer is the last linear one with so many outputs, or a convolution with as many that no such layer follows.
    """
    weighted = [at for at, module in enumerate(done) if isinstance(module, nn.Linear | _CONVOLUTIONS)]
    fit = [at for at in weighted if _outputs(done[at]) == classes]
    last = [at for at in fit if isinstance(done[at], nn.Linear) or at == weighted[-1]]
    return set(done[last[-1] :]) if last else set()


def _outputs(module: nn.Module) -> object:
    return module.out_features if isinstance(module, nn.Linear) else module.out_channels


def _same(one: Tensor, scores: Any) -> bool:
    """Whether features are the scores, or their mean over positions is: as they are, as probabilities or as logits."""
    if not isinstance(scores, Tensor) or one.shape[:2] != scores.shape[:2]:
        return False
    rows, told = one.flatten(2).mean(dim=2) if one.ndim == 4 else one, scores.flatten(1)
    if rows.shape != told.shape:
        return False
    pairs = [(rows, told)]
    if rows.shape[1] > 1:  # of one class all logits are alike once they are normalised
        pairs += [(rows.log_softmax(1), told.log_softmax(1)), (rows, told.softmax(1)), (rows.softmax(1), told)]
    return any(torch.allclose(one, other, rtol=1e-4, atol=1e-6) for one, other in pairs)


def _in_turn(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules inside `module` by name, each after those that it is made of."""
    for part, inner in module.named_children():
        full = f"{name}.{part}" if name else part
        yield from _in_turn(inner, full)
        yield full, inner


@dataclass
class _Fed:
    """A linear layer, and what it was fed since another with as many outputs ran."""

    layer: nn.Module
    given: list[Any]


def _taking_input(into: dict[int, _Fed]) -> Callable[[nn.Module, Any, Any], None]:
    """A hook that keeps, by the number of outputs, what the last linear layer to run is fed, and no other's."""

    def hook(layer: nn.Module, fed: Any, named: Any) -> None:
        assert isinstance(layer, nn.Linear)
        held = into.get(layer.out_features)
        if held is None or held.layer is not layer:
            held = into[layer.out_features] = _Fed(layer, [])
        held.given.append(fed[0] if fed else named.get("input"))

    return hook


def _taking_output(into: list[Any], done: list[nn.Module]) -> Callable[[nn.Module, Any, Any], None]:
    """A hook that keeps a copy: what comes next may write into the output, as a ReLU in place does."""

    def hook(module: nn.Module, _: Any, out: Any) -> None:
        done.append(module)
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
