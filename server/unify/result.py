"""What goes into and comes out of a unification besides arrays.

Lives here: the names of methods and rules, `Prior`, `UnifiedLabels`. Does not live here: any computation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

Method: TypeAlias = Literal["sd", "ce", "mf-p", "mf-lv", "mf-lf"]
Across: TypeAlias = Literal["centred", "equal", "proportional"]
METHODS: tuple[Method, ...] = ("sd", "ce", "mf-p", "mf-lv", "mf-lf")
ACROSS: tuple[Across, ...] = ("centred", "equal", "proportional")

Answers: TypeAlias = npt.NDArray[Any] | torch.Tensor
"""One site's answers, (n, k): NumPy or torch, f16, bf16 (torch only), f32 or f64; a memory map will do."""


@dataclass(frozen=True)
class Prior:
    """Class priors, to be used when a site's training data had other proportions than the target.

    The site's logits get log(target / site) added, class by class, before the temperature is applied
    (assumption A2 in docs/unify.md). A constant factor in any of the arrays changes nothing.

    target  (L,) positive: the class prior wanted of the unified labels
    sites   one array per site, (len(class_sets[i]),) positive: the prior of its training data, in the order
            of its classes
    """

    target: npt.ArrayLike
    sites: Sequence[npt.ArrayLike]


@dataclass(frozen=True)
class UnifiedLabels:
    """Soft labels over the whole label space, and how well they are determined.

    probs       (n, L) float32, every row sums to 1
    components  (L,) int64: the component of each class, numbered in the order of their first classes. Mass
                *between* components follows the declared rule, not the answers.
    iterations  (n,) int32: Newton steps taken; 0 for the closed forms (sd, mf-lf)
    converged   (n,) bool: both the gradient and the Newton step are below tolerance; see docs/unify.md
    residual    (n,) float64: ce: the largest mismatch of marginals, max_T |sum of W_l - sum_i w_i qhat_i(l)
                over l in T|, T running over the owner sets, which bounds the mismatch of every class;
                mf-p, mf-lv: the largest entry of the scaled, projected gradient; 0 for the closed forms
    """

    probs: npt.NDArray[np.float32]
    components: npt.NDArray[np.int64]
    iterations: npt.NDArray[np.int32]
    converged: npt.NDArray[np.bool_]
    residual: npt.NDArray[np.float64]
    other: npt.NDArray[np.float32] = field(default_factory=lambda: np.zeros(1, np.float32))
