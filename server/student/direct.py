"""Learning from the sites' answers directly: the -BP route of methods.md 6.8.

The student's own logits stand in place of the unified label, and the estimator's objective is back-propagated. No
gradient flows between components of the class-overlap graph: the caller warns where there are several.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from numpy import typing as npt
from numpy.typing import NDArray
from torch import Tensor


class _Direct(ABC):
    """Answers of several sites, read a batch at a time.

    `answers[i]` (n, k_i) floating log-probabilities, typically a memory map; `class_sets[i]` their classes;
    `weights[i]` the site's weight. `fingerprint` names what the answers are, so that a training is not resumed with
    others.

    Sites need not have answered every sample: `answered` (n, N) bool says who did, None when all did. A sample's
    loss is then the weighted mean over the sites that answered it, as its unified label would be; rows of `answers`
    that no site gave only have to be finite. `samples` (m,) are the rows that are learnt from, where not all are:
    training's sample j has the answers `answers[i][samples[j]]`; each needs a site that answered.
    """

    def __init__(
        self,
        answers: Sequence[NDArray[np.floating]],
        class_sets: Sequence[Sequence[int]],
        weights: Sequence[float],
        device: torch.device,
        temperature: float = 1.0,
        fingerprint: str = "",
        answered: NDArray[np.bool_] | None = None,
        samples: NDArray[np.int64] | None = None,
    ) -> None:
        self.fingerprint = f"{type(self).__name__} {temperature} {list(weights)} {fingerprint}"
        self._answers, self._weights, self._device, self._temperature = answers, weights, device, temperature
        self._class_sets = [torch.tensor(classes, dtype=torch.int64, device=device) for classes in class_sets]
        self._answered, self._samples = answered, samples

    def __call__(self, logits: Tensor, ids: Tensor) -> Tensor:
        """Return the scalar loss of (b, L) logits for the samples `ids` (b,)."""
        rows = ids.cpu().numpy()
        if self._samples is not None:
            rows = self._samples[rows]
        shares = None if self._answered is None else self._shares(self._answered[rows])
        total = logits.new_zeros(())
        for i, (answers, classes, weight) in enumerate(
            zip(self._answers, self._class_sets, self._weights, strict=True)
        ):
            given = torch.from_numpy(np.asarray(answers[rows], np.float32)).to(self._device)
            terms = self._terms(given / self._temperature, logits[:, classes] / self._temperature)
            terms = self._covered(i, rows, terms * self._temperature**2, logits)
            if shares is None:
                total = total + weight * terms.mean()
            else:
                total = total + (shares[:, i] * terms.reshape(len(rows), -1).mean(dim=1)).mean()
        return total / (sum(self._weights) if shares is None else 1.0)

    def _shares(self, answered: NDArray[np.bool_]) -> Tensor:
        """Return (b, N): each site's share of a sample's loss, 0 where it did not answer; rows sum to 1."""
        weights = answered * np.asarray(self._weights, np.float32)
        return torch.from_numpy((weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)).to(self._device)

    def _covered(self, site: int, rows: NDArray[np.int64], terms: Tensor, logits: Tensor) -> Tensor:
        """Return the terms of a site with what its coverage of the samples `rows` adds and takes."""
        return terms

    @abstractmethod
    def _terms(self, given: Tensor, own: Tensor) -> Tensor:
        """Return one site's loss, (b,) or (b, k), from (b, k) answers and the student's logits for the same classes."""


class DirectCE(_Direct):
    """sum_i w_i KL(p_i || softmax(s restricted to L_i)) / sum_i w_i, mean over the batch (methods.md 6.8, CE-BP).

    `coverage` (n, N) floating, typically a memory map: how likely site i holds a sample to be of one of its classes,
    NaN where it does not say; None when no site does. `strength`: one number for all sites, or one each, in (0, 1].
    Where a site says c, with q = softmax(s) over all classes, its part is (1 - strength + strength c) KL(p_i ||
    softmax(s restricted to L_i)) + strength BCE(c || q(L_i)). At strength 1 that is the likelihood of its answer when
    "none of mine" is one more choice, which stands for all classes that it does not know; near 0 coverage ties only
    what answers leave open. A site that knows every class has no such choice: its coverage says nothing. At a
    temperature T it is the answers that are softened: BCE is at T = 1.
    """

    def __init__(
        self,
        answers: Sequence[NDArray[np.floating]],
        class_sets: Sequence[Sequence[int]],
        weights: Sequence[float],
        device: torch.device,
        temperature: float = 1.0,
        fingerprint: str = "",
        answered: NDArray[np.bool_] | None = None,
        samples: NDArray[np.int64] | None = None,
        *,
        coverage: NDArray[np.floating] | None = None,
        strength: npt.ArrayLike = 1.0,
    ) -> None:
        super().__init__(answers, class_sets, weights, device, temperature, fingerprint, answered, samples)
        self._coverage = coverage
        self._strength = [float(each) for each in np.broadcast_to(np.asarray(strength, np.float64), (len(answers),))]

    def _covered(self, site: int, rows: NDArray[np.int64], terms: Tensor, logits: Tensor) -> Tensor:
        if self._coverage is None:
            return terms
        mine = torch.zeros(logits.shape[1], dtype=torch.bool, device=self._device)
        mine[self._class_sets[site]] = True
        if mine.all():
            return terms
        told = torch.from_numpy(np.asarray(self._coverage[rows, site], np.float32)).to(self._device)
        says = ~told.isnan()
        c = torch.where(says, told, 1.0)
        strength = self._strength[site]
        terms = (1 - strength + strength * c) * terms
        whole = torch.logsumexp(logits, dim=1)
        inside = torch.logsumexp(logits[:, mine], dim=1) - whole
        outside = torch.logsumexp(logits[:, ~mine], dim=1) - whole
        return terms - strength * torch.where(says, c * inside + (1 - c) * outside, 0.0)

    def _terms(self, given: Tensor, own: Tensor) -> Tensor:
        log_p = torch.log_softmax(given, dim=1)
        log_q = torch.log_softmax(own, dim=1)
        return (log_p.exp() * (log_p - log_q)).sum(dim=1)


class DirectMFLF(_Direct):
    """sum_i w_i |centre(z_i) - centre(s restricted to L_i)|^2 / sum_i w_i, mean over the batch and a site's classes.

    methods.md 6.8, MF-LF-BP; the mean over classes instead of the sum keeps the step size independent of k_i.
    """

    def _terms(self, given: Tensor, own: Tensor) -> Tensor:
        difference = given - own
        return (difference - difference.mean(dim=1, keepdim=True)).square()
