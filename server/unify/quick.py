"""CE at the speed of reading: masses in fp32, the dual in fp64, for the samples of which that is known to be enough.

Lives here: one pass over a block's probabilities, and labels from it. Does not live here: the dual's solution
(`linked`), nor the samples that are not enough so: whoever calls this gives those to `ce`.
"""

from __future__ import annotations

import threading

import numpy as np
import torch

from consilience.server.unify.estimate import Estimate
from consilience.server.unify.linked import Linked
from consilience.server.unify.owners import Overlap
from consilience.server.unify.plan import Plan

LOWEST = -87.0
"""A class less likely than e^-87 of the likeliest of its row counts as that: below are no normal numbers of fp32."""

REACH = 40.0
"""How far factors of classes may lie apart: e^-40 of fp32's range is left for the masses."""


class QuickCE:
    """For one component with two sites or more. `class_row` is that of `owner_sets`."""

    def __init__(self, plan: Plan, overlap: Overlap, linked: Linked, class_row: torch.Tensor) -> None:
        self._plan, self._overlap, self._class_row = plan, overlap, class_row
        # What does not count goes to one row more, which is not looked at: cheaper than to pick out the rest.
        parts, shared = overlap.part_set.numel(), overlap.part_rows
        self._parts = plan.tensor(np.where(shared >= 0, shared, parts))
        self._columns = plan.tensor(np.where(plan.counted, plan.columns, plan.num_classes))
        self._log_weights = plan.tensor(np.log(plan.weights))[:, None]
        self._linked, self._local = linked, threading.local()

    @property
    def row_doubles(self) -> int:
        """Doubles that one sample needs at the same time, roughly."""
        answers = (self._plan.columns.size + self._plan.num_classes) // 2
        return answers + 2 * self._overlap.part_set.numel() + self._linked.row_doubles

    def buffer(self, name: str, rows: int, batch: int) -> torch.Tensor:
        """Return (rows, batch) fp32 of the thread's own, used again: fresh memory costs more than the work."""
        held: torch.Tensor | None = getattr(self._local, name, None)
        if held is None or held.numel() < rows * batch:
            held = torch.empty(rows * batch, dtype=torch.float32, device=self._plan.device)
            setattr(self._local, name, held)
        return held[: rows * batch].view(rows, batch)

    def __call__(self, probs: torch.Tensor) -> Estimate:
        """From stacked w_i p_i (K, b) fp32. Where `converged` is not True nothing is said about the sample."""
        batch, overlap = probs.shape[1], self._overlap
        sums = self.buffer("sums", self._plan.num_classes + 1, batch).zero_().index_add_(0, self._columns, probs)[:-1]
        held = self.buffer("parts", overlap.part_set.numel() + 1, batch).zero_().index_add_(0, self._parts, probs)
        parts = held[:-1].to(torch.float64)
        # Added up from the same parts, so that both sides have one total.
        sets = parts.new_zeros((overlap.set_count, batch)).index_add_(0, overlap.part_set, parts)
        sites = parts.new_zeros((overlap.size, batch)).index_add_(0, overlap.part_site, parts)
        found = self._linked.solve(sets, sites)
        lam = self._log_weights.expand(-1, batch).clone()
        lam[overlap.sites] = found.lam
        levels = torch.cat([found.log_sets, lam])
        # q_l = W_l / sum of e^lam over the owners of l, in units in which the largest factor is 1.
        converged = found.converged & (levels.amax(0) - levels.amin(0) <= REACH)
        factors = (levels.amin(0) - levels).exp_().to(torch.float32)
        labels = sums.mul_(factors.index_select(0, self._class_row))
        labels.div_(labels.sum(0))
        return Estimate(labels, found.iterations, converged, found.residual, labels=labels)
