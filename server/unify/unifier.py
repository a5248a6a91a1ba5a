"""The driver: options checked once, blocks of answers in, unified labels out.

Lives here: `Unifier`, `unify`. Does not live here: any method; each has a module of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from consilience.common.errors import UnifyError
from consilience.server.unify.across import Combine
from consilience.server.unify.answers import Reader, is_double
from consilience.server.unify.blocks import MEMORY, block_rows, run_blocks
from consilience.server.unify.ce import CE
from consilience.server.unify.coverage import STRENGTH, Coverage, check_coverage, read_coverage
from consilience.server.unify.covered import CoveredCE
from consilience.server.unify.estimate import Estimate, Estimator
from consilience.server.unify.mf_lf import MFLF
from consilience.server.unify.mf_lv import MFLV
from consilience.server.unify.mf_p import MFP
from consilience.server.unify.plan import Plan, make_plan
from consilience.server.unify.quick import LOWEST
from consilience.server.unify.result import ACROSS, METHODS, Across, Answers, Method, Prior, UnifiedLabels
from consilience.server.unify.sd import SD


class Unifier:
    """Prepared once for given sites and options, then called for as many blocks of answers as there are.

    class_sets      one array of class indices per site, in its teacher's order
    num_classes     L; by default one more than the largest index. Every class must be known to some site
    method          "sd", "ce" (default), "mf-p", "mf-lv" or "mf-lf"
    weights         (N,) positive: how much each site counts (default 1)
    temperature     answers are softened to softmax(z / temperature) first; the unified labels then belong to
                    the softened truth, q^(1/temperature)
    prior           a `Prior`: correct answers for the class proportions of the sites' training data
    across          how mass is shared out between components that no site links: "centred" (default),
                    "equal" or "proportional". Not used by "sd", whose definition fixes it, nor where coverage
                    determines the mass
    strength        (N,) or one number for all, in (0, 1]: how much a site's coverage counts beside its answer; 1
                    weighs its answer by its coverage, near 0 coverage decides only what answers leave open.
                    Only for "ce"
    other           the weight of a prior that holds a sample for one of no class of the label space, in the
                    units of `weights`; 0 (default) is a closed world. Only with "ce" and coverage from a site
                    of every component
    regularisation  lambda of "mf-lf" (default 0) and "mf-lv" (default 1e-4 of each sample's mean square of
                    centred logits); not for other methods
    device          where to compute; by default the CPU
    block           rows computed at a time; by default what fits a fixed amount of memory. Results do not
                    depend on it

    Raises UnifyError where any of these is not as said. All computation is in fp64, but for "ce" from answers in f16,
    bf16 or f32: of samples whose sites are well linked they are added up in fp32, and labels are the same to 1e-6.
    The methods are those of Vongkulbhisal et al., CVPR 2019; docs/unify.md says how each is solved.
    """

    def __init__(
        self,
        class_sets: Sequence[npt.ArrayLike],
        num_classes: int | None = None,
        *,
        method: Method = "ce",
        weights: npt.ArrayLike | None = None,
        temperature: float = 1.0,
        prior: Prior | None = None,
        across: Across = "centred",
        regularisation: float | None = None,
        strength: npt.ArrayLike = STRENGTH,
        other: float = 0.0,
        device: str | torch.device | None = None,
        block: int | None = None,
    ) -> None:
        _one_of("method", method, METHODS)
        check_across(across)
        plan = make_plan(class_sets, num_classes, weights, to_device(device))
        self._estimator = _estimator(plan, method, regularisation)
        self._reader = Reader(plan, temperature, prior)
        self._combine = Combine(plan, None if self._estimator.comparable else across)
        self._plan = plan
        check_other(other)
        if other > 0 and method != "ce":
            raise UnifyError(f"method {method!r} knows no other than its classes", hint='Only "ce" does.')
        self._method: Method = method
        self._across: Across = across
        self._strength = check_strength(strength, plan.num_sites)
        self._other = float(other)
        # Coverage is about the truth itself, not about the truth softened: answers are softened after it is used.
        self._unsoftened, self._temperature = Reader(plan, 1.0, prior), float(temperature)
        self._asked_block = block
        self._covered: dict[tuple[bool, ...], _Covered] = {}
        self._quick = self._estimator.quick if isinstance(self._estimator, CE) else None
        self.block = self._exact_block = block_rows(block, self._estimator.row_doubles)
        if self._quick is not None:  # many short operations, the cost of which more rows share
            self.block = block_rows(block, self._quick.row_doubles, 2 * MEMORY)

    @property
    def components(self) -> npt.NDArray[np.int64]:
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

        log_probs  one (n, len(class_sets[i])) floating array or tensor per site: log-probabilities or logits;
                   a constant added to a row changes nothing. -inf is allowed, but not for a whole row.
                   Memory maps are read block by block.
        coverage   (n,) floating per site, its estimate of P(class of x is one of mine) in [0, 1], or None for a
                   site that gives none; None (default) for none at all. For "ce" and, from every site, "sd"
        first_row  added to row numbers in messages, for callers who hold a part of a larger whole
        alone      work in the calling thread only, for callers who call from several

        Raises UnifyError for wrong shapes or types, NaN, +inf, a row of nothing but -inf, coverage outside
        [0, 1], or coverage that the method cannot use or `other` lacks.
        """
        n = self._reader.check(log_probs)
        pattern = check_coverage(coverage, self._plan.num_sites, n)
        if coverage is not None and any(pattern):
            return self._with_coverage(log_probs, coverage, pattern, n, first_row, alone)
        if self._other > 0:
            raise UnifyError(f"other {self._other:g} needs coverage, and no site gives any")

        def exact(start: int, stop: int) -> torch.Tensor:
            return self._reader.read(log_probs, start, stop, first_row)

        # Doubles are taken at their word: in fp32 a large offset of a row would cost digits.
        quick = None if any(is_double(answers) for answers in log_probs) else self._quick

        def estimate(start: int, stop: int) -> Estimate:
            if quick is None:
                return self._estimator(exact(start, stop))
            stacked = quick.buffer("stacked", self._plan.columns.size, stop - start)
            found = quick(self._reader.weighed(log_probs, start, stop, first_row, stacked, LOWEST))
            left = torch.nonzero(~found.converged)[:, 0]
            if left.numel() > 0:
                stacked = exact(start, stop)
                for rows in torch.split(left, self._exact_block):
                    found.replace(rows, self._estimator(stacked[:, rows]), self._combine)
            return found

        return run_blocks(self._plan, n, self.block, estimate, self._combine, alone=alone)

    def _with_coverage(
        self,
        log_probs: Sequence[Answers],
        coverage: Coverage,
        pattern: tuple[bool, ...],
        n: int,
        first_row: int,
        alone: bool,
    ) -> UnifiedLabels:
        plan = self._plan
        if pattern not in self._covered:
            self._covered[pattern] = self._prepare(pattern)
        covered = self._covered[pattern]

        def estimate(start: int, stop: int) -> Estimate:
            known = read_coverage(coverage, start, stop, first_row, plan.device)
            found = covered.estimate(self._unsoftened.read(log_probs, start, stop, first_row), known)
            return replace(found, scores=found.scores / self._temperature)

        labels = run_blocks(plan, n, covered.block, estimate, Combine(plan, None), alone=alone)
        return replace(labels, components=covered.components.copy())

    def _prepare(self, pattern: tuple[bool, ...]) -> _Covered:
        if self._method == "ce":
            estimator = CoveredCE(self._plan, pattern, self._strength, self._other, self._across)
            block = block_rows(self._asked_block, estimator.row_doubles)
            return _Covered(estimator, estimator.components, block)
        if not isinstance(self._estimator, SD):
            raise UnifyError(f"method {self._method!r} cannot use coverage", hint='"ce" can, and "sd".')
        if not all(pattern):
            raise UnifyError(
                f'"sd" mixes sites by coverage, and site {pattern.index(False)} gives none',
                hint='Unify by "ce", or without coverage.',
            )
        return _Covered(self._estimator.mixture, self._plan.components, self.block)


@dataclass(frozen=True)
class _Covered:
    """An estimator prepared for coverage from certain sites: its components (L,) and rows per block."""

    estimate: Callable[[torch.Tensor, torch.Tensor], Estimate]
    components: npt.NDArray[np.int64]
    block: int


def unify(
    log_probs: Sequence[Answers],
    class_sets: Sequence[npt.ArrayLike],
    num_classes: int | None = None,
    *,
    method: Method = "ce",
    weights: npt.ArrayLike | None = None,
    coverage: Coverage | None = None,
    temperature: float = 1.0,
    prior: Prior | None = None,
    across: Across = "centred",
    regularisation: float | None = None,
    strength: npt.ArrayLike = STRENGTH,
    other: float = 0.0,
    device: str | torch.device | None = None,
    block: int | None = None,
) -> UnifiedLabels:
    """Soft labels over the union of all classes, from each site's answers over its own.

    See `Unifier` for the options, and its call for `log_probs`, `coverage`, shapes, types and errors. The device is by
    default the one that holds the first site's answers.
    """
    if device is None and len(log_probs) > 0 and isinstance(log_probs[0], torch.Tensor):
        device = log_probs[0].device
    unifier = Unifier(
        class_sets,
        num_classes,
        method=method,
        weights=weights,
        temperature=temperature,
        prior=prior,
        across=across,
        regularisation=regularisation,
        strength=strength,
        other=other,
        device=device,
        block=block,
    )
    return unifier(log_probs, coverage=coverage)


def _estimator(plan: Plan, method: Method, regularisation: float | None) -> Estimator:
    if regularisation is not None:
        if method not in ("mf-lf", "mf-lv"):
            raise UnifyError(f"method {method!r} has no regularisation", hint='Only "mf-lf" and "mf-lv" have.')
        if not (math.isfinite(regularisation) and regularisation >= 0):
            raise UnifyError(f"regularisation {regularisation} is not a finite number of at least 0")
    if method == "sd":
        return SD(plan)
    if method == "ce":
        return CE(plan)
    if method == "mf-p":
        return MFP(plan)
    if method == "mf-lf":
        return MFLF(plan, regularisation or 0.0)
    if regularisation == 0:
        raise UnifyError('regularisation 0 leaves "mf-lv" without a solution', hint="Give a small positive one.")
    return MFLV(plan, regularisation)


def check_other(other: float) -> float:
    """The same number; UnifyError where it is negative or not finite."""
    if not (math.isfinite(other) and other >= 0):
        raise UnifyError(f"other {other} is not a finite number of at least 0")
    return float(other)


def check_strength(values: npt.ArrayLike, num_sites: int) -> npt.NDArray[np.float64]:
    """(N,) one a site; UnifyError for another shape, or a number that is not in (0, 1]."""
    array = np.asarray(values, dtype=np.float64)
    if array.shape not in ((), (num_sites,)):
        raise UnifyError(f"strength has shape {array.shape} instead of ({num_sites},)")
    array = np.broadcast_to(array, (num_sites,))
    bad = ~((array > 0) & (array <= 1))
    if bad.any():
        raise UnifyError(
            f"strength {array[bad][0]:g} of site {int(bad.argmax())} is not above 0 and at most 1",
            hint="Give None as the coverage of a site that is not to be believed.",
        )
    return array


def check_across(across: object) -> None:
    """UnifyError for an unknown rule."""
    _one_of("across", across, ACROSS)


def to_device(device: str | torch.device | None) -> torch.device:
    """The CPU by default; UnifyError for a name that torch does not know."""
    try:
        return torch.device("cpu" if device is None else device)
    except RuntimeError as error:
        raise UnifyError(f"device {str(device)!r} is unknown to torch") from error


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UnifyError(f"{name} {value!r} is none of {', '.join(allowed)}")
