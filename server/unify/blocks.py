"""The loop over blocks of samples: it bounds memory, whatever n is.

Lives here: the size of a block and the assembly of `UnifiedLabels`. Does not live here: what a block computes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from consilience.common.errors import UnifyError
from consilience.server.unify.across import Combine
from consilience.server.unify.estimate import Estimate
from consilience.server.unify.plan import Plan
from consilience.server.unify.result import UnifiedLabels

_MEMORY = 32 * 2**20  # bytes of intermediate results per block: near the last-level cache works best
_MOST_ROWS = 4096


def block_rows(block: int | None, row_doubles: int) -> int:
    """Rows per block: as asked, or as many as fit. UnifyError if less than 1."""
    if block is None:
        return max(1, min(_MOST_ROWS, _MEMORY // (8 * row_doubles)))
    if block < 1:
        raise UnifyError(f"block {block} is less than 1")
    return int(block)


def run_blocks(
    plan: Plan, n: int, block: int, estimate: Callable[[int, int], Estimate], combine: Combine
) -> UnifiedLabels:
    """Estimate rows [start, stop) block by block, and combine components."""
    probs = np.empty((n, plan.num_classes), dtype=np.float32)
    iterations = np.empty(n, dtype=np.int32)
    converged = np.empty(n, dtype=np.bool_)
    residual = np.empty(n, dtype=np.float64)
    for start in range(0, n, block):
        rows = slice(start, min(start + block, n))
        found = estimate(rows.start, rows.stop)
        torch.from_numpy(probs[rows]).copy_(combine(found.scores).t())
        iterations[rows] = found.iterations.cpu().numpy()
        converged[rows] = found.converged.cpu().numpy()
        residual[rows] = found.residual.cpu().numpy()
    return UnifiedLabels(probs, plan.components.copy(), iterations, converged, residual)
