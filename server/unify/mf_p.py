"""MF-P: matrix factorisation in probability space (Vongkulbhisal et al., CVPR 2019; docs/unify.md).

Lives here: the objective in log v, its start by alternating least squares, and the scores. Does not live here:
the fit (`factor`) or the iteration (`newton`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from consilience.server.unify.estimate import Estimate
from consilience.server.unify.factor import Derivatives, Fit, Layout
from consilience.server.unify.newton import minimise
from consilience.server.unify.plan import Plan

_SWEEPS = 20
_DEEPEST = -300.0  # e^(2 * -300) is still a normal number


class MFP:
    """min over u, v >= 0 of sum_i w_i sum_{l in L_i} (p_i(l) - u_l v_i)^2, q = u.

    Bounds never bind: P > 0, so u_l and v_i > 0 at every minimum, and the unknowns may be log v, up to a
    constant per component. Classes with one owner are fitted exactly whatever v is, and drop out. Not convex:
    the minimum is the one near alternating least squares from u = v = 1.
    """

    comparable = False

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        owners = np.bincount(plan.columns[plan.counted], minlength=plan.num_classes)
        groups = [(sites, classes) for sites, classes in plan.groups() if sites.size > 1]
        self._shared = [(plan.tensor(s), Layout(plan, s, c[owners[c] > 1])) for s, c in groups]
        self._all = [Layout(plan, s, c) for s, c in groups]
        largest = max((s.size * (6 * c.size + 6 * s.size) for s, c in groups), default=0)
        self.row_doubles = 2 * plan.columns.size + 2 * plan.num_classes + largest
        # Classes outside those components: their one owner's probability, whatever v is.
        self._alone = _first_rows(plan)

    def __call__(self, log_probs: torch.Tensor) -> Estimate:
        """From stacked log-probabilities (K, b)."""
        scores = log_probs.index_select(0, self._alone)
        closed = Estimate.closed(scores)
        iterations, converged, residual = closed.iterations, closed.converged, closed.residual
        probs = log_probs.exp()
        none = torch.zeros_like(residual)
        for (_, shared), everything in zip(self._shared, self._all, strict=True):
            fit = Fit(shared, shared.gather(probs), none)
            objective = _LogScale(fit)
            found = minimise(
                objective, _sweeps(fit), torch.zeros(shared.shape[0], dtype=torch.bool, device=none.device)
            )
            v = torch.exp(found.x - found.x.amax(1, keepdim=True))
            u, _, _ = Fit(everything, everything.gather(probs), none).levels(v)
            scores[everything.classes] = u.log().t()
            iterations = torch.maximum(iterations, found.iterations)
            converged = converged & found.converged
            residual = torch.maximum(residual, found.residual)
        return Estimate(scores, iterations, converged, residual)


def _first_rows(plan: Plan) -> torch.Tensor:
    rows = np.flatnonzero(plan.counted)[::-1]
    first = np.zeros(plan.num_classes, dtype=np.int64)
    first[plan.columns[rows]] = rows
    return plan.tensor(first)


def _sweeps(fit: Fit) -> torch.Tensor:
    """log v (b, n) after some sweeps of alternating least squares from v = 1."""
    mask, z = fit.layout.mask, fit.z
    v = torch.ones_like(z[:, :, 0])
    for _ in range(_SWEEPS):
        u, _, _ = fit.levels(v)
        v = (z @ u[:, :, None])[:, :, 0] / ((u**2) @ mask.t())
        v = v / v.amax(1, keepdim=True)
    return v.log().clamp(min=_DEEPEST)


@dataclass(frozen=True)
class _LogScale:
    """F as a function of y = log v."""

    fit: Fit

    def _v(self, y: torch.Tensor) -> torch.Tensor:
        return (y - y.amax(1, keepdim=True)).clamp(min=_DEEPEST).exp()

    def value(self, x: torch.Tensor) -> torch.Tensor:
        """(b,)."""
        v = self._v(x)
        return self.fit.value(v)

    def derivatives(self, x: torch.Tensor) -> Derivatives:
        """By the chain rule; F does not change along (1, ..., 1), so curvature is added there."""
        v = self._v(x)
        n = v.shape[1]
        at = self.fit.derivatives(v)
        gradient = v * at.gradient[:, :n]
        scale = v**2 * at.scale[:, :n]
        hessian = v[:, :, None] * at.hessian[:, :n, :n] * v[:, None]
        hessian.diagonal(dim1=1, dim2=2).add_(gradient)
        hessian += (scale.amax(1) / n)[:, None, None]
        return Derivatives(at.value, gradient, hessian, scale)

    def data(self) -> torch.Tensor:
        """(b,)."""
        return (self.fit.z**2).sum(2) @ self.fit.layout.weights

    def select(self, rows: torch.Tensor) -> _LogScale:
        """The same for some samples of the block."""
        return _LogScale(self.fit.select(rows))
