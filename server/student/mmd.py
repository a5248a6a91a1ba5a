"""The distance between two samples' distributions that common-feature learning lessens (methods.md 2.3).

Lives here: maximum mean discrepancy under Gaussian kernels of several bandwidths. Does not live here: the networks
whose outputs it compares (common_feature).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from consilience.common.errors import StudentError

BANDWIDTHS = (0.001, 0.01, 0.05, 0.1, 0.2, 1.0, 2.0)
"""The sigmas of Luo et al. (IJCAI 2019). Unit vectors are at most 2 apart, so the last two or three do the work."""
FALLBACK = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Where no sigmas are given: sigma^2 over the mean squared distance of all pairs."""


def mmd(first: Tensor, second: Tensor, bandwidths: Sequence[float] | None = BANDWIDTHS) -> Tensor:
    """Return MMD^2 of the samples `first` (n, ...) and `second` (m, ...), floating: a scalar >= 0.

    The biased estimate, a V-statistic with the diagonals: mean k(x, x') + mean k(y, y') - 2 mean k(x, y), with k(x, y)
    = sum over sigma of exp(-|x - y|^2 / (2 sigma^2)). Each sample is flattened and divided by its length first; zeros
    stay zeros. With `bandwidths` None, sigma^2 are `FALLBACK` times the mean squared distance of all pairs of the n + m
    samples, which counts as a constant; where that is 0, so is the result.

    Inputs of any floating type, in autocast or out of it: distances and kernels are fp64, for beside a sigma of 0.001
    the rounding of fp32 products is no longer small. The result is fp32 (fp64 for fp64 inputs). Raises `StudentError`
    for an empty sample and for samples of unequal length.
    """
    if not len(first) or not len(second) or first[0].numel() != second[0].numel():
        raise StudentError(
            f"Features of shapes {tuple(first.shape)} and {tuple(second.shape)} cannot be compared; allowed: one or "
            "more samples each, of equal length",
            hint="Bring features to one size with `size`",
        )
    kind = torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)
    with torch.autocast(first.device.type, enabled=False):
        x, y = (torch.nn.functional.normalize(rows.double().flatten(1), dim=1) for rows in (first, second))
        distances = _squared_distances(torch.cat([x, y]))
        variances = _fallback(distances) if bandwidths is None else [sigma**2 for sigma in bandwidths]
        kernel = torch.zeros_like(distances)
        for variance in variances:
            kernel = kernel + torch.exp(distances / (-2 * variance))
        n = len(x)
        value = kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()
        return value.clamp(min=0).to(kind)


def _squared_distances(rows: Tensor) -> Tensor:
    """Return (n, n) fp64 |a - b|^2, exactly 0 on the diagonal."""
    lengths = rows.square().sum(dim=1)
    squared = (lengths[:, None] + lengths[None, :] - 2 * rows @ rows.T).clamp(min=0)
    return squared * (1 - torch.eye(len(rows), dtype=rows.dtype, device=rows.device))


def _fallback(distances: Tensor) -> list[Tensor]:
    """Return sigma^2 of each kernel; none where all samples coincide, for then every kernel is 1."""
    pairs = len(distances) * (len(distances) - 1)
    mean = distances.detach().sum() / pairs
    return [mean * factor for factor in FALLBACK] if mean > 0 else []
