"""The linear autoencoder of feature amalgamation (Shen et al., AAAI 2019; methods.md 1.2).

Lives here: affine maps of channels, and the autoencoder of a wanted width, in closed form from moments or by gradient
descent as the paper does it. Does not live here: moments (moments) and how several teachers' features are joined
(amalgamate).

    F_a = E X + e        (w channels from C, w <= C: a 1x1 convolution, or a linear layer)
    X^  = D F_a + d      L = 1/2 |X^ - X|^2, summed over channels, mean over rows

Encoder and decoder are linear with biases, so the optimum is the principal subspace of X, up to an invertible map of
F_a: principal components have the least loss that there is, in one pass over the data.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from consilience.common.errors import StudentError
from consilience.common.moments import Features, Moments, as_rows, check_shape
from consilience.common.nets.seeding import generator

MOMENTUM = 0.9
"""Of every gradient descent in the paper."""


@dataclass(frozen=True)
class Affine:
    """The map x -> weight x + bias of channels: weight (out, in), bias (out,), fp64."""

    weight: NDArray[np.float64]
    bias: NDArray[np.float64]

    @staticmethod
    def identity(channels: int) -> Affine:
        """Return the map of `channels` channels to themselves."""
        return Affine(np.eye(channels), np.zeros(channels))

    def __call__(self, features: Features) -> Features:
        """Map (n, in) or (n, in, H, W) floating to (n, out) or (n, out, H, W) of the same type, fp32 at least.

        Raises `StudentError` for another shape.
        """
        check_shape(features, self.weight.shape[1])
        kind = np.result_type(features.dtype, np.float32)
        flat = features.reshape(len(features), self.weight.shape[1], math.prod(features.shape[2:])).astype(kind)
        mapped: Features = self.weight.astype(kind) @ flat + self.bias.astype(kind)[:, None]
        return np.reshape(mapped, (len(features), len(self.bias), *features.shape[2:]))

    def after(self, first: Affine) -> Affine:
        """Return the map that does `first` and then this one."""
        return Affine(self.weight @ first.weight, self.weight @ first.bias + self.bias)

    def beside(self, other: Affine) -> Affine:
        """Return the map of concatenated channels that does this one to the first and `other` to the rest."""
        weight = np.zeros(np.add(self.weight.shape, other.weight.shape))
        weight[: self.weight.shape[0], : self.weight.shape[1]] = self.weight
        weight[self.weight.shape[0] :, self.weight.shape[1] :] = other.weight
        return Affine(weight, np.concatenate([self.bias, other.bias]))


@dataclass(frozen=True)
class Autoencoder:
    """An encoder C -> w and the decoder w -> C that belongs to it.

    `error` is the mean over rows of |X^ - X|^2, twice the paper's loss, on what it was fitted to; `explained` the
    share of the rows' variance that is kept, in [0, 1]: 1 where there is no variance to keep.
    """

    encoder: Affine
    decoder: Affine
    error: float
    explained: float


def measured(encoder: Affine, decoder: Affine, moments: Moments) -> Autoencoder:
    """Return the autoencoder of these maps with its error on the rows that `moments` are of: no second pass.

    With R = D E - I and r = D e + d: the mean of |R x + r|^2 is trace(R S R^T) + |R mean + r|^2, S the covariance.
    Raises `StudentError` when there were no rows.
    """
    both = decoder.after(encoder)
    residual = moments.through(both.weight - np.eye(len(moments.mean)), both.bias)
    error = max(0.0, float(np.trace(residual.covariance) + residual.mean @ residual.mean))
    total = float(np.trace(moments.covariance))
    return Autoencoder(encoder, decoder, error, min(max(1 - error / total, 0.0), 1.0) if total else 1.0)


def principal(moments: Moments, width: int) -> Autoencoder:
    """Return the best autoencoder of `width` channels for the rows that `moments` are of.

    The encoder is U^T (x - mean) with U (C, width) the leading eigenvectors of the covariance, the decoder its
    transpose; each eigenvector's largest entry is positive, so that the result is one. Its error is the sum of the
    eigenvalues left out. A width beyond the rows' rank is allowed: the channels too many are constant 0 up to rounding.
    Raises `StudentError` for a width outside [1, C] and when there were no rows.
    """
    check_width(width, len(moments.mean))
    values, vectors = np.linalg.eigh(moments.covariance)
    values, vectors = np.maximum(values[::-1], 0.0), vectors[:, ::-1]
    kept = vectors[:, :width]
    kept = kept * np.where(kept[np.abs(kept).argmax(axis=0), np.arange(width)] < 0, -1.0, 1.0)
    total, error = float(values.sum()), float(values[width:].sum())
    return Autoencoder(
        Affine(kept.T.copy(), -(kept.T @ moments.mean)),
        Affine(kept.copy(), moments.mean.copy()),
        error,
        1 - error / total if total else 1.0,
    )


def descended(
    blocks: Iterable[Features],
    channels: int,
    width: int,
    *,
    epochs: int,
    learning_rate: float,
    seed: int,
    device: torch.device | None = None,
) -> Autoencoder:
    """Return the autoencoder that gradient descent finds: the paper's way, kept to compare `principal` with.

    `blocks` are features (n, C) or (n, C, H, W), read once an epoch and again for the error; each block that is not
    empty is one step on the mean over its rows of 1/2 |X^ - X|^2. SGD with momentum 0.9 at a constant rate, from
    weights uniform in +-sqrt(3 / inputs) and biases 0, fp32. The rate must be small beside 1 / the largest variance
    along any direction. Raises `StudentError` for a width outside [1, C], for blocks that can be read only once or
    hold no rows, and when the loss is no longer finite.
    """
    check_width(width, channels)
    check_again(blocks)
    moments = Moments(channels)
    for block in blocks:
        moments.update(block)
    if not moments.count:
        _ = moments.covariance  # says so
    draw = generator(seed, "autoencoder")
    encode, decode = (_uniform(*shape, draw).to(device) for shape in ((width, channels), (channels, width)))
    encode_bias, decode_bias = torch.zeros(width, device=device), torch.zeros(channels, device=device)
    weights = [encode, encode_bias, decode, decode_bias]
    for weight in weights:
        weight.requires_grad_()
    optimizer = torch.optim.SGD(weights, lr=learning_rate, momentum=MOMENTUM)
    for epoch in range(epochs):
        loss = torch.zeros(())
        for rows in _steps(blocks, channels, device):
            code = torch.addmm(encode_bias, rows, encode.T)
            loss = (torch.addmm(decode_bias, code, decode.T) - rows).square().sum(dim=1).mean() / 2
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()
        if not all(bool(weight.isfinite().all()) for weight in (loss, *weights)):
            raise StudentError(
                f"The autoencoder's training failed in epoch {epoch + 1} of {epochs}: the loss is {loss.item():.4g} at "
                f"learning rate {learning_rate:.4g}",
                hint="Set student.layer_wise.autoencoder to principal: the optimum, without a learning rate",
            )
    found = [weight.detach().cpu().numpy().astype(np.float64) for weight in weights]
    return measured(Affine(found[0], found[1]), Affine(found[2], found[3]), moments)


def check_width(width: int, channels: int) -> None:
    """Raise `StudentError` unless 1 <= width <= channels."""
    if not 1 <= width <= channels:
        raise StudentError(
            f"Features of {channels} channels cannot be amalgamated into {width}; allowed: 1 to {channels}",
            hint="Choose a narrower student" if width > channels else "Choose a wider student",
        )


def check_again(blocks: Iterable[object]) -> None:
    """Raise `StudentError` for an iterator: it would be empty in the second epoch."""
    if isinstance(blocks, Iterator):
        raise StudentError(
            f"Blocks come from a {type(blocks).__name__}, which can be read only once, and training reads them once an "
            "epoch",
            hint="Give a sequence, or an object whose __iter__ begins anew",
        )


def _steps(blocks: Iterable[Features], channels: int, device: torch.device | None) -> Iterator[torch.Tensor]:
    for block in blocks:
        if len(block):
            rows = np.concatenate([part.astype(np.float32) for part in as_rows(block, channels)])
            yield torch.from_numpy(rows).to(device)


def _uniform(outputs: int, inputs: int, draw: torch.Generator) -> torch.Tensor:
    """Return (outputs, inputs) weights, uniform in +-sqrt(3 / inputs): a variance of 1 / inputs."""
    return (torch.rand((outputs, inputs), generator=draw) * 2 - 1) * math.sqrt(3 / inputs)
