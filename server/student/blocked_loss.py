"""Sigmoid cross-entropy of a head of verticals, with its gradients, in one pass over the verticals.

Lives here: the arithmetic of `ConcentratedHead.forward` and `SparseSigmoid`, joined. A vertical's (b, N_v) scores are
made, turned into their gradient in place and used up before the next vertical's: (b, L) scores are never there, nor is
anything of a target but its few classes that are not zero. Where a part of the classes is drawn, a vertical's scores
are made for the samples that it teaches, and of the others for drawn classes alone, which stand for all: loss and
gradients are right on average. Does not live here: the hidden layers, which are the network's, and targets
(sparse_loss).
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
    hidden: Tensor,
    gammas: Sequence[Tensor],
    weights: Sequence[Tensor],
    places: Places,
    *,
    coarse: bool = False,
    drawn: Sequence[Tensor] | None = None,
) -> Tensor:
    """Return sum over classes, mean over the batch, of softplus(y) - z y, a scalar whose gradients are exact.

    `hidden` (b, M' s_2) float32, M' = M or 1; `weights` M of (N_v, s_2); `gammas` none, or M of (1,) or (N_v,); y are
    the scores hidden @ weight.T, scaled by gamma where there are any. `coarse`: products are made in bfloat16. `drawn`:
    of each vertical some classes, (n_v,) int64, drawn evenly without repetition; scores are then not to be scaled.
    """
    kind = torch.bfloat16 if coarse else hidden.dtype
    loss: Tensor
    if drawn is None:
        loss = _Blocked.apply(hidden, kind, places, len(gammas), *gammas, *weights)  # type: ignore[no-untyped-call]
    else:
        loss = _Drawn.apply(hidden, kind, places, drawn, *weights)  # type: ignore[no-untyped-call]
    return loss


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, kind: torch.dtype, places: Places, scaled: int, *held: Tensor) -> Tensor:
        gammas, weights = held[:scaled], held[scaled:]
        batch, second = len(hidden), weights[0].shape[1]
        units = hidden.view(batch, -1, second)
        d_hidden = torch.zeros(batch, units.shape[1], second, dtype=hidden.dtype, device=hidden.device)
        d_gammas: list[Tensor | None] = []
        d_weights: list[Tensor | None] = []
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for v, weight in enumerate(weights):
            at = v if units.shape[1] > 1 else 0
            fed, narrow = units[:, at].to(kind), weight.detach().to(kind)
            scores = (fed @ narrow.T).to(hidden.dtype)
            unit = length = floored = scores  # what they are where scores are scaled
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
                if len(gammas[v]) > 1:
                    d_gammas.append((step * unit).sum(dim=0))
                else:
                    d_gammas.append(torch.linalg.vecdot(step, unit).sum().view(1))
                step *= gammas[v]
                along = torch.linalg.vecdot(step, unit)[:, None]
                step = step.addcmul_(unit, along * (length > FLOOR), value=-1).div_(floored)
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
        found = _times(outer[0], [d_hidden, *d_gammas, *d_weights])
        return (found[0], None, None, None, *found[1:])


class _Drawn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, kind: torch.dtype, places: Places, drawn: Sequence[Tensor], *weights: Tensor
    ) -> Tensor:
        batch, second = len(hidden), weights[0].shape[1]
        units = hidden.view(batch, -1, second)
        d_hidden = torch.zeros(batch, units.shape[1], second, dtype=hidden.dtype, device=hidden.device)
        d_weights: list[Tensor] = []
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for v, weight in enumerate(weights):
            at = v if units.shape[1] > 1 else 0
            rows, columns, values = places[v]
            own = torch.zeros(batch, dtype=torch.bool, device=hidden.device)
            own[rows] = True
            taught, others = own.nonzero()[:, 0], (~own).nonzero()[:, 0]
            fed, narrow = units[taught, at].to(kind), weight.detach().to(kind)
            scores = (fed @ narrow.T).to(hidden.dtype)
            row = torch.cumsum(own, dim=0)[rows] - 1  # among the taught
            total += F.softplus(scores).sum(dtype=total.dtype) - (values * scores[row, columns]).sum(dtype=total.dtype)
            step = scores.sigmoid_()
            step.index_put_((row, columns), -values.to(step.dtype), accumulate=True)
            step = (step / batch).to(kind)
            d_weight = (step.T @ fed).to(weight.dtype)
            d_hidden[taught, at] += (step @ narrow).to(hidden.dtype)
            stands_for = len(weight) / len(drawn[v])
            fed, narrow = units[others, at].to(kind), narrow[drawn[v]]
            scores = (fed @ narrow.T).to(hidden.dtype)
            total += stands_for * F.softplus(scores).sum(dtype=total.dtype)
            step = scores.sigmoid_().mul_(stands_for / batch).to(kind)
            d_weight.index_add_(0, drawn[v], (step.T @ fed).to(weight.dtype))
            d_hidden[others, at] += (step @ narrow).to(hidden.dtype)
            d_weights.append(d_weight)
        ctx.found = (d_hidden.view_as(hidden), d_weights)
        return (total / batch).to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Any, ...]:
        d_hidden, d_weights = ctx.found
        ctx.found = None
        found = _times(outer[0], [d_hidden, *d_weights])
        return (found[0], None, None, None, *found[1:])


def _times(outer: Tensor, found: list[Tensor | None]) -> list[Tensor | None]:
    """Multiply gradients by the loss's own, unless that is known to be 1: it is a pass over all weights."""
    if outer.device.type == "cpu" and float(outer) == 1.0:
        return found
    return [None if held is None else held * outer for held in found]
