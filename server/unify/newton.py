"""A batched, damped Newton method with bounds at zero, for the methods that are not convex (MF-P, MF-LV).

Lives here: damping (Levenberg-Marquardt), the active set, convergence per sample. Does not live here: any
objective.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from consilience.server.unify.factor import Derivatives

GRADIENT_TOLERANCE = 1e-9
"""Converged: every |gradient_k| / sqrt(scale_k * data) is below this, `data` being the sample's sum of squares,"""

STEP_TOLERANCE = 1e-6
"""the last step was accepted, changed no unknown by more than this (relative to max(1, |x|)), was nearly undamped
in every direction,"""

LEAST_CURVATURE = 1e-9
"""and the Hessian, in units where the unknowns' own curvatures are 1, was positive definite by at least this.
Below it rounding of the gradient decides where the minimum is."""

MAX_ITERATIONS = 400

_NEARLY_UNDAMPED = 1e-3  # of the least curvature
_LEAST_DAMPING = 1e-12
_NOISE = 1e-15


class Objective(Protocol):
    """A smooth function of (b, k) unknowns, sample by sample."""

    def value(self, x: torch.Tensor) -> torch.Tensor:
        """(b,)."""
        ...

    def derivatives(self, x: torch.Tensor) -> Derivatives:
        """Up to second order."""
        ...

    def data(self) -> torch.Tensor:
        """(b,) positive: the size that values are measured against."""
        ...

    def select(self, rows: torch.Tensor) -> Objective:
        """The same for some samples of the block."""
        ...


@dataclass(frozen=True)
class Minimum:
    """x (b, k), value (b,), iterations (b,) int32, converged (b,), residual (b,): the scaled, projected gradient."""

    x: torch.Tensor
    value: torch.Tensor
    iterations: torch.Tensor
    converged: torch.Tensor
    residual: torch.Tensor

    def select(self, rows: torch.Tensor) -> Minimum:
        """The same for some samples of the block."""
        return Minimum(self.x[rows], self.value[rows], self.iterations[rows], self.converged[rows], self.residual[rows])


def minimise(
    objective: Objective, x: torch.Tensor, bounded: torch.Tensor, max_iterations: int = MAX_ITERATIONS
) -> Minimum:
    """A local minimum near x (b, k) with x >= 0 where `bounded` (k,)."""
    batch, device = x.shape[0], x.device
    rows = torch.arange(batch, device=device)
    out = Minimum(
        x.clone(),
        torch.zeros_like(x[:, 0]),
        torch.zeros(batch, dtype=torch.int32, device=device),
        torch.zeros(batch, dtype=torch.bool, device=device),
        torch.zeros_like(x[:, 0]),
    )
    damping = torch.full_like(x[:, 0], 1e-3)
    settled = stuck = torch.zeros_like(out.converged)
    for iteration in range(max_iterations + 1):
        at = objective.derivatives(x)
        held = bounded & (x <= 0) & (at.gradient > 0)
        gradient = at.gradient.masked_fill(held, 0.0)
        data = objective.data()
        residual = (gradient.abs() / torch.sqrt(at.scale * data[:, None])).amax(1)
        finished = settled & (residual <= GRADIENT_TOLERANCE)
        stop = finished | stuck
        if iteration == max_iterations:
            stop = torch.ones_like(stop)
        if bool(stop.any()):
            where = rows[stop]
            out.x[where], out.value[where], out.residual[where] = x[stop], at.value[stop], residual[stop]
            out.iterations[where], out.converged[where] = iteration, finished[stop]
            keep = torch.nonzero(~stop)[:, 0]
            if keep.numel() == 0:
                break
            objective, x, rows, damping, data = objective.select(keep), x[keep], rows[keep], damping[keep], data[keep]
            held, gradient = held[keep], gradient[keep]
            at = Derivatives(at.value[keep], at.gradient[keep], at.hessian[keep], at.scale[keep])
        step, curvature = _step(at, gradient, held, damping)
        trial = x + step
        trial = torch.where(bounded, trial.clamp(min=0.0), trial)
        value = objective.value(trial)
        better = (curvature > 0) & (value <= at.value + _NOISE * data)
        length = ((trial - x).abs() / x.abs().clamp(min=1.0)).amax(1)
        short = better & (length <= STEP_TOLERANCE)
        settled = short & (damping <= _NEARLY_UNDAMPED * curvature) & (curvature >= LEAST_CURVATURE)
        stuck = (short & ~settled & (damping <= _LEAST_DAMPING)) | (damping > 1e12)
        x = torch.where(better[:, None], trial, x)
        damping = torch.where(better, (damping * 0.1).clamp(min=_LEAST_DAMPING), (damping * 8.0).clamp(min=1e-6))
    return out


def _step(
    at: Derivatives, gradient: torch.Tensor, held: torch.Tensor, damping: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """-(H + damping * scale)^-1 gradient over the free unknowns, and the least pivot, 0 if it is not definite."""
    # In units where every scale is 1; held unknowns become rows of the identity.
    unit = torch.rsqrt(at.scale)
    free = (~held).to(unit.dtype)
    matrix = at.hessian * (unit * free)[:, :, None] * (unit * free)[:, None]
    matrix.diagonal(dim1=1, dim2=2).add_(damping[:, None] + (1.0 - free))
    factor, info = torch.linalg.cholesky_ex(matrix)
    factor[info != 0] = torch.eye(factor.shape[1], dtype=factor.dtype, device=factor.device)
    step = torch.cholesky_solve(-(gradient * unit)[:, :, None], factor)[:, :, 0] * unit
    pivot = factor.diagonal(dim1=1, dim2=2).amin(1) ** 2 - damping
    sound = (info == 0) & step.isfinite().all(1)
    return step, torch.where(sound, pivot.clamp(min=1e-300), torch.zeros_like(pivot))
