"""CE in N numbers per sample: damped Newton on the dual, for a block of samples at once.

Lives here: the start, the iteration, and what "converged" means. Does not live here: the terms at one point
(`terms`), the linear system (`elimination`), labels (`ce`). The derivation is in docs/unify.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from consilience.server.unify.elimination import potentials
from consilience.server.unify.owners import Overlap
from consilience.server.unify.terms import REACH, Masses, Narrow, Summed, Terms, Wide

GRADIENT_TOLERANCE = 1e-8
"""Converged: |g_i| <= this times B_i for every site, and the last Newton step was short."""

STEP_TOLERANCE = 1e-5
"""max - min of the last Newton step. After a step of length R the distance left is of order R^2 in every
coordinate, whatever the links weigh, so what is left is about 1e-10."""

CERTAIN = 1e-9
"""From sums only: rounding must not move the solution by more than this, else it does not count as converged."""

MAX_ITERATIONS = 500

_MM_STEPS = 2
_MM_STEPS_FROM_ZERO = 4


@dataclass(frozen=True)
class Solution:
    """lam (n, b), log_sets (S, b), iterations (b,) int32, converged (b,) bool, residual (b,)."""

    lam: torch.Tensor
    log_sets: torch.Tensor
    iterations: torch.Tensor
    converged: torch.Tensor
    residual: torch.Tensor


def solve(overlap: Overlap, masses: Masses, max_iterations: int = MAX_ITERATIONS) -> Solution:
    """Minimise Phi(lam) = sum_T A_T log sum_{i in T} e^lam_i - sum_i B_i lam_i for every sample of a block."""
    batch = masses.sets.shape[1]
    lam = _start(overlap, masses)
    run = _Run(overlap, batch, max_iterations)
    rows = torch.arange(batch, device=lam.device)
    near = _reach(lam) <= REACH
    if masses.parts is not None:
        near_rows = rows[near]
        polished = _mm(overlap, masses.select(near_rows), lam[:, near], _MM_STEPS)
        far = run.newton(Narrow, masses.select(near_rows), polished, near_rows)
        far_rows = torch.cat([rows[~near], far[0]])
        run.newton(Wide, masses.select(far_rows), torch.cat([lam[:, ~near], far[1]], dim=1), far_rows)
    else:
        run.newton(Summed, masses, lam, rows)
    return run.solution


def _reach(lam: torch.Tensor) -> torch.Tensor:
    return lam.amax(0) - lam.amin(0)


def _start(overlap: Overlap, masses: Masses) -> torch.Tensor:
    """Exact for consistent teachers: lam_i - lam_j = log(a_Ti / a_Tj) for every pair, in weighted least squares."""
    if masses.parts is None:
        return _mm(overlap, masses, torch.zeros_like(masses.sites), _MM_STEPS_FROM_ZERO)
    n = overlap.size
    _, one, two = overlap.pairs
    mine, theirs = masses.parts.index_select(0, one), masses.parts.index_select(0, two)
    log_parts = masses.parts.log()
    weight = mine * (theirs / (mine + theirs))
    gap = weight * (log_parts.index_select(0, one) - log_parts.index_select(0, two))
    return potentials((overlap.pairs_to_links @ weight).view(n, n, -1), (overlap.pairs_to_flows @ gap).view(n, n, -1))[
        0
    ]


def _mm(overlap: Overlap, masses: Masses, lam: torch.Tensor, steps: int) -> torch.Tensor:
    """Hunter's minorise-maximise steps: cheap, monotone, and good at what least squares leaves."""
    for _ in range(steps):
        lam = lam + (masses.sites / Narrow(overlap, masses, lam).marginals()).log_()
    return lam


class _Run:
    """Newton on a shrinking set of samples; what is done is written to `solution`."""

    def __init__(self, overlap: Overlap, batch: int, max_iterations: int) -> None:
        self._overlap, self._cap = overlap, max_iterations
        device = overlap.weights.device
        sets = int(overlap.part_set.max()) + 1

        def empty(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self.solution = Solution(
            lam=empty(overlap.size, batch),
            log_sets=empty(sets, batch),
            iterations=torch.zeros(batch, dtype=torch.int32, device=device),
            converged=torch.zeros(batch, dtype=torch.bool, device=device),
            residual=empty(batch),
        )

    def newton(
        self, kind: type[Narrow] | type[Wide], masses: Masses, lam: torch.Tensor, rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Solve samples `rows` from `lam`. Those that leave the reach of narrow terms come back unsolved."""
        far_rows, far_lam = [rows[:0]], [lam[:, :0]]
        certain = torch.ones_like(rows, dtype=torch.bool)
        stuck = torch.zeros_like(certain)
        length = lam.new_full((rows.shape[0],), torch.inf)
        for iteration in range(self._cap + 1):
            if rows.numel() == 0:
                break
            terms: Terms = kind(self._overlap, masses, lam)
            gradient = terms.marginals() - masses.sites
            flat = ((gradient.abs() / masses.sites).amax(0) <= GRADIENT_TOLERANCE) & (length <= STEP_TOLERANCE)
            lost = stuck | (_reach(lam) > REACH) if kind is not Wide else stuck
            far = lost & ~flat if kind is Narrow else torch.zeros_like(flat)
            stop = flat | lost
            if iteration == self._cap:
                stop[:] = True
            if bool(stop.any()):
                done = stop & ~far
                self.solution.iterations[rows[stop]] += iteration
                self._write(terms, masses, gradient, lam, rows, done, flat & certain)
                far_rows.append(rows[far])
                far_lam.append(lam[:, far])
                keep = torch.nonzero(~stop)[:, 0]
                masses, lam, rows, length, certain = (
                    masses.select(keep),
                    lam.index_select(1, keep),
                    rows[keep],
                    length[keep],
                    certain[keep],
                )
                if rows.numel() == 0:
                    break
                terms = kind(self._overlap, masses, lam)
            step, weakest = potentials(*terms.system())
            if kind is Summed:
                certain = weakest * CERTAIN >= torch.finfo(lam.dtype).eps * masses.sets.sum(0)
            length = step.amax(0) - step.amin(0)
            # The third derivative of a log-sum-exp is at most max - min of the direction times the second:
            # this damping never increases Phi, and tends to 1 as the steps get short.
            moved = lam - step * (torch.log1p(length) / length.clamp(min=1e-300))
            stuck = ~moved.isfinite().all(0)
            lam = torch.where(stuck, lam, moved)
        return torch.cat(far_rows), torch.cat(far_lam, dim=1)

    def _write(
        self,
        terms: Terms,
        masses: Masses,
        gradient: torch.Tensor,
        lam: torch.Tensor,
        rows: torch.Tensor,
        done: torch.Tensor,
        converged: torch.Tensor,
    ) -> None:
        # With Q_i = sum of q over the classes of site i, w_i e^-lam_i Q_i = 1 + g_i / w_i; hence the marginals
        # that q really has differ from W_T by the average of g_i / (w_i + g_i) over the owners of T.
        drift = gradient / (self._overlap.weights + gradient)
        out, where = self.solution, rows[done]
        out.lam[:, where] = lam[:, done]
        out.log_sets[:, where] = terms.log_sets()[:, done]
        out.converged[where] = converged[done]
        shared = terms.average(drift).abs().amax(0)
        alone = ((self._overlap.weights - masses.sites) * drift).abs().amax(0)
        out.residual[where] = torch.maximum(shared, alone)[done]
