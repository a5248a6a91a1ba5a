"""What every estimator offers to the driver.

Lives here: `Estimate` and the `Estimator` protocol. Does not live here: any estimator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class Estimate:
    """scores (L, b) fp64: log q up to one constant per component; iterations, converged, residual (b,).

    other (b,) is the mass outside the label space, or None in a closed world. `labels`, where an estimator makes them
    itself, are q (L, b) fp32, and scores are then not used.
    """

    scores: torch.Tensor
    iterations: torch.Tensor
    converged: torch.Tensor
    residual: torch.Tensor
    other: torch.Tensor | None = None
    labels: torch.Tensor | None = None

    def replace(self, rows: torch.Tensor, by: Estimate, combine: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Take samples `rows` (m,) of labels from another estimate, whose scores `combine` makes labels of."""
        assert self.labels is not None
        self.labels[:, rows] = combine(by.scores).to(self.labels.dtype)
        self.iterations[rows], self.converged[rows], self.residual[rows] = by.iterations, by.converged, by.residual

    @staticmethod
    def closed(scores: torch.Tensor) -> Estimate:
        """Of a closed form: nothing to iterate, nothing left over."""
        batch, device = scores.shape[1], scores.device
        return Estimate(
            scores,
            torch.zeros(batch, dtype=torch.int32, device=device),
            torch.ones(batch, dtype=torch.bool, device=device),
            torch.zeros(batch, dtype=torch.float64, device=device),
        )


class Estimator(Protocol):
    """One method, prepared for one plan."""

    @property
    def row_doubles(self) -> int:
        """Doubles that one sample needs at the same time, roughly; bounds the block."""
        ...

    @property
    def comparable(self) -> bool:
        """Whether scores may be compared across components, so that no rule applies."""
        ...

    def __call__(self, log_probs: torch.Tensor) -> Estimate:
        """From stacked log-probabilities (K, b)."""
        ...
