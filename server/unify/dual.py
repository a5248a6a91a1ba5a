"""CE in N numbers per sample: damped Newton on the dual, for a block of samples at once.

Lives here: the start, the iteration, and what "converged" means. Does not live here: the terms at one point
(`terms`), the linear system (`elimination`), labels (`ce`). The derivation is in docs/unify.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from consilience.server.unify.elimination import potentials
from consilience.server.unify.owners import Overlap
from consilience.server.unify.terms import REACH, Masses, Narrow, Summed, Terms, Wide

GRADIENT_TOLERANCE = 1e-8
"""Converged: |g_i| <= this times B_i for every site, and the last Newton step was short."""

STEP_TOLERANCE = 1e-5
"""max - min of the last Newton step. After a step of length R the distance left is of order R^2 in every
coordinate, whatever the links weigh, so what is left is about 1e-10."""

CERTAIN = 1e-7
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

    def replace(self, rows: torch.Tensor, by: Solution) -> None:
        """Take samples `rows` (m,) from another solution."""
        self.lam[:, rows], self.log_sets[:, rows], self.iterations[rows] = by.lam, by.log_sets, by.iterations
        self.converged[rows], self.residual[rows] = by.converged, by.residual


def solve(overlap: Overlap, masses: Masses, max_iterations: int = MAX_ITERATIONS) -> Solution:
    """Minimise Phi(lam) = sum_T A_T log sum_{i in T} e^lam_i - sum_i B_i lam_i for every sample of a block."""
    if masses.parts is None:
        lam = _mm(overlap, masses, torch.zeros_like(masses.sites), _MM_STEPS_FROM_ZERO)
        return _newton(Summed, overlap, masses, lam, max_iterations)[0]
    lam = _least_squares(overlap, masses, masses.parts)
    lam = torch.where(_reach(lam) <= REACH, _mm(overlap, masses, lam, _MM_STEPS), lam)
    solution, left = _newton(Narrow, overlap, masses, lam, max_iterations)
    if left.numel() > 0:
        again, _ = _newton(Wide, overlap, masses.select(left), solution.lam[:, left], max_iterations)
        solution.replace(left, replace(again, iterations=solution.iterations[left] + again.iterations))
    return solution


def _reach(lam: torch.Tensor) -> torch.Tensor:
    return lam.amax(0) - lam.amin(0)


def _least_squares(overlap: Overlap, masses: Masses, parts: torch.Tensor) -> torch.Tensor:
    """A start that is exact for consistent teachers: lam_i - lam_j = log(a_Ti / a_Tj) for every pair, weighted."""
    n = overlap.size
    _, one, two = overlap.pairs
    mine, theirs = parts.index_select(0, one), parts.index_select(0, two)
    weight = theirs.div_(mine + theirs).mul_(mine)
    log_parts = parts.log()
    links = (overlap.pairs_to_links @ weight).view(n, n, -1)
    gap = log_parts.index_select(0, one).sub_(log_parts.index_select(0, two)).mul_(weight)
    return potentials(links, (overlap.pairs_to_flows @ gap).view(n, n, -1))[0]


def _mm(overlap: Overlap, masses: Masses, lam: torch.Tensor, steps: int) -> torch.Tensor:
    """Hunter's minorise-maximise steps: cheap, monotone, and good at what least squares leaves."""
    for _ in range(steps):
        lam = lam + (masses.sites / Narrow(overlap, masses, lam).marginals()).log_()
    return lam


def _newton(
    kind: type[Narrow | Wide], overlap: Overlap, masses: Masses, lam: torch.Tensor, max_iterations: int
) -> tuple[Solution, torch.Tensor]:
    """Newton from `lam`; with it the samples that narrow terms could not solve."""
    everything, batch = masses, lam.shape[1]
    best = lam.clone()
    iterations = torch.zeros(batch, dtype=torch.int32, device=lam.device)
    converged = torch.zeros(batch, dtype=torch.bool, device=lam.device)
    rows = torch.arange(batch, device=lam.device)
    active = torch.ones_like(converged)
    certain, stuck = active, converged
    length = torch.full_like(lam[0], torch.inf)
    for iteration in range(max_iterations + 1):
        terms: Terms = kind(overlap, masses, lam)
        gradient = terms.marginals() - masses.sites
        flat = ((gradient.abs() / masses.sites).amax(0) <= GRADIENT_TOLERANCE) & (length <= STEP_TOLERANCE)
        lost = stuck if kind is Wide else stuck | (_reach(lam) > REACH)
        stop = active & (flat | lost)
        if iteration == max_iterations:
            stop = active
        if bool(stop.any()):
            where = rows[stop]
            best[:, where] = lam[:, stop]
            iterations[where] = iteration
            converged[where] = (flat & certain)[stop]
            active = active & ~stop
            remaining = torch.nonzero(active)[:, 0]
            if remaining.numel() == 0:
                break
            # Leaving samples out copies the rest: worth it once half of them are done. Until then the ones
            # that are done are carried along, unread.
            if 2 * remaining.numel() <= active.numel():
                masses, lam, rows, length = (
                    masses.select(remaining),
                    lam[:, remaining],
                    rows[remaining],
                    length[remaining],
                )
                active, certain = active[remaining], certain[remaining]
                terms = kind(overlap, masses, lam)
        step, weakest = potentials(*terms.system())
        if kind is Summed:
            certain = weakest * CERTAIN >= torch.finfo(lam.dtype).eps * overlap.weights.sum()
        length = step.amax(0) - step.amin(0)
        # The third derivative of a log-sum-exp is at most max - min of the direction times the second: this
        # damping never increases Phi, and tends to 1 as the steps get short.
        moved = lam - step * (torch.log1p(length) / length.clamp(min=1e-300))
        stuck = ~moved.isfinite().all(0)
        lam = torch.where(stuck, lam, moved)
    log_sets, residual = _outcome(kind(overlap, everything, best), overlap, everything)
    left = torch.nonzero(~converged)[:, 0] if kind is Narrow else rows[:0]
    return Solution(best, log_sets, iterations, converged, residual), left


def _outcome(terms: Terms, overlap: Overlap, masses: Masses) -> tuple[torch.Tensor, torch.Tensor]:
    """log_sets (S, b) and the residual (b,)."""
    # With Q_i the mass of site i's classes under q, w_i e^-lam_i Q_i = 1 + g_i / w_i; hence the marginals that q
    # really has differ from W_T by the average of g_i / (w_i + g_i) over the owners of T.
    gradient = terms.marginals() - masses.sites
    drift = gradient / (overlap.weights + gradient)
    shared = terms.average(drift).abs().amax(0)
    alone = ((overlap.weights - masses.sites) * drift).abs().amax(0)
    return terms.log_sets(), torch.maximum(shared, alone)
