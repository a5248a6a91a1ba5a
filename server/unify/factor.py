"""The weighted rank-one fit with offsets that MF-P and MF-LV share, with u eliminated.

Lives here: value, gradient and Hessian in (v, c), batched. Does not live here: starts, bounds, what Z stands
for (`mf_p`, `mf_lv`), or the iteration (`newton`).

    F(v, c) = min over u of sum_i w_i sum_{l in L_i} (Z_il - u_l v_i - c_i)^2 + lambda (||u||^2 + ||v||^2)

Here n sites, m classes, batch first: Z (b, n, m), zero where a site does not know the class.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from consilience.server.unify.plan import IntArray, Plan


class Layout:
    """Which sites and classes take part, and how to get Z out of stacked answers."""

    def __init__(self, plan: Plan, sites: IntArray, classes: IntArray) -> None:
        place = {int(column): m for m, column in enumerate(classes)}
        rows, cells = [], []
        for n, site in enumerate(sites):
            for k, column in enumerate(plan.class_sets[site]):
                if int(column) in place:
                    rows.append(int(plan.offsets[site]) + k)
                    cells.append(n * classes.size + place[int(column)])
        self.shape = (sites.size, classes.size)
        self.classes = plan.tensor(classes)
        self._rows, self._cells = plan.tensor(rows), plan.tensor(cells)
        mask = torch.zeros(sites.size * classes.size, dtype=torch.float64, device=plan.device)
        mask[self._cells] = 1.0
        self.mask = mask.view(self.shape)
        self.weights = plan.tensor(plan.weights[sites])

    def gather(self, stacked: torch.Tensor) -> torch.Tensor:
        """(b, n, m) from (K, b)."""
        out = stacked.new_zeros((stacked.shape[1], self.shape[0] * self.shape[1]))
        out[:, self._cells] = stacked.index_select(0, self._rows).t()
        return out.view(-1, *self.shape)


@dataclass(frozen=True)
class Fit:
    """The data of one block and, at (v, c), the best u (b, m) with what is left over."""

    layout: Layout
    z: torch.Tensor
    ridge: torch.Tensor
    """lambda, (b,)."""

    def select(self, rows: torch.Tensor) -> Fit:
        """The same for some samples of the block."""
        return Fit(self.layout, self.z[rows], self.ridge[rows])

    def levels(self, v: torch.Tensor, c: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """u (b, m), the denominator D_l = lambda + sum_i w_i v_i^2 (b, m), and z - c (b, n, m)."""
        mask, weights = self.layout.mask, self.layout.weights
        shifted = self.z if c is None else self.z - c[:, :, None] * mask
        below = self.ridge[:, None] + (weights * v**2) @ mask
        return ((weights * v)[:, None] @ shifted)[:, 0] / below, below, shifted

    def _left(self, v: torch.Tensor, u: torch.Tensor, shifted: torch.Tensor) -> torch.Tensor:
        """Residuals (b, n, m)."""
        return shifted - v[:, :, None] * (u[:, None] * self.layout.mask)

    def value(self, v: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        """F, (b,)."""
        u, _, shifted = self.levels(v, c)
        return self._value(v, u, self._left(v, u, shifted))

    def _value(self, v: torch.Tensor, u: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
        return (left**2).sum(2) @ self.layout.weights + self.ridge * ((u**2).sum(1) + (v**2).sum(1))

    def derivatives(self, v: torch.Tensor, c: torch.Tensor | None = None) -> Derivatives:
        """Up to second order, u eliminated by its Schur complement."""
        mask, weights = self.layout.mask, self.layout.weights
        u, below, shifted = self.levels(v, c)
        left = self._left(v, u, shifted)
        double = 2.0 * weights
        spread = (u**2) @ mask.t()
        cross_v = -double[:, None] * (left - v[:, :, None] * (u[:, None] * mask))
        cross_c = (double * v)[:, :, None] * mask
        scale = torch.rsqrt(2.0 * below)[:, None]
        cross = torch.cat([cross_v, cross_c], dim=1) * scale
        diagonal_v = double * spread + 2.0 * self.ridge[:, None]
        diagonal_c = (double * mask.sum(1)).expand_as(v)
        hessian = -(cross @ cross.transpose(1, 2))
        n = v.shape[1]
        index = torch.arange(n, device=v.device)
        hessian[:, index, index] += diagonal_v
        hessian[:, n + index, n + index] += diagonal_c
        mixed = double * (u @ mask.t())
        hessian[:, index, n + index] += mixed
        hessian[:, n + index, index] += mixed
        gradient_v = -double * (left @ u[:, :, None])[:, :, 0] + 2.0 * self.ridge[:, None] * v
        gradient = torch.cat([gradient_v, -double * left.sum(2)], dim=1)
        return Derivatives(self._value(v, u, left), gradient, hessian, torch.cat([diagonal_v, diagonal_c], dim=1))


@dataclass(frozen=True)
class Derivatives:
    """value (b,), gradient (b, k), hessian (b, k, k), and positive scales (b, k) of the unknowns' curvatures."""

    value: torch.Tensor
    gradient: torch.Tensor
    hessian: torch.Tensor
    scale: torch.Tensor
