"""The dual of CE at one point: its gradient, and the links and flows of its Newton step.

Lives here: two ways to evaluate the same thing, `Narrow` (shared exponentials; nearly always) and `Wide` (one
log-sum-exp per owner set; for samples whose sites lie further apart than fp64 reaches), and `Summed` (from
class-wise sums alone). Does not live here: the iteration (`dual`).

The point is lam_i = log w_i + log x_i, (n, b); pi_Ti = e^lam_i / sum of e^lam over T is site i's share in the
owner set T. With the parts a_Ti and A_T = sum_i a_Ti,
    gradient  g_i = sum_T A_T pi_Ti - B_i,   B_i = sum_T a_Ti
    links     h_ij = sum_T A_T pi_Ti pi_Tj            (minus the Hessian's entries off the diagonal)
    flows     f_ij = sum_T a_Tj pi_Ti - a_Ti pi_Tj    (g_i = sum_j f_ij)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from consilience.server.unify.owners import Overlap
from consilience.server.unify.sparse import group_max

REACH = 230.0
"""Narrow terms are exact while max lam - min lam stays below this: 1 / e^(2 * 230) is still a normal number."""

_LOWEST = -690.0  # beyond the reach, where results are only good for seeing that: keeps sums positive
_DEEPEST = -500.0  # a share below e^-500 changes nothing, but as a zero it would cut a link


@dataclass(frozen=True)
class Masses:
    """What the answers of a block say to the dual of one component.

    sets   (S, b) A_T;  sites (n, b) B_i;  parts (I, b) a_Ti, or None where only sums are known
    """

    sets: torch.Tensor
    sites: torch.Tensor
    parts: torch.Tensor | None

    def select(self, rows: torch.Tensor) -> Masses:
        """The same for some samples of the block."""
        parts = None if self.parts is None else self.parts.index_select(1, rows)
        return Masses(self.sets.index_select(1, rows), self.sites.index_select(1, rows), parts)


class Terms(Protocol):
    """The dual at one point."""

    def marginals(self) -> torch.Tensor:
        """(n, b) sum_T A_T pi_Ti."""
        ...

    def log_sets(self) -> torch.Tensor:
        """(S, b) log of the sum of e^lam over T."""
        ...

    def average(self, values: torch.Tensor) -> torch.Tensor:
        """(S, b) A_T sum_i pi_Ti values_i, for values (n, b)."""
        ...

    def system(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Links and flows, (n, n, b) each."""
        ...


class Narrow:
    """With one exponential per site."""

    def __init__(self, overlap: Overlap, masses: Masses, lam: torch.Tensor) -> None:
        self._overlap, self._masses = overlap, masses
        self._top = lam.amax(0)
        self._e = (lam - self._top).clamp_(min=_LOWEST).exp_()
        self._sums = overlap.sites_to_sets @ self._e
        self._ratio = masses.sets / self._sums

    def marginals(self) -> torch.Tensor:
        """(n, b)."""
        return self._e * (self._overlap.sets_to_sites @ self._ratio)

    def log_sets(self) -> torch.Tensor:
        """(S, b)."""
        return self._sums.log() + self._top

    def average(self, values: torch.Tensor) -> torch.Tensor:
        """(S, b)."""
        return self._ratio * (self._overlap.sites_to_sets @ (self._e * values))

    def links(self) -> torch.Tensor:
        """(n, n, b)."""
        n = self._overlap.size
        mass = (self._overlap.sets_to_links @ (self._ratio / self._sums)).view(n, n, -1)
        return mass.mul_(self._e[:, None]).mul_(self._e[None])

    def system(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Links and flows."""
        assert self._masses.parts is not None
        n = self._overlap.size
        scaled = self._masses.parts / self._sums.index_select(0, self._overlap.part_set)
        given = (self._overlap.parts_to_links @ scaled).view(n, n, -1).mul_(self._e[None])
        return self.links(), given.transpose(0, 1) - given


class Summed(Narrow):
    """Narrow, with the gradient routed through site 0: without the parts no flow is known better than that."""

    def system(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Links and flows."""
        gradient = self.marginals() - self._masses.sites
        links = self.links()
        flows = torch.zeros_like(links)
        flows[:, 0] = gradient
        flows[0] = -gradient
        flows[0, 0] = 0.0
        return links, flows


class Wide:
    """With one maximum per owner set; several times dearer."""

    def __init__(self, overlap: Overlap, masses: Masses, lam: torch.Tensor) -> None:
        self._overlap, self._masses = overlap, masses
        sets = masses.sets.shape[0]
        of_part = lam.index_select(0, overlap.part_site)
        self._top = group_max(of_part, overlap.part_set, sets)
        e = (of_part - self._top.index_select(0, overlap.part_set)).clamp_(min=_DEEPEST).exp_()
        self._sums = overlap.parts_to_sets @ e
        self._share = e / self._sums.index_select(0, overlap.part_set)

    def marginals(self) -> torch.Tensor:
        """(n, b)."""
        return self._overlap.parts_to_sites @ (self._share * self._masses.sets.index_select(0, self._overlap.part_set))

    def log_sets(self) -> torch.Tensor:
        """(S, b)."""
        return self._sums.log() + self._top

    def average(self, values: torch.Tensor) -> torch.Tensor:
        """(S, b)."""
        of_part = values.index_select(0, self._overlap.part_site)
        return self._masses.sets * (self._overlap.parts_to_sets @ (self._share * of_part))

    def system(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Links and flows."""
        assert self._masses.parts is not None
        n = self._overlap.size
        number, one, two = self._overlap.pairs
        share_one, share_two = self._share.index_select(0, one), self._share.index_select(0, two)
        flow = self._masses.parts.index_select(0, two) * share_one
        flow -= self._masses.parts.index_select(0, one) * share_two
        link = share_one.mul_(share_two).mul_(self._masses.sets.index_select(0, number))
        return (
            (self._overlap.pairs_to_links @ link).view(n, n, -1),
            (self._overlap.pairs_to_flows @ flow).view(n, n, -1),
        )
