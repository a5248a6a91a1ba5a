"""MF-LV: matrix factorisation in logit space with variable scale (Vongkulbhisal et al., CVPR 2019; docs/unify.md).

Lives here: the objective in (v, c), its start, the gauge of the scale. Does not live here: the fit (`factor`)
or the iteration (`newton`).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from consilience.server.unify.estimate import Estimate
from consilience.server.unify.factor import Derivatives, Fit, Layout
from consilience.server.unify.mf_lf import MFLF
from consilience.server.unify.newton import Minimum, minimise
from consilience.server.unify.plan import Plan

RELATIVE_RIDGE = 1e-4
"""The default lambda is this times the sample's mean square of centred logits: enough to make the problem well
posed, too little to be seen where two sites share two classes or more."""

_RICH = 2.0
"""With so many answers per unknown one start finds the lowest minimum known; with fewer, more are tried."""

_MORE_STARTS = 8

_LEAST_SLOPE = 0.3
"""A start gives every site at least this share of the mean |slope|: a site that starts ignored tends to stay so."""


class MFLV:
    """min over u, c, v >= 0 of sum_i w_i sum_{l in L_i} (z_i(l) - u_l v_i - c_i)^2 + lambda (||u||^2 + ||v||^2).

    q = softmax(g u), g the geometric mean of the positive v_i of the component: only *relative* sharpness can
    be seen in the answers, and by this convention the typical site is as sharp as the truth. v_i = 0 means
    that site i is ignored.

    Not convex. The minimum is the one near MF-LF of the answers brought to equal size. Where answers are few
    (less than twice the unknowns) it is the lowest of those reached from there and from a fixed handful of
    arbitrary u; then, too, a lower one may exist.
    """

    comparable = False

    def __init__(self, plan: Plan, regularisation: float | None) -> None:
        self._plan = plan
        self._regularisation = regularisation
        self._start = MFLF(plan, 0.0)
        groups = [(sites, classes) for sites, classes in plan.groups() if sites.size > 0]
        self._layouts = [Layout(plan, sites, classes) for sites, classes in groups]
        self._more = [_more_levels(layout) for layout in self._layouts]
        largest = max(
            (
                (1 + len(more)) * s.size * (8 * c.size + 16 * s.size)
                for (s, c), more in zip(groups, self._more, strict=True)
            ),
            default=0,
        )
        self.row_doubles = 3 * plan.columns.size + 4 * plan.num_classes + largest

    def __call__(self, log_probs: torch.Tensor) -> Estimate:
        """From stacked log-probabilities (K, b)."""
        even = self._start(_equal_size(log_probs, self._plan))
        scores = torch.zeros_like(even.scores)
        iterations, converged, residual = even.iterations, even.converged, even.residual
        for layout, more in zip(self._layouts, self._more, strict=True):
            mask, sizes = layout.mask, layout.mask.sum(1)
            logits = layout.gather(log_probs)
            # Centred per site: an offset only shifts c, and small numbers lose less to rounding.
            z = (logits - (logits.sum(2) / sizes)[:, :, None]) * mask
            square = (z**2).sum((1, 2))
            ridge = (
                RELATIVE_RIDGE * square / sizes.sum()
                if self._regularisation is None
                else torch.full_like(square, self._regularisation)
            ).clamp(min=1e-30)
            fit = Fit(layout, z, ridge)
            size = (square / sizes.sum()).sqrt()[:, None]
            levels = [even.scores[layout.classes].t(), *(size * u for u in more)]
            found = _lowest(fit, [_guess(fit, u) for u in levels])
            n = layout.shape[0]
            v, c = found.x[:, :n], found.x[:, n:]
            u, _, _ = fit.levels(v, c)
            scores[layout.classes] = (u * _gauge(v)).t()
            iterations = torch.maximum(iterations, found.iterations)
            converged = converged & found.converged
            residual = torch.maximum(residual, found.residual)
        return Estimate(scores, iterations, converged, residual)


def _more_levels(layout: Layout) -> list[torch.Tensor]:
    """u (1, m) to start from besides MF-LF's: none where answers abound."""
    sites, classes = layout.shape
    if sites == 1 or float(layout.mask.sum()) >= _RICH * (classes + 2 * sites):
        return []
    random = np.random.default_rng(0)
    return [torch.from_numpy(random.normal(size=(1, classes))).to(layout.mask.device) for _ in range(_MORE_STARTS)]


def _equal_size(log_probs: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Every site's logits centred and divided by their root mean square."""
    out = torch.empty_like(log_probs)
    for start, stop in pairwise(plan.offsets.tolist()):
        part = log_probs[start:stop] - log_probs[start:stop].mean(0)
        out[start:stop] = part / (part**2).mean(0).sqrt().clamp(min=1e-150)
    return out


def _guess(fit: Fit, u: torch.Tensor) -> torch.Tensor:
    """(v, c): each site's answers regressed on u, in the gauge ||u|| = ||v|| that the ridge wants."""
    mask = fit.layout.mask
    mean = (u @ mask.t()) / mask.sum(1)
    centred = (u[:, None] - mean[:, :, None]) * mask
    slope = (fit.z * centred).sum(2) / (centred**2).sum(2).clamp(min=1e-300)
    slope = torch.maximum(slope, _LEAST_SLOPE * slope.abs().mean(1, keepdim=True))
    gauge = ((u**2).sum(1) / (slope**2).sum(1).clamp(min=1e-300)) ** 0.25
    return torch.cat([slope * gauge.clamp(min=1e-6)[:, None], -slope * mean], dim=1)


def _lowest(fit: Fit, starts: list[torch.Tensor]) -> Minimum:
    """The lowest minimum found; of equal ones the earliest start's, so that rounding does not choose."""
    batch, n = fit.z.shape[:2]
    bounded = torch.arange(2 * n, device=fit.z.device) < n
    if len(starts) == 1:
        return minimise(_ScaleAndOffset(fit), starts[0], bounded)
    repeated = fit.select(torch.arange(batch, device=fit.z.device).repeat(len(starts)))
    found = minimise(_ScaleAndOffset(repeated), torch.cat(starts), bounded)
    values = found.value.view(len(starts), batch)
    low = values <= values.amin(0) + 1e-9 * _ScaleAndOffset(fit).data()
    which = low.int().argmax(0) * batch + torch.arange(batch, device=fit.z.device)
    return found.select(which)


def _gauge(v: torch.Tensor) -> torch.Tensor:
    """(b, 1): the geometric mean of the positive v."""
    positive = v > 0
    logs = torch.where(positive, v, torch.ones_like(v)).log()
    return (logs.sum(1, keepdim=True) / positive.sum(1, keepdim=True).clamp(min=1)).exp()


@dataclass(frozen=True)
class _ScaleAndOffset:
    """F as a function of x = (v, c)."""

    fit: Fit

    def value(self, x: torch.Tensor) -> torch.Tensor:
        """(b,)."""
        n = self.fit.layout.shape[0]
        return self.fit.value(x[:, :n], x[:, n:])

    def derivatives(self, x: torch.Tensor) -> Derivatives:
        """Up to second order."""
        n = self.fit.layout.shape[0]
        return self.fit.derivatives(x[:, :n], x[:, n:])

    def data(self) -> torch.Tensor:
        """(b,)."""
        return ((self.fit.z**2).sum(2) @ self.fit.layout.weights).clamp(min=1e-30)

    def select(self, rows: torch.Tensor) -> _ScaleAndOffset:
        """The same for some samples of the block."""
        return _ScaleAndOffset(self.fit.select(rows))
