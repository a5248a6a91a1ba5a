"""Learning from the sites' answers directly: the -BP route of methods.md 6.8.

The student's own logits stand in place of the unified label, and the estimator's objective is back-propagated. No
gradient flows between components of the class-overlap graph: the caller warns where there are several.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class _Direct(ABC):
    """Answers of several sites, read a batch at a time.

    `answers[i]` (n, k_i) floating log-probabilities, typically a memory map; `class_sets[i]` their classes;
    `weights[i]` the site's weight. `fingerprint` names what the answers are, so that a training is not resumed with
    others.
    """

    def __init__(
        self,
        answers: Sequence[NDArray[np.floating]],
        class_sets: Sequence[Sequence[int]],
        weights: Sequence[float],
        device: torch.device,
        temperature: float = 1.0,
        fingerprint: str = "",
    ) -> None:
        self.fingerprint = f"{type(self).__name__} {temperature} {list(weights)} {fingerprint}"
        self._answers, self._weights, self._device, self._temperature = answers, weights, device, temperature
        self._class_sets = [torch.tensor(classes, dtype=torch.int64, device=device) for classes in class_sets]

    def __call__(self, logits: Tensor, ids: Tensor) -> Tensor:
        """Return the scalar loss of (b, L) logits for the samples `ids` (b,)."""
        rows = ids.cpu().numpy()
        total = logits.new_zeros(())
        for answers, classes, weight in zip(self._answers, self._class_sets, self._weights, strict=True):
            given = torch.from_numpy(np.asarray(answers[rows], np.float32)).to(self._device)
            total = total + weight * self._site(given / self._temperature, logits[:, classes] / self._temperature)
        return total * (self._temperature**2 / sum(self._weights))

    @abstractmethod
    def _site(self, given: Tensor, own: Tensor) -> Tensor:
        """Return one site's loss from (b, k) answers and the student's logits for the same classes."""


class DirectCE(_Direct):
    """sum_i w_i KL(p_i || softmax(s restricted to L_i)) / sum_i w_i, mean over the batch (methods.md 6.8, CE-BP)."""

    def _site(self, given: Tensor, own: Tensor) -> Tensor:
        log_p = torch.log_softmax(given, dim=1)
        log_q = torch.log_softmax(own, dim=1)
        return (log_p.exp() * (log_p - log_q)).sum(dim=1).mean()


class DirectMFLF(_Direct):
    """sum_i w_i |centre(z_i) - centre(s restricted to L_i)|^2 / sum_i w_i, mean over the batch and a site's classes.

    methods.md 6.8, MF-LF-BP; the mean over classes instead of the sum keeps the step size independent of k_i.
    """

    def _site(self, given: Tensor, own: Tensor) -> Tensor:
        difference = given - own
        return (difference - difference.mean(dim=1, keepdim=True)).square().mean()
