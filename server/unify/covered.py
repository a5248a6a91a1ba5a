"""CE with coverage: answers and the sites' "none of mine" in one likelihood (docs/unify.md).

Lives here: which sites and classes take part, from answers and coverage to log-probabilities of all classes.
Does not live here: the solution (`partly`, `centre`), reading (`answers`, `coverage`).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from consilience.common.errors import UnifyError
from consilience.server.unify.across import Combine
from consilience.server.unify.ce import CE
from consilience.server.unify.centre import LEAST, Frame
from consilience.server.unify.estimate import Estimate
from consilience.server.unify.partly import solve
from consilience.server.unify.plan import IntArray, Plan, make_plan
from consilience.server.unify.result import Across
from consilience.server.unify.sparse import Sparse

_EDGE = 1e5 * LEAST
"""A price below this share of all was held up by the floor under masses; above, the floor has changed nothing."""


class CoveredCE:
    """min over q of sum_i w_i (s_i G_i + (1 - s_i) P_i) - eps log q_other, with for every site

        P_i = - sum_l p_i(l) log(q_l / q(L_i))                                the term of plain CE,
        G_i = - sum_l c_i p_i(l) log q_l - (1 - c_i) log(1 - q(L_i))          the group choice.

    s_i in [0, 1] is the strength of a site's coverage, 0 for a site that gives none. Convex if all are 1. A component
    in which no site gives coverage has a conditional distribution by plain CE; all such components together have the
    mass that coverage leaves, shared out by the rule `across`.
    """

    def __init__(
        self, plan: Plan, pattern: tuple[bool, ...], strength: npt.NDArray[np.float64], other: float, across: Across
    ) -> None:
        """`strength` (N,) is read where `pattern` says that a site gives coverage."""
        self._plan, self._other = plan, other
        gives = np.array(pattern)
        sizes = np.array([columns.size for columns in plan.class_sets])
        component = np.array([plan.components[columns[0]] for columns in plan.class_sets])
        self._anchored = np.isin(plan.components, component[gives])
        self._open = None if self._anchored.all() else _Open(plan, self._anchored, across)
        if other > 0 and self._open is not None:
            raise UnifyError(
                f"other {other:g} needs coverage from a site of every component, and no site that is linked to class "
                f"{int(np.argmin(self._anchored))} gives any"
            )
        self._rest = other > 0 or self._open is not None
        # In a closed world a site that knows all classes says by its coverage what is known: 1.
        informed = np.isin(component, component[gives]) & (self._rest | (sizes < plan.num_classes))
        covered = np.flatnonzero(informed & gives)
        strength = np.where(gives, strength, 0.0)
        plain = np.flatnonzero(informed & (strength < 1) & (sizes > 1))
        used = np.union1d(np.union1d(covered, plain), np.flatnonzero(~self._rest & (sizes == plan.num_classes)))
        classes = np.flatnonzero(self._anchored)
        sets, set_of_class = _sets(plan, classes, [*covered.tolist(), *plain.tolist()])
        if self._rest:
            sets.append(())
        self._frame = _frame(plan, sets, covered.size, plain.size)
        self._classes, self._set_of_class = plan.tensor(classes), plan.tensor(set_of_class)
        self._covered, self._which = plan.tensor(covered), plan.tensor(np.searchsorted(np.flatnonzero(gives), covered))
        self._strength = plan.tensor(strength[covered])[:, None]
        # One class alone says nothing about ratios: its site's answer is its coverage.
        self._anyway = plan.tensor(np.where(sizes[covered] > 1, 1 - strength[covered], 0.0))[:, None]
        self._weights = plan.tensor(plan.weights[covered] * strength[covered])[:, None]
        self._plain_weights = plan.tensor(plan.weights[plain] * (1 - strength[plain]))[:, None]
        rows = np.flatnonzero(np.isin(plan.sites, used))
        self._rows, self._site_of_row = plan.tensor(rows), plan.tensor(plan.sites[rows])
        self._sums = Sparse(
            np.searchsorted(classes, plan.columns[rows]),
            np.arange(rows.size),
            (classes.size, rows.size),
            plan.device,
            plan.weights[plan.sites[rows]],
        )
        self._to_sets = Sparse(set_of_class, np.arange(classes.size), (len(sets), classes.size), plan.device)
        unknowns = 1 + covered.size + plain.size
        solving = 6 * unknowns**2 + 24 * len(sets)
        self.row_doubles = 3 * plan.columns.size + 4 * plan.num_classes + solving
        if self._open is not None:
            self.row_doubles += self._open.row_doubles

    @property
    def components(self) -> IntArray:
        """(L,) as in `Plan`, with the components as one whose mass towards one another coverage determines."""
        number = np.where(self._anchored, -1, self._plan.components)
        if np.unique(number).size <= 2:
            number = np.zeros_like(number)
        _, first, place = np.unique(number, return_index=True, return_inverse=True)
        return np.argsort(np.argsort(first))[place].astype(np.int64)

    def __call__(self, log_probs: torch.Tensor, coverage: torch.Tensor) -> Estimate:
        """From stacked log-probabilities (K, b) and coverage (m, b) of the sites that give it."""
        sums, masses, denied, plain = self.masses(log_probs, coverage)
        found = solve(self._frame, masses, denied, plain)
        q, price = found.point.q, found.point.s
        # A mass below the floor is what its price says, unless the price itself hangs on the floor.
        free = price > _EDGE * (masses.sum(0) + denied.sum(0))
        q = torch.where(free, masses / price, q)
        scores = sums.new_empty((self._plan.num_classes, sums.shape[1]))
        scores[self._classes] = sums.log() + (q.log() - masses.log()).index_select(0, self._set_of_class)
        estimate = Estimate(scores, found.steps, found.converged, found.residual)
        if self._open is not None:
            return self._open.fill(estimate, log_probs, q[-1])
        return replace(estimate, other=q[-1]) if self._rest else estimate

    def masses(
        self, log_probs: torch.Tensor, coverage: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """W of the classes, and what `partly.solve` takes: A (S, b), d (n, b), weights (m, 1)."""
        coverage = coverage.index_select(0, self._which)
        share = coverage.new_ones((self._plan.num_sites, coverage.shape[1]))
        share[self._covered] = self._anyway + self._strength * coverage
        answered = log_probs.index_select(0, self._rows).exp_()
        sums = self._sums @ answered.mul_(share.index_select(0, self._site_of_row))
        masses = self._to_sets @ sums
        if self._rest:
            masses[-1] = self._other
        return sums, masses, self._weights * (1.0 - coverage), self._plain_weights


class _Open:
    """The components in which no site gives coverage: plain CE, and the rule between them."""

    def __init__(self, plan: Plan, anchored: npt.NDArray[np.bool_], across: Across) -> None:
        classes = np.flatnonzero(~anchored)
        sites = [site for site, columns in enumerate(plan.class_sets) if not anchored[columns[0]]]
        sets = [np.searchsorted(classes, plan.class_sets[site]) for site in sites]
        part = make_plan(sets, classes.size, plan.weights[sites], plan.device)
        self._classes = plan.tensor(classes)
        self._rows = plan.tensor(np.flatnonzero(np.isin(plan.sites, sites)))
        self._estimator, self._combine = CE(part), Combine(part, across)
        self.row_doubles = self._estimator.row_doubles

    def fill(self, estimate: Estimate, log_probs: torch.Tensor, mass: torch.Tensor) -> Estimate:
        """The estimate with the scores of these classes, which have the mass (b,) together."""
        own = self._estimator(log_probs.index_select(0, self._rows))
        estimate.scores[self._classes] = self._combine(own.scores).log() + mass.log()
        return Estimate(
            estimate.scores,
            torch.maximum(estimate.iterations, own.iterations),
            estimate.converged & own.converged,
            torch.maximum(estimate.residual, own.residual),
        )


def _sets(plan: Plan, classes: IntArray, sites: list[int]) -> tuple[list[tuple[int, ...]], IntArray]:
    """The owner sets of `classes`, as places in `sites`, and each class's number among them."""
    owners: dict[int, list[int]] = {int(c): [] for c in classes}
    for place, site in enumerate(sites):
        for column in plan.class_sets[site]:
            owners[int(column)].append(place)
    numbers: dict[tuple[int, ...], int] = {}
    of_class = [numbers.setdefault(tuple(owners[int(c)]), len(numbers)) for c in classes]
    return list(numbers), np.array(of_class, dtype=np.int64)


def _frame(plan: Plan, sets: list[tuple[int, ...]], covered: int, plain: int) -> Frame:
    size = 1 + covered + plain
    inside = np.zeros((size - 1, len(sets)))
    rows, columns = [], []
    for number, owners in enumerate(sets):
        inside[list(owners), number] = 1.0
        ends = np.array([0, *(1 + i for i in owners)])
        rows.append((ends[:, None] * size + ends).ravel())
        columns.append(np.full(ends.size**2, number))
    links = Sparse(np.concatenate(rows), np.concatenate(columns), (size * size, len(sets)), plan.device)
    return Frame(plan.tensor(inside), plan.tensor(1.0 - inside[:covered]), links, covered)
