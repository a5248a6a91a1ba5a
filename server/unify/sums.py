"""CE without any single site's answers.

Lives here: `unify_sums` and the checks of sums. Does not live here: the estimator (`ce`) or the aggregation.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from consilience.common.errors import UnifyError
from consilience.server.unify.across import Combine
from consilience.server.unify.answers import is_floating, to_tensor
from consilience.server.unify.blocks import MEMORY, block_rows, run_blocks
from consilience.server.unify.ce import CE
from consilience.server.unify.estimate import Estimate
from consilience.server.unify.plan import Plan, make_plan
from consilience.server.unify.result import Across, Answers, UnifiedLabels
from consilience.server.unify.sparse import Sparse
from consilience.server.unify.unifier import check_across, to_device

TOLERANCE = 1e-3
"""Sums may miss what they must add up to by this share: aggregation in fixed point rounds."""


def unify_sums(
    sums: Answers,
    class_sets: Sequence[npt.ArrayLike],
    num_classes: int | None = None,
    *,
    weights: npt.ArrayLike | None = None,
    across: Across = "centred",
    device: str | torch.device | None = None,
    block: int | None = None,
) -> UnifiedLabels:
    """CE from class-wise sums alone, as secure aggregation gives them: no single site's answer is needed.

    sums  (n, L) floating, W_l = sum of w_i p_i(l) over the sites that know l (docs/unify.md)

    The other arguments are those of `unify`. What a site shares with others is here a difference of sums:
    links not far above the rounding of fp64 are lost, and such samples come back with converged False. The
    sums themselves are taken as exact. Raises UnifyError as `Unifier` does, and where sums are not finite, are
    negative, or do not add up to the sites' weights in every component (to one part in a thousand).
    """
    check_across(across)
    if device is None and isinstance(sums, torch.Tensor):
        device = sums.device
    plan = make_plan(class_sets, num_classes, weights, to_device(device))
    reader = _Reader(plan, sums)
    estimator = CE(plan)

    def estimate(start: int, stop: int) -> Estimate:
        return estimator.from_sums(reader.read(start, stop))

    rows = block_rows(block, estimator.sum_doubles, 2 * MEMORY)  # many short operations, as in `Unifier`
    return run_blocks(plan, int(sums.shape[0]), rows, estimate, Combine(plan, across))


class _Reader:
    """Turns rows [start, stop) of the sums into a checked (L, b) block."""

    def __init__(self, plan: Plan, sums: Answers) -> None:
        if not isinstance(sums, np.ndarray | torch.Tensor) or not is_floating(sums):
            raise UnifyError("sums are not a floating NumPy array or torch tensor", hint="Use f16, f32 or f64.")
        if sums.ndim != 2 or sums.shape[1] != plan.num_classes:
            raise UnifyError(f"sums have shape {tuple(sums.shape)} instead of (n, {plan.num_classes})")
        self._sums, self._device = sums, plan.device
        count = int(plan.components.max()) + 1
        classes = np.arange(plan.num_classes)
        self._totals = Sparse(plan.components, classes, (count, plan.num_classes), plan.device)
        first = plan.components[[columns[0] for columns in plan.class_sets]]
        self._due = plan.tensor(np.bincount(first, weights=plan.weights, minlength=count))[:, None]
        # Sites with one class do not count (`Plan`), and what they added is known: their weight.
        out = ~plan.counted
        known = np.bincount(plan.columns[out], weights=plan.weights[plan.sites[out]], minlength=plan.num_classes)
        self._known = plan.tensor(known)[:, None]

    def read(self, start: int, stop: int) -> torch.Tensor:
        """(L, stop - start)."""
        block = to_tensor(self._sums[start:stop]).to(self._device).t().to(torch.float64).contiguous()
        total = self._totals @ block
        finite = block.isfinite().all(0)
        for bad, what in (
            (~finite, "values that are not finite"),
            ((block < -TOLERANCE * self._due.max()).any(0), "negative values"),
            (((total - self._due).abs() > TOLERANCE * self._due).any(0), "values that do not add up to the weights"),
        ):
            if bool(bad.any()):
                raise UnifyError(
                    f"sums hold {what} in row {start + int(bad.int().argmax())}",
                    hint="In every component they must add up to the weights of its sites.",
                )
        return block - self._known
