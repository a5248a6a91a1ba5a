"""MF-LF: matrix factorisation in logit space with fixed scale: one matrix product per block.

Lives here: the closed form (Vongkulbhisal et al., CVPR 2019, MF-LF; docs/unify.md). Does not live here: MF-LV.
"""

from __future__ import annotations

import numpy as np
import torch

from consilience.server.unify.estimate import Estimate
from consilience.server.unify.plan import Plan


class MFLF:
    """min over u, c of sum_i w_i sum_{l in L_i} (z_i(l) - u_l - c_i)^2 + lambda ||u||^2, q = softmax(u).

    u = (sum_i w_i C_i + lambda I)^-1 sum_i w_i C_i z_i, C_i centring over L_i: one (L, K) matrix, made once.
    With lambda = 0 the inverse is the pseudo-inverse, of mean 0 in every component; u has mean 0 in every
    component for every lambda.
    """

    comparable = False

    def __init__(self, plan: Plan, regularisation: float) -> None:
        classes, rows = plan.num_classes, plan.columns.size
        laplacian = regularisation * np.eye(classes)
        given = np.zeros((classes, rows))
        for site, columns in enumerate(plan.class_sets):
            centring = plan.weights[site] * (np.eye(columns.size) - 1.0 / columns.size)
            laplacian[np.ix_(columns, columns)] += centring
            given[columns, plan.offsets[site] : plan.offsets[site + 1]] = centring
        # The right-hand side adds up to 0 in every component, so filling the null space with ones changes
        # nothing but makes the matrix invertible. Filled in at the size of the entries it stands among.
        for _, members in plan.groups():
            block = np.ix_(members, members)
            laplacian[block] += max(1.0, float(laplacian[members, members].mean())) / members.size
        self._matrix = plan.tensor(np.linalg.solve(laplacian, given))
        self.row_doubles = 2 * rows + 4 * classes

    def __call__(self, log_probs: torch.Tensor) -> Estimate:
        """From stacked log-probabilities (K, b)."""
        return Estimate.closed(self._matrix @ log_probs)
