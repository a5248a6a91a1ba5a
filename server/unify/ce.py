"""CE: marginal matching by cross-entropy (Vongkulbhisal et al., CVPR 2019), through its dual (docs/unify.md).

Lives here: from answers, or from their class-wise sums, to log-scores of all classes. Does not live here: the
dual's solution (`dual`).
"""

from __future__ import annotations

from functools import reduce

import numpy as np
import torch

from consilience.server.unify.blocks import block_rows
from consilience.server.unify.dual import Solution, solve
from consilience.server.unify.estimate import Estimate
from consilience.server.unify.linked import Linked
from consilience.server.unify.owners import Overlap, owner_sets
from consilience.server.unify.plan import Plan
from consilience.server.unify.quick import QuickCE
from consilience.server.unify.sparse import Sparse
from consilience.server.unify.terms import Masses

_LEAST_SUM = np.exp(-100.0)


class CE:
    """min over u of -sum_i w_i sum_{l in L_i} p_i(l) log qhat_i(l), qhat_i = softmax of u over L_i, q = softmax(u).

    Convex; unique up to one constant per component. At the optimum marginals match: for every class
    sum_i w_i qhat_i(l) = sum_i w_i p_i(l).
    """

    comparable = False

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._overlaps, class_row = owner_sets(plan)
        self._class_row = plan.tensor(class_row)
        self._linked = [Linked(overlap) for overlap in self._overlaps]
        self._log_weights = plan.tensor(np.log(plan.weights))[:, None]
        rows = np.flatnonzero(plan.counted)
        self._sums = Sparse(
            plan.columns[rows],
            rows,
            (plan.num_classes, plan.columns.size),
            plan.device,
            plan.weights[plan.sites[rows]],
        )
        solving = max((o.row_doubles for o in self._overlaps), default=0)
        linking = max((linked.row_doubles for linked in self._linked), default=0)
        one = len(self._overlaps) == 1 and int(plan.components.max()) == 0
        self.quick = QuickCE(plan, self._overlaps[0], self._linked[0], self._class_row) if one else None
        """A way that is faster for most samples; None where there are several components, or one site."""
        self.row_doubles = 2 * plan.columns.size + 3 * plan.num_classes + solving
        self.sum_doubles = 4 * plan.num_classes + linking
        """Doubles that one sample needs at the same time in `from_sums`, roughly; few are left to the slower way."""
        self._most_left = block_rows(None, self.row_doubles)

    def __call__(self, log_probs: torch.Tensor) -> Estimate:
        """From stacked log-probabilities (K, b)."""
        probs = log_probs.exp()
        solutions = []
        for overlap in self._overlaps:
            parts = overlap.to_parts @ probs
            # B_i is added up from shared classes only, never as 1 minus the rest: links of 1e-20 keep their
            # relative accuracy.
            solutions.append(
                solve(overlap, Masses(overlap.parts_to_sets @ parts, overlap.parts_to_sites @ parts, parts))
            )
        return self._estimate(self._sums @ probs, solutions)

    def from_sums(self, sums: torch.Tensor) -> Estimate:
        """From class-wise sums W (L, b), each component's adding up to its sites' weights."""
        sums = sums.clamp(min=float(_LEAST_SUM))
        solutions: list[Solution] = []
        impossible = torch.zeros(sums.shape[1], dtype=torch.bool, device=sums.device)
        inconsistent = torch.zeros_like(sums[0])
        for overlap, linked in zip(self._overlaps, self._linked, strict=True):
            sets = overlap.classes_to_sets @ sums
            given = overlap.weights - overlap.classes_to_singles @ sums
            # A site's shared mass is what its own classes leave over; below rounding that is nothing known.
            least = torch.finfo(sums.dtype).eps * overlap.weights
            impossible |= (given < least).any(0)
            sites = torch.maximum(given, least)
            sites = sites * (sets.sum(0) / sites.sum(0))
            solutions.append(self._solve_sums(overlap, linked, Masses(sets, sites, None)))
            inconsistent = torch.maximum(inconsistent, (sites - given).abs().amax(0))
        found = self._estimate(sums, solutions)
        return Estimate(found.scores, found.iterations, found.converged & ~impossible, found.residual + inconsistent)

    def _solve_sums(self, overlap: Overlap, linked: Linked, masses: Masses) -> Solution:
        """Solve the dual from sums: the well linked samples the faster way, the others by `solve`."""
        found = linked.solve(masses.sets, masses.sites)
        undone = torch.nonzero(~found.converged)[:, 0]
        for left in torch.split(undone, self._most_left) if undone.numel() > 0 else ():
            found.replace(left, solve(overlap, masses.select(left)))
        return found

    def _estimate(self, sums: torch.Tensor, solutions: list[Solution]) -> Estimate:
        batch, device = sums.shape[1], sums.device
        lam = self._log_weights.expand(-1, batch).clone()
        for overlap, solution in zip(self._overlaps, solutions, strict=True):
            lam[overlap.sites] = solution.lam
        # q_l = W_l / sum of e^lam over the owners of l.
        levels = torch.cat([*(s.log_sets for s in solutions), lam])
        scores = sums.log() - levels.index_select(0, self._class_row)
        return Estimate(
            scores,
            reduce(
                torch.maximum, (s.iterations for s in solutions), torch.zeros(batch, dtype=torch.int32, device=device)
            ),
            reduce(
                torch.logical_and, (s.converged for s in solutions), torch.ones(batch, dtype=torch.bool, device=device)
            ),
            reduce(
                torch.maximum, (s.residual for s in solutions), torch.zeros(batch, dtype=torch.float64, device=device)
            ),
        )
