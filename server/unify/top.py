"""CE of answers that tell a few classes each, from what was sent to what is kept, without a row over all classes.

Lives here: `TopUnifier` and its labels. Does not live here: the dual (`linked`, `dual`), the bytes (common/encoding).

A site sends m classes with their probabilities and, together, the rest, which stands for even parts r_i of it for every
other class of the site. Then W_l = sum of w_i p_i(l) is the same number for all classes with the same owners that
nobody sent, so that the owner sets' masses, and with them the dual, need what was sent alone:

    a_Ti = |T| w_i r_i + sum over the classes l of T that i sent of w_i (p_i(l) - r_i),

no difference of which is negative, since what is sent is the largest. The labels are those of `unify` for the answers
written out in full. Of these the likeliest that a site sent are kept, and what all others have together: it counts as
shared out evenly, as in the answers.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from consilience.common.encoding import Sent
from consilience.common.errors import UnifyError
from consilience.server.unify.dual import Solution, solve
from consilience.server.unify.linked import Linked
from consilience.server.unify.owners import owner_sets
from consilience.server.unify.plan import make_plan
from consilience.server.unify.terms import Masses

_SCRATCH = 2**22
"""Numbers of samples x classes that a thread adds up in at a time."""
_MOST_ROWS = 512
_FLOOR = -100.0


@dataclass(frozen=True)
class TopLabels:
    """Labels of n samples of which the K likeliest classes are kept.

    classes (n, K) int32, the likeliest first; values (n, K) float32; rest (n,) float32, what all other classes have
    together. Where fewer than K classes were sent, the places left have class -1 and value 0.
    iterations, converged, residual: as `UnifiedLabels`.
    """

    classes: npt.NDArray[np.int32]
    values: npt.NDArray[np.float32]
    rest: npt.NDArray[np.float32]
    iterations: npt.NDArray[np.int32]
    converged: npt.NDArray[np.bool_]
    residual: npt.NDArray[np.float64]


class TopUnifier:
    """Prepared once for given sites, then called for as many blocks of answers as there are.

    class_sets, num_classes, weights, temperature: as `Unifier`. The sites must hang together in one component.
    Raises UnifyError where any of these is not so.
    """

    def __init__(
        self,
        class_sets: Sequence[npt.ArrayLike],
        num_classes: int | None = None,
        *,
        weights: npt.ArrayLike | None = None,
        temperature: float = 1.0,
    ) -> None:
        plan = make_plan(class_sets, num_classes, weights, torch.device("cpu"))
        overlaps, class_row = owner_sets(plan)
        if len(overlaps) != 1 or int(plan.components.max()) != 0:
            raise UnifyError(
                "answers of a few classes are unified where all sites share classes, directly or through others",
                hint="Unify the answers in full.",
            )
        if not (np.isfinite(temperature) and temperature > 0):
            raise UnifyError(f"temperature {temperature} is not a positive finite number")
        self._plan, self._overlap, self._temperature = plan, overlaps[0], float(temperature)
        self._linked = Linked(self._overlap)
        self._class_row = plan.tensor(class_row)
        parts = self._overlap.part_set.numel()
        # Rows of classes with one owner, and of sites that do not count, go to a part more, which is not looked at.
        self._part_of = plan.tensor(np.where(self._overlap.part_rows >= 0, self._overlap.part_rows, parts))
        self._counted = plan.tensor(plan.counted)
        self._columns = plan.tensor(plan.columns)
        # For every row of levels (owner sets, then sites): its owners that count, and how many classes it has.
        levels = self._overlap.set_count + plan.num_sites
        self._sizes = torch.bincount(self._class_row, minlength=levels).to(torch.float64)[:, None]
        owners = np.zeros((levels, plan.num_sites))
        owners[class_row[plan.columns[plan.counted]], plan.sites[plan.counted]] = 1.0
        self._owners = torch.from_numpy(owners)
        self._part_sizes = self._sizes[self._overlap.part_set]
        self._part_site = self._overlap.sites[self._overlap.part_site]
        self._log_weights = plan.tensor(np.log(plan.weights))[:, None]
        self._local = threading.local()
        self._scratch_rows = max(1, _SCRATCH // plan.num_classes)

    @property
    def block(self) -> int:
        """How many samples are best given at a time."""
        doubles = 3 * self._overlap.part_set.numel() + 10 * self._sizes.numel()
        return max(1, min(_MOST_ROWS, 2**22 // doubles))

    def __call__(self, answers: Sequence[Sent], keep: int) -> TopLabels:
        """Unify what the sites sent about n samples, and keep `keep` classes. Works in the calling thread.

        Raises UnifyError where the numbers of sites or of samples do not fit, or `keep` is not from 1 to L.
        """
        self._check(answers, keep)
        ids, excess, other = self._told(answers)
        batch = ids.shape[0]
        # a_Ti, its rows beside one another in one array.
        size = self._overlap.part_set.numel() + 1
        places = self._part_of[ids].add_(torch.arange(batch)[:, None] * size)
        parts = torch.zeros(batch * size, dtype=torch.float64).index_add_(0, places.view(-1), excess.view(-1))
        parts = parts.view(batch, size)[:, :-1].t() + self._part_sizes * other[self._part_site]
        overlap = self._overlap
        sets = parts.new_zeros((overlap.set_count, batch)).index_add_(0, overlap.part_set, parts)
        sites = parts.new_zeros((overlap.size, batch)).index_add_(0, overlap.part_site, parts)
        found = self._solve(Masses(sets, sites, parts))
        lam = self._log_weights.expand(-1, batch).clone()
        lam[overlap.sites] = found.lam
        levels = torch.cat([found.log_sets, lam])
        factors = (levels.amin(0) - levels).exp_()
        # What a class of each row of levels has that nobody sent.
        floors = (self._owners @ other).mul_(factors)
        total = (self._sizes * floors).sum(0)
        gains = excess.mul_(factors.t().gather(1, self._class_row[self._columns[ids]]))
        total += gains.sum(1)
        classes, values = self._highest(self._columns[ids], gains, floors.t(), total, keep)
        rest = (1.0 - values.sum(1, dtype=torch.float64)).clamp_(min=0.0)
        return TopLabels(
            classes.to(torch.int32).numpy(),
            values.to(torch.float32).numpy(),
            rest.to(torch.float32).numpy(),
            found.iterations.numpy(),
            found.converged.numpy(),
            found.residual.numpy(),
        )

    def _check(self, answers: Sequence[Sent], keep: int) -> None:
        plan = self._plan
        if len(answers) != plan.num_sites:
            raise UnifyError(f"there are answers of {len(answers)} sites but {plan.num_sites} class sets")
        for site, sent in enumerate(answers):
            if sent.ids.shape != sent.values.shape or sent.other.shape != sent.ids.shape[:1]:
                raise UnifyError(f"answers of site {site} have ids, values and rest of different numbers of samples")
            if len(sent.ids) != len(answers[0].ids):
                raise UnifyError(
                    f"answers of site {site} have {len(sent.ids)} rows, those of site 0 {len(answers[0].ids)}"
                )
        if not 1 <= keep <= plan.num_classes:
            raise UnifyError(f"keep {keep} is not from 1 to {plan.num_classes}, the number of classes")

    def _told(self, answers: Sequence[Sent]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return stacked rows (b, E) of what was sent, w_i (p_i - r_i) of each, and w_i r_i (N, b), in fp64."""
        plan, rows, excess, others = self._plan, [], [], []
        for site, sent in enumerate(answers):
            values, other = torch.from_numpy(sent.values).double(), torch.from_numpy(sent.other).double()
            top = values.amax(1)
            values = ((values - top[:, None]) / self._temperature).clamp_(min=_FLOOR).exp_()
            left = plan.class_sets[site].size - sent.ids.shape[1]
            each = ((other - top) / self._temperature).clamp_(min=_FLOOR).exp_() if left else torch.zeros_like(other)
            scale = float(plan.weights[site]) / (values.sum(1) + left * each)
            rows.append(torch.from_numpy(sent.ids) + int(plan.offsets[site]))
            excess.append((values - each[:, None]).clamp_(min=0.0) * scale[:, None])
            others.append(each * scale)
        stacked = torch.cat(rows, 1)
        return stacked, torch.cat(excess, 1).mul_(self._counted[stacked]), torch.stack(others)

    def _solve(self, masses: Masses) -> Solution:
        found = self._linked.solve(masses.sets, masses.sites)
        left = torch.nonzero(~found.converged)[:, 0]
        if left.numel() > 0:
            again = solve(self._overlap, masses.select(left))
            found.lam[:, left], found.log_sets[:, left] = again.lam, again.log_sets
            found.iterations[left], found.converged[left] = again.iterations, again.converged
            found.residual[left] = again.residual
        return found

    def _scratch(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return zeros fp64, to be left as zeros, and numbers int32 of the thread's own: to make them costs more."""
        held: tuple[torch.Tensor, torch.Tensor] | None = getattr(self._local, "held", None)
        if held is None:
            held = torch.zeros(size, dtype=torch.float64), torch.empty(size, dtype=torch.int32)
            self._local.held = held
        return held

    def _highest(
        self, classes: torch.Tensor, gains: torch.Tensor, floors: torch.Tensor, total: torch.Tensor, keep: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the `keep` likeliest of the classes (b, E) that were sent, and their labels: gains added up by class.

        floors (b, levels), what a class has besides; total (b,).
        """
        held, numbers = [], self._plan.num_classes
        sums, number = self._scratch(self._scratch_rows * numbers)
        for low in range(0, len(classes), self._scratch_rows):
            rows = slice(low, low + self._scratch_rows)
            own = classes[rows]
            count, sent = own.shape
            places = (own + torch.arange(count)[:, None] * numbers).view(-1)
            sums.index_add_(0, places, gains[rows].reshape(-1))
            # Of entries of one class one stands for all: that whose number is found there.
            entry = torch.arange(places.numel(), dtype=torch.int32)
            number[places] = entry
            labels = sums[places].view(count, sent) + floors[rows].gather(1, self._class_row[own])
            sums[places] = 0.0
            labels.masked_fill_((number[places] != entry).view(count, sent), -1.0)
            values, at = labels.topk(min(keep, sent), dim=1)
            chosen = own.gather(1, at).masked_fill_(values < 0, -1)
            short = keep - values.shape[1]
            values = torch.nn.functional.pad(values.clamp_(min=0.0) / total[rows, None], (0, short))
            held.append((torch.nn.functional.pad(chosen, (0, short), value=-1), values))
        found = [torch.cat(parts) for parts in zip(*held, strict=True)]
        return found[0], found[1]
