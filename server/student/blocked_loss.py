"""Sigmoid cross-entropy of a head of verticals, with its gradients, in one pass over the verticals.

Lives here: the arithmetic of `ConcentratedHead.forward` and `SparseSigmoid`, joined. A vertical's (b, N_v) scores are
made, turned into their gradient in place and used up before the next vertical's: (b, L) scores are never there, nor is
anything of a target but its few classes that are not zero. Does not live here: the hidden layers, which are the
network's, and targets (sparse_loss).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from consilience.server.student.concentrated_head import FLOOR

Places = Sequence[tuple[Tensor, ...]]
"""A vertical each: rows, columns in the vertical, and values of what targets are not zero."""


def blocked_sigmoid(
    hidden: Tensor, gammas: Sequence[Tensor], weights: Sequence[Tensor], places: Places, *, coarse: bool = False
) -> Tensor:
    """Return sum over classes, mean over the batch, of softplus(y) - z y, a scalar whose gradients are exact.

    `hidden` (b, M' s_2) float32, M' = M or 1; `weights` M of (N_v, s_2); `gammas` none, or M of (1,) or (N_v,); y are
    the scores hidden @ weight.T, scaled by gamma where there are any. `coarse`: products are made in bfloat16.
    """
    loss: Tensor = _Blocked.apply(hidden, coarse, places, len(gammas), *gammas, *weights)  # type: ignore[no-untyped-call]
    return loss


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, coarse: bool, places: Places, scaled: int, *held: Tensor) -> Tensor:
        gammas, weights = held[:scaled], held[scaled:]
        batch, second = len(hidden), weights[0].shape[1]
        kind = torch.bfloat16 if coarse else hidden.dtype
        units = hidden.view(batch, -1, second)
        d_hidden = torch.zeros(batch, units.shape[1], second, dtype=hidden.dtype, device=hidden.device)
        d_gammas: list[Tensor | None] = []
        d_weights: list[Tensor | None] = []
        total = torch.zeros((), dtype=torch.float64 if hidden.device.type == "cpu" else hidden.dtype)
        total = total.to(hidden.device)
        for v, weight in enumerate(weights):
            at = v if units.shape[1] > 1 else 0
            fed, narrow = units[:, at].to(kind), weight.detach().to(kind)
            scores = (fed @ narrow.T).to(hidden.dtype)
            if scaled:
                length = scores.norm(dim=1, keepdim=True)
                floored = length.clamp_min(FLOOR)
                unit = scores.div_(floored)
                scores = unit * gammas[v]
            rows, columns, values = places[v]
            total += F.softplus(scores).sum(dtype=total.dtype) - (values * scores[rows, columns]).sum(dtype=total.dtype)
            step = scores.sigmoid_()
            step.index_put_((rows, columns), -values.to(step.dtype), accumulate=True)
            step /= batch
            if scaled:
                if len(gammas[v]) == 1:
                    d_gammas.append((step * unit).sum().view(1))
                else:
                    d_gammas.append((step * unit).sum(dim=0))
                step *= gammas[v]
                along = (step * unit).sum(dim=1, keepdim=True) * (length > FLOOR)
                step = step.sub_(unit * along).div_(floored)
            step = step.to(kind)
            d_weights.append((step.T @ fed).to(weight.dtype) if ctx.needs_input_grad[4 + scaled + v] else None)
            if ctx.needs_input_grad[0]:
                d_hidden[:, at] += (step @ narrow).to(hidden.dtype)
        ctx.found = (d_hidden.view_as(hidden), d_gammas, d_weights)
        return (total / batch).to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Any, ...]:
        d_hidden, d_gammas, d_weights = ctx.found
        ctx.found = None
        found = [d_hidden, *d_gammas, *d_weights]
        if outer[0].device.type != "cpu" or float(outer[0]) != 1.0:  # a pass over all weights that is seldom needed
            found = [None if held is None else held * outer[0] for held in found]
        return (found[0], None, None, None, *found[1:])
