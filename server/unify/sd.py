"""Standard distillation extended naively: the zero-padded average (Vongkulbhisal et al., CVPR 2019, baseline)."""

from __future__ import annotations

import numpy as np
import torch

from consilience.server.unify.estimate import Estimate
from consilience.server.unify.plan import Plan
from consilience.server.unify.sparse import Sparse


class SD:
    """q(l) = sum of w_i p_i(l) over the sites that know l, over the sum of all w_i.

    Every site injects the mass w_i whether or not the sample is one of its own. Its masses of components are
    part of the definition: the rule across components does not apply. With coverage, site i injects w_i c_i
    instead: a mixture of the sites, each by its coverage.
    """

    comparable = True

    def __init__(self, plan: Plan) -> None:
        rows = plan.columns.size
        self._sums = Sparse(
            plan.columns, np.arange(rows), (plan.num_classes, rows), plan.device, plan.weights[plan.sites]
        )
        self._site_of_row = plan.tensor(plan.sites)
        self.row_doubles = 3 * rows + 3 * plan.num_classes

    def __call__(self, log_probs: torch.Tensor) -> Estimate:
        """From stacked log-probabilities (K, b)."""
        return Estimate.closed((self._sums @ log_probs.exp()).log_())

    def mixture(self, log_probs: torch.Tensor, coverage: torch.Tensor) -> Estimate:
        """From stacked log-probabilities (K, b) and the coverage (N, b) of every site."""
        return self(log_probs + coverage.log().index_select(0, self._site_of_row))
