"""CE's dual for well linked samples: Newton by the gradient alone, at first in fp32, then in fp64.

Lives here: the iteration, and which samples it is enough for. Does not live here: the dual in general, which knows
links however weak (`dual`), nor labels (`quick`).

A link's weight matters in two places: the gradient, in which rounding is about 1e-16 of the weights, and the Newton
step's direction, which need not be exact. So the gradient is in fp64, the direction in fp32, and a sample whose sites
hang together by so little that rounding of the gradient could move it by `CERTAIN` is not solved here.
"""

from __future__ import annotations

import torch

from consilience.server.unify.dual import CERTAIN, GRADIENT_TOLERANCE, STEP_TOLERANCE, Solution
from consilience.server.unify.owners import Overlap

_MM_STEPS = 8
_COARSE_STEPS = 2
_MOST_STEPS = 12
_LOWEST = -80.0  # below, fp32 has no exponentials
_TINY = 1e-36


class Linked:
    """Prepared for one overlap."""

    def __init__(self, overlap: Overlap) -> None:
        self._overlap = overlap
        self._by_type = {
            dtype: (overlap.sites_to_sets.to(dtype), overlap.sets_to_sites.to(dtype))
            for dtype in (torch.float32, torch.float64)
        }
        self._pairs = overlap.sets_to_pairs.to(torch.float32)
        one, two = torch.triu_indices(overlap.size, overlap.size, 1, device=overlap.sites.device)
        self._one, self._two = one, two
        # Row (i, j) of the full matrix is row `full` of the pairs; the diagonal, any, is not used.
        full = torch.zeros((overlap.size, overlap.size), dtype=torch.int64, device=one.device)
        full[one, two] = full[two, one] = torch.arange(one.numel(), device=one.device)
        self._full = full.view(-1)
        self._rounding = torch.finfo(torch.float64).eps * overlap.weights.sum()

    @property
    def row_doubles(self) -> int:
        """Doubles that one sample needs at the same time, roughly."""
        return 8 * self._overlap.set_count + 3 * self._overlap.size**2

    def solve(self, sets: torch.Tensor, sites: torch.Tensor) -> Solution:
        """From A_T (S, b) and B_i (n, b), fp64. Where `converged` is not True nothing is said about the sample."""
        lam = self._start(sets, sites).to(torch.float64)
        batch, device, weights = lam.shape[1], lam.device, self._overlap.weights
        best, log_sets = torch.empty_like(lam), torch.empty_like(sets)
        residual = torch.empty(batch, dtype=torch.float64, device=device)
        iterations = torch.full((batch,), _COARSE_STEPS, dtype=torch.int32, device=device)
        converged = torch.zeros(batch, dtype=torch.bool, device=device)
        rows: torch.Tensor | slice = slice(None)
        length, certain = torch.full_like(lam[0], torch.inf), converged
        for step in range(_MOST_STEPS + 1):
            top, e, sums, ratio = self._terms(lam, sets)
            gradient = e * (self._by_type[lam.dtype][1] @ ratio) - sites
            flat = ((gradient.abs() / sites).amax(0) <= GRADIENT_TOLERANCE) & (length <= STEP_TOLERANCE)
            stop = flat if step < _MOST_STEPS else torch.ones_like(flat)
            if bool(stop.any()):
                # Of all that are here: most are done at the same step, and what is not done is written again.
                drift = gradient / (weights + gradient)
                shared = ratio * (self._by_type[lam.dtype][0] @ (e * drift))
                alone = (weights - sites) * drift
                best[:, rows], log_sets[:, rows] = lam, sums.log().add_(top)
                residual[rows] = torch.maximum(shared.abs_().amax(0), alone.abs_().amax(0))
                converged[rows], iterations[rows] = flat & certain, _COARSE_STEPS + step
                left = torch.nonzero(~stop)[:, 0]
                if left.numel() == 0:
                    break
                rows = left if isinstance(rows, slice) else rows[left]
                lam, sets, sites = lam[:, left], sets[:, left], sites[:, left]
                e, sums, ratio, gradient = e[:, left], sums[:, left], ratio[:, left], gradient[:, left]
            lam, length, certain = self._step(lam, e, ratio / sums, gradient)
        return Solution(best, log_sets, iterations, converged, residual)

    def _start(self, sets: torch.Tensor, sites: torch.Tensor) -> torch.Tensor:
        """A few steps of Hunter's and of Newton's in fp32."""
        sets, sites = sets.to(torch.float32), sites.to(torch.float32)
        lam = torch.zeros_like(sites)
        to_sites = self._by_type[lam.dtype][1]
        for step in range(_MM_STEPS + _COARSE_STEPS):
            _, e, sums, ratio = self._terms(lam, sets)
            marginals = e * (to_sites @ ratio)
            if step < _MM_STEPS:
                moved = lam + (sites / marginals).log_()
                lam = torch.where(moved.isfinite().all(0), moved, lam)
            else:
                lam, _, _ = self._step(lam, e, ratio.div_(sums), marginals.sub_(sites))
        return lam

    def _terms(self, lam: torch.Tensor, sets: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the largest of lam (b,), e^lam relative to it (n, b), its sums over T and A_T by them (S, b)."""
        top = lam.amax(0)
        e = (lam - top).clamp_(min=_LOWEST).exp_()
        sums = self._by_type[lam.dtype][0] @ e
        return top, e, sums, sets / sums

    def _step(
        self, lam: torch.Tensor, e: torch.Tensor, mass: torch.Tensor, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the next lam, the length of the Newton step, and whether rounding matters little, from A_T / s_T^2."""
        small = e.to(torch.float32)
        links = self._pairs @ mass.to(torch.float32)
        links.mul_(small.index_select(0, self._one)).mul_(small.index_select(0, self._two))
        n = lam.shape[0]
        step, weakest = _potentials(
            links.index_select(0, self._full).view(n, n, -1), gradient.to(torch.float32, copy=True)
        )
        length = (step.amax(0) - step.amin(0)).to(lam.dtype)
        # Damped as in `dual`; and what is not finite stays where it was, which never converges.
        moved = lam - step * (torch.log1p(length) / length.clamp(min=_TINY))
        sound = moved.isfinite().all(0)
        length = torch.where(sound, length, torch.inf)
        return torch.where(sound, moved, lam), length, weakest * CERTAIN >= self._rounding


def _potentials(links: torch.Tensor, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """d (n, b) with sum_j h_ij (d_i - d_j) = g_i, and the smallest pivot; as `elimination`, but by gradients alone.

    links (n, n, b), of which the diagonal is not used, and gradient (n, b) are overwritten.
    """
    n, _, batch = links.shape
    shares: list[torch.Tensor] = []
    weakest = links.new_full((batch,), torch.inf)
    for k in range(n - 1, 0, -1):
        link, own = links[k, :k], gradient[k]
        pivot = link.sum(0).clamp_(min=_TINY)
        share = link / pivot
        weakest = torch.minimum(weakest, pivot)
        shares.append(share)
        links[:k, :k].addcmul_(share[:, None], link[None])
        gradient[:k].addcmul_(share, own[None])
        own.div_(pivot)
    gradient[0] = 0.0
    for k in range(1, n):
        gradient[k] += (shares[n - 1 - k] * gradient[:k]).sum(0)
    return gradient, weakest
