"""Putting an affine map of channels into the layers before it, exactly (Shen et al., AAAI 2019; methods.md 1.3).

Lives here: folding A x + a into a convolution, a linear layer or a residual block, with batch normalisation or
without, and giving batch normalisation exact statistics, with or without another function. Does not live here: where
the map comes from (layer_wise).

    W' = A W,   b' = A b + a        A mixes output channels, so stride, padding and dilation do not matter

Batch normalisation stands between the convolution and the map. In evaluation it is itself a map s x + t of each
channel, s = gamma / sqrt(variance + eps), t = beta - s mean; then W' = A diag(s) W, b' = A (s b + t) + a. The layers
stay what they were, so that the network can still be loaded by its name: the weight goes to the convolution, the bias
to the batch normalisation, which is left with mean 0 and variance 1. In training it would normalise by a batch's own
statistics and undo that: `settle` gives it those of data first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from consilience.common.errors import StudentError
from consilience.common.moments import Features
from consilience.common.nets.architectures import Residual
from consilience.common.nets.taps import Unit
from consilience.server.student.autoencoder import Affine

_Weighted = nn.Conv2d | nn.Linear
_Norm = nn.BatchNorm1d | nn.BatchNorm2d


def fold(adapter: Affine, layers: nn.Sequential | Unit) -> None:
    """Change the last of `layers` so that they give A y + a where they gave y; `adapter` is square, as wide as y.

    `layers` end with a linear layer, a convolution, either of them and its batch normalisation, or a `Residual`; all
    in evaluation. In a residual block A goes into body and shortcut, for A (body + shortcut) + a = (A body + a) +
    A shortcut; an identity shortcut becomes the 1x1 convolution A, as in the layout NAME@1. Sums are in fp64. Raises
    `StudentError` for a grouped convolution, which mixes no channels across groups, for batch normalisation that keeps
    no statistics or is in training mode, and for other layers.
    """
    if isinstance(layers, Unit):
        layers = layers.learned
    last = layers[-1] if len(layers) else None
    if isinstance(last, Residual):
        _fold_residual(adapter, last)
        return
    norm = last if isinstance(last, _Norm) else None
    weighted = last if norm is None else layers[-2] if len(layers) > 1 else None
    if not isinstance(weighted, _Weighted):
        names = " ".join(type(layer).__name__ for layer in layers) or "no layer"
        raise StudentError(
            f"A map of channels cannot be folded into layers that end with {names}; allowed at the end: Linear or "
            "Conv2d, with batch normalisation or without, or Residual",
            hint="Fold into the layers that come right before the map",
        )
    _fold(adapter, weighted, norm)


@torch.no_grad()
def count(network: nn.Module, inputs: Iterable[Features]) -> None:
    """Give each `BatchNorm2d` of `network` the mean and variance of what it was given over `inputs`, read once.

    Training leaves moving averages over steps in which weights moved; of few steps these are far from any of them. The
    network computes in training mode, each block normalised by its own statistics, as it was trained, and is left in
    evaluation mode. `inputs` are blocks (b, C, H, W) floating, as the network takes them; none is read where nothing is
    normalised. Where there are no samples, statistics stay.
    """
    with _counted(network) as found:
        if found:
            network.train()
            _through(network, inputs)
    network.eval()
    for norm, each in found:
        samples, mean, variance = each.found()
        if samples:
            _write(norm, mean, variance)


@torch.no_grad()
def settle(network: nn.Module, images: Iterable[Features]) -> None:
    """Give each `BatchNorm2d` of `network` the statistics of its inputs over `images`; in evaluation nothing changes.

    gamma and beta are changed with mean and variance so that s and t stay: what training's first batches then compute
    is near to what evaluation does, and a folded network goes on from where it is. `images` are blocks (b, C, H, W)
    floating, normalised, read once. The network is left in evaluation mode. Raises `StudentError` when there are no
    images, and for batch normalisation without gamma and beta.
    """
    network.eval()
    with _counted(network) as found:
        _through(network, images)
    for norm, each in found:
        samples, mean, variance = each.found()
        if not samples or not norm.affine:
            raise StudentError(
                "Batch normalisation cannot be given other statistics: "
                + ("it has no weight and bias" if samples else "there are no images"),
                hint="Use one of our architectures" if samples else "Give at least one image",
            )
        scale, shift = _as_map(norm)
        gamma = scale * np.sqrt(variance + norm.eps)
        _write(norm, mean, variance, gamma, shift + scale * mean)


@contextmanager
def _counted(network: nn.Module) -> Iterator[list[tuple[nn.BatchNorm2d, _Sums]]]:
    """Yield each `BatchNorm2d` of `network` with the sums of all that it is given meanwhile."""
    found = [(norm, _Sums(norm.num_features)) for norm in network.modules() if isinstance(norm, nn.BatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(each.hook) for norm, each in found]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _through(network: nn.Module, inputs: Iterable[Features]) -> None:
    parameter = next(network.parameters())
    for block in inputs:
        if len(block):
            network(torch.tensor(block).to(parameter))


class _Sums:
    """Count, mean and variance of each channel, block by block, in fp64."""

    def __init__(self, channels: int) -> None:
        self._count, self._mean, self._squares = 0, np.zeros(channels), np.zeros(channels)

    def hook(self, _: nn.Module, given: tuple[Tensor, ...]) -> None:
        """Take in what a module is given, (b, C, H, W)."""
        rows = given[0].double().transpose(0, 1).flatten(1)
        count, mean = rows.shape[1], rows.mean(dim=1).cpu().numpy()
        squares = rows.var(dim=1, correction=0).cpu().numpy() * count
        total = self._count + count
        apart = mean - self._mean
        self._squares += squares + apart**2 * (self._count / total * count)
        self._mean += apart * (count / total)
        self._count = total

    def found(self) -> tuple[int, NDArray[np.float64], NDArray[np.float64]]:
        """Return count, mean and variance."""
        return self._count, self._mean, self._squares / max(self._count, 1)


def _fold_residual(adapter: Affine, block: Residual) -> None:
    fold(adapter, block.body)
    linear = Affine(adapter.weight, np.zeros_like(adapter.bias))  # a goes in once
    if isinstance(block.shortcut, nn.Identity):
        last = block.body[-1]
        assert isinstance(last, nn.BatchNorm2d)
        channels = last.num_features
        convolution, norm = nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels, eps=last.eps)
        nn.init.dirac_(convolution.weight)
        block.shortcut = nn.Sequential(convolution, norm).to(last.weight).eval()
        ones = np.ones(channels)
        _write(norm, 0 * ones, ones - norm.eps, ones, 0 * ones)
    fold(linear, block.shortcut)


@torch.no_grad()
def _fold(adapter: Affine, weighted: _Weighted, norm: _Norm | None) -> None:
    groups = weighted.groups if isinstance(weighted, nn.Conv2d) else 1
    outputs = len(weighted.weight)
    if groups > 1 or adapter.weight.shape != (outputs, outputs):
        raise StudentError(
            f"A map of channels with weight {adapter.weight.shape} cannot be folded into {type(weighted).__name__} of "
            f"{outputs} outputs in {groups} groups; allowed: ({outputs}, {outputs}) and one group",
            hint="Fold into the layer that the map follows, and where that is grouped, into the 1x1 one after it",
        )
    held = weighted.weight.double().cpu().numpy()
    bias = np.zeros(outputs) if weighted.bias is None else _array(weighted.bias)
    scale, shift = (np.ones(outputs), np.zeros(outputs)) if norm is None else _as_map(norm)
    mixed = (adapter.weight * scale) @ held.reshape(outputs, -1)
    weighted.weight.copy_(torch.from_numpy(mixed.reshape(held.shape)))
    bias = adapter.weight @ (scale * bias + shift) + adapter.bias
    if norm is not None:
        if weighted.bias is not None:
            weighted.bias.zero_()
        # variance + eps is 1, so that the normalisation only adds the bias
        mean, beta = (np.zeros(outputs), bias) if norm.affine else (-bias, bias)
        _write(norm, mean, np.full(outputs, 1 - norm.eps), np.ones(outputs), beta)
    elif weighted.bias is not None:
        weighted.bias.copy_(torch.from_numpy(bias))
    else:
        weighted.bias = nn.Parameter(torch.from_numpy(bias).to(weighted.weight))


def _as_map(norm: _Norm) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return s and t (C,) of what batch normalisation does in evaluation."""
    if norm.training or norm.running_mean is None or norm.running_var is None:
        raise StudentError(
            "Batch normalisation "
            + ("is in training mode" if norm.training else "keeps no statistics")
            + ", so it is no fixed map of channels",
            hint="Call eval() on the network before" if norm.training else "Use track_running_stats=True",
        )
    scale = 1 / np.sqrt(_array(norm.running_var) + norm.eps)
    if norm.affine:
        scale *= _array(norm.weight)
    return scale, (_array(norm.bias) if norm.affine else 0.0) - scale * _array(norm.running_mean)


@torch.no_grad()
def _write(norm: _Norm, *parts: NDArray[np.float64]) -> None:
    """Put mean and variance (C,) into `norm`, and where they are given and it has them, gamma and beta."""
    for tensor, part in zip((norm.running_mean, norm.running_var, norm.weight, norm.bias), parts, strict=False):
        if tensor is not None:
            tensor.copy_(torch.from_numpy(part))


def _array(tensor: Tensor) -> NDArray[np.float64]:
    return tensor.detach().double().cpu().numpy()
