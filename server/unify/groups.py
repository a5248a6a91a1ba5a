"""CE with answers on groups of classes: expectation-maximisation around the solver for single classes (docs/unify.md).

Lives here: `GroupUnifier`, the split of groups by the labels, the iteration and when it ends. Does not live here: CE
itself (`ce`, `covered`), which sees answers on single classes only.

With r_l = q_l / q(g), sums over l in g: -log q(g) <= -sum r_l log(q_l / r_l) for all shares r, with equality for these.
So CE of answers p_i(g) r_l lies above the objective and touches it at q: its minimum is no worse than q.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from consilience.common.errors import UnifyError
from consilience.server.unify.across import Combine
from consilience.server.unify.answers import FLOOR, Reader
from consilience.server.unify.blocks import block_rows, run_blocks
from consilience.server.unify.ce import CE
from consilience.server.unify.coverage import STRENGTH, Coverage, check_coverage, read_coverage
from consilience.server.unify.covered import CoveredCE
from consilience.server.unify.estimate import Estimate
from consilience.server.unify.plan import IntArray, Plan, make_plan
from consilience.server.unify.result import Across, Answers, UnifiedLabels
from consilience.server.unify.sparse import Sparse, group_max
from consilience.server.unify.unifier import check_across, check_other, check_strength, to_device

STEP_TOLERANCE = 1e-9
"""Converged: one more split and solution moves no class's probability by more than this."""

MOST_SOLUTIONS = 3000

Solver = Callable[[torch.Tensor, torch.Tensor], Estimate]
"""From split answers (K, b) and the samples (b,) of the block that they are about."""


class GroupUnifier:
    """Prepared once for given sites and options, then called for as many blocks of answers as there are.

    class_sets   per site one entry for each of its answers: a class index, or a sequence of the class indices of a
                 group; no two entries of a site share a class
    num_classes, weights, across, strength, other, device, block
                 as for `Unifier`; the method is "ce"

    Classes that all sites know in the same groups get equal shares. Raises UnifyError where any of these is not as
    said, and for a site whose only answer is on a group.
    """

    def __init__(
        self,
        class_sets: Sequence[Sequence[int | Sequence[int]]],
        num_classes: int | None = None,
        *,
        weights: npt.ArrayLike | None = None,
        across: Across = "centred",
        strength: npt.ArrayLike = STRENGTH,
        other: float = 0.0,
        device: str | torch.device | None = None,
        block: int | None = None,
    ) -> None:
        check_across(across)
        options = [_options(site, entries) for site, entries in enumerate(class_sets)]
        flat = [np.concatenate(held) if held else np.empty(0, np.int64) for held in options]
        plan = make_plan(flat, num_classes, weights, to_device(device))
        counts = np.array([len(held) for held in options])
        ends = np.cumsum(counts)
        # To the reader each answer is of a class of its own.
        answers = [np.arange(end - count, end) for end, count in zip(ends, counts, strict=True)]
        self._reader = Reader(make_plan(answers, None, None, plan.device), 1.0, None)
        self._plan, self._other = plan, check_other(other)
        self._across: Across = across
        self._strength = check_strength(strength, plan.num_sites)
        self._split = Split(plan, np.array([classes.size for held in options for classes in held]))
        self._asked_block = block
        self._plain = CE(plan)
        self._covered: dict[tuple[bool, ...], CoveredCE] = {}
        self.block = block_rows(block, self._row_doubles(self._plain))

    @property
    def components(self) -> IntArray:
        """(L,) the component of each class, by the class sets alone."""
        return self._plan.components.copy()

    def __call__(
        self,
        log_probs: Sequence[Answers],
        *,
        coverage: Coverage | None = None,
        first_row: int = 0,
        alone: bool = False,
    ) -> UnifiedLabels:
        """Unify n samples.

        log_probs  one (n, len(class_sets[i])) floating array or tensor per site, as for `Unifier`
        coverage   (n,) floating per site or None, its estimate of P(class of x is in one of my groups or classes)
        first_row  added to row numbers in messages, for callers who hold a part of a larger whole
        alone      work in the calling thread only, for callers who call from several

        `iterations` tells how often CE was solved, `residual` the largest change of a class's probability in the last
        step, or what is left of the solution in it if that is more. Raises UnifyError as `Unifier` does.
        """
        n = self._reader.check(log_probs)
        pattern = check_coverage(coverage, self._plan.num_sites, n)
        plan = self._plan
        if coverage is None or not any(pattern):
            if self._other > 0:
                raise UnifyError(f"other {self._other:g} needs coverage, and no site gives any")

            def plain(start: int, stop: int) -> Estimate:
                told = self._reader.read(log_probs, start, stop, first_row)
                return self._split.maximise(told, lambda split, _: self._plain(split), fast=True)

            return run_blocks(plan, n, self.block, plain, Combine(plan, self._across), alone=alone)
        if pattern not in self._covered:
            self._covered[pattern] = CoveredCE(plan, pattern, self._strength, self._other, self._across)
        solver = self._covered[pattern]

        def covered(start: int, stop: int) -> Estimate:
            known = read_coverage(coverage, start, stop, first_row, plan.device)
            told = self._reader.read(log_probs, start, stop, first_row)
            return self._split.maximise(told, lambda split, rows: solver(split, known[:, rows]), fast=False)

        block = block_rows(self._asked_block, self._row_doubles(solver))
        labels = run_blocks(plan, n, block, covered, Combine(plan, None), alone=alone)
        return replace(labels, components=solver.components.copy())

    def _row_doubles(self, solver: CE | CoveredCE) -> int:
        return solver.row_doubles + 5 * self._plan.columns.size + 6 * self._plan.num_classes


class Split:
    """The groups of all sites, and the iteration over a block.

    `sizes` (answers,): classes of each answer, in the order of the rows of `plan`.
    """

    def __init__(self, plan: Plan, sizes: IntArray) -> None:
        self._plan, self._answers = plan, sizes.size
        answer_of_row = np.repeat(np.arange(sizes.size), sizes)
        self._answer = plan.tensor(answer_of_row)
        self._columns = plan.tensor(plan.columns)
        self._even = plan.tensor(-np.log(sizes[answer_of_row]))[:, None]
        rows = np.arange(plan.columns.size)
        self._to_answers = Sparse(answer_of_row, rows, (sizes.size, rows.size), plan.device)
        self._to_sites = Sparse(plan.sites, rows, (plan.num_sites, rows.size), plan.device)
        self._site = plan.tensor(plan.sites)
        self._weights = plan.tensor(plan.weights)[:, None]
        first = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        self._site_of_answer = plan.tensor(plan.sites[first])
        voting = np.bincount(plan.sites[first], minlength=plan.num_sites) > 1
        self._voting = plan.tensor(voting.astype(np.float64))[:, None]
        self._share = Combine(plan, "equal")
        count = int(plan.components.max()) + 1
        self._component = plan.tensor(plan.components)
        self._to_components = Sparse(
            plan.components, np.arange(plan.num_classes), (count, plan.num_classes), plan.device
        )

    def even(self, told: torch.Tensor) -> torch.Tensor:
        """Split answers (answers, b) evenly: (K, b)."""
        return told.index_select(0, self._answer) + self._even

    def by(self, told: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Split answers (answers, b) as log-scores (L, b) say: (K, b)."""
        own = scores.index_select(0, self._columns)
        shares = own - self._log_sum(own, self._answer, self._answers, self._to_answers).index_select(0, self._answer)
        # A class that its group all but denies keeps a floor, as one that a site denies does (`answers`).
        return (told.index_select(0, self._answer) + shares).clamp_(min=FLOOR)

    def objective(self, told: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """sum_i w_i (log q(L_i) - sum_g p_i(g) log q(g)) (b,), which plain CE with groups minimises."""
        own = scores.index_select(0, self._columns)
        groups = self._log_sum(own, self._answer, self._answers, self._to_answers)
        whole = self._log_sum(own, self._site, self._plan.num_sites, self._to_sites)
        terms = told.exp() * (whole.index_select(0, self._site_of_answer) - groups)
        return (terms * (self._weights * self._voting).index_select(0, self._site_of_answer)).sum(0)

    def maximise(self, told: torch.Tensor, solver: Solver, *, fast: bool, most: int = MOST_SOLUTIONS) -> Estimate:
        """Split, solve, and so on, for answers (answers, b), until labels stand still or after `most` solutions.

        `fast`: try, after two steps, the one that they point to (squared extrapolation, Varadhan and Roland 2008), and
        take it where the objective of plain CE is no worse for it. Every sample goes its own way, whatever the block.
        """
        batch = told.shape[1]
        rows = torch.arange(batch, device=told.device)
        found = solver(self.even(told), rows)
        out = replace(found, iterations=torch.ones_like(found.iterations), converged=torch.zeros_like(found.converged))
        scores, used = found.scores, 1
        while True:
            step = solver(self.by(told, scores), rows)
            used += 1
            moved = self._moved(scores, step)
            finished = (moved <= STEP_TOLERANCE) & step.converged
            stop = finished if used < most else torch.ones_like(finished)
            if bool(stop.any()):
                self._keep(out, step, rows, stop, finished, used, moved)
                left = torch.nonzero(~stop)[:, 0]
                if left.numel() == 0:
                    return out
                rows, told, scores = rows[left], told[:, left], scores[:, left]
                step = replace(step, scores=step.scores[:, left])
            if not fast:
                scores = step.scores
                continue
            second = solver(self.by(told, step.scores), rows).scores
            ahead = solver(self.by(told, self._ahead(scores, step.scores, second)), rows).scores
            used += 2
            better = self.objective(told, ahead) <= self.objective(told, second)
            scores = torch.where(better, ahead, second)

    def _ahead(self, zero: torch.Tensor, one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
        """Where steps from `zero` to `one` to `two` (L, b) point to."""
        weights = self._share(two)
        first = self._centred(one - zero, weights)
        bend = self._centred(two - one, weights) - first
        length = (weights * first**2).sum(0).sqrt() / (weights * bend**2).sum(0).sqrt().clamp(min=1e-150)
        length = length.clamp(1.0, 1e4)
        return zero + 2 * length * first + length**2 * bend

    def _centred(self, change: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Changes of log-scores (L, b), without the constant of each component."""
        mean = (self._to_components @ (change * weights)) / (self._to_components @ weights)
        return change - mean.index_select(0, self._component)

    def _moved(self, before: torch.Tensor, step: Estimate) -> torch.Tensor:
        """(b,) the largest change of a class's probability, each component taken by itself."""
        return (self._share(step.scores) - self._share(before)).abs().amax(0)

    def _keep(
        self,
        out: Estimate,
        step: Estimate,
        rows: torch.Tensor,
        stop: torch.Tensor,
        finished: torch.Tensor,
        used: int,
        moved: torch.Tensor,
    ) -> None:
        where = rows[stop]
        out.scores[:, where], out.converged[where], out.iterations[where] = step.scores[:, stop], finished[stop], used
        out.residual[where] = torch.maximum(step.residual, moved)[stop]
        if out.other is not None and step.other is not None:
            out.other[where] = step.other[stop]

    @staticmethod
    def _log_sum(own: torch.Tensor, group: torch.Tensor, groups: int, sums: Sparse) -> torch.Tensor:
        """(groups, b) log of the sum of e^own (K, b) over the rows of each group."""
        top = group_max(own, group, groups)
        return (sums @ (own - top.index_select(0, group)).exp_()).log_() + top


def _options(site: int, entries: Sequence[int | Sequence[int]]) -> list[IntArray]:
    """Each entry as an array of class indices. UnifyError where one is empty, not whole numbers, or stands alone."""
    held = []
    for place, entry in enumerate(entries):
        array = np.atleast_1d(np.asarray(entry))
        if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iu":
            raise UnifyError(
                f"entry {place} of the class set of site {site} is neither a class index nor a group of them",
                hint="Give whole numbers, or sequences of at least one.",
            )
        held.append(array.astype(np.int64))
    if len(held) == 1 and held[0].size > 1:
        raise UnifyError(
            f"the class set of site {site} is one group: its answer is always 1 and says nothing",
            hint="Leave the site out.",
        )
    return held
