"""The declared rule that shares out the mass between components.

Lives here: log-scores that are determined up to one constant per component -> probabilities. Does not live
here: how scores come about. Inside a component every rule gives the same; between components the answers say
nothing, so the rule alone decides (docs/unify.md).
"""

from __future__ import annotations

import torch

from consilience.server.unify.plan import Plan
from consilience.server.unify.result import Across
from consilience.server.unify.sparse import Sparse, group_max


class Combine:
    """scores (L, b) -> probabilities (L, b).

    centred       every component's log-scores are shifted to mean 0: concatenated centred logits
    equal         every component gets the same mass
    proportional  every component gets mass in proportion to its number of classes
    None          scores are already comparable across components
    """

    def __init__(self, plan: Plan, rule: Across | None) -> None:
        sizes = torch.bincount(plan.tensor(plan.components)).to(torch.float64)
        self._rule = None if sizes.numel() == 1 else rule
        self._component = plan.tensor(plan.components)
        self._sizes = sizes[:, None]
        self._sum = Sparse(plan.components, range(plan.num_classes), (sizes.numel(), plan.num_classes), plan.device)

    def __call__(self, scores: torch.Tensor) -> torch.Tensor:
        """Probabilities, each column adding up to 1."""
        if self._rule is None:
            return torch.softmax(scores, 0)
        count = self._sizes.shape[0]
        top = group_max(scores, self._component, count)
        e = (scores - top.index_select(0, self._component)).exp_()
        total = self._sum @ e
        if self._rule == "centred":
            log_mass = total.log() + top - (self._sum @ scores) / self._sizes
        elif self._rule == "proportional":
            log_mass = self._sizes.log().expand_as(total)
        else:
            log_mass = torch.zeros_like(total)
        factor = torch.softmax(log_mass, 0) / total
        return e * factor.index_select(0, self._component)
