"""Learning from unified soft labels, estimated beforehand: the -X route of methods.md 6.8.

Works for any student; the labels stay on disk and only a batch's rows are read.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from consilience.common.files import Resident
from consilience.server.student.wanted import Wanted


class SoftLabels:
    """Cross-entropy to unified labels: T^2 times the mean over the batch of -sum_l q_l log softmax(s / T)_l.

    `probs` is (n, L) floating, rows sum to 1, typically a memory map; `temperature` is the T at which the labels
    were estimated (Vongkulbhisal et al., CVPR 2019; the factor T^2 keeps the gradient's size). `fingerprint` names
    what the labels are, so that a training is not resumed with others. `samples` (m,) are the rows of `probs` that
    are learnt from, where not all are: training's sample j has the label `probs[samples[j]]`.

    `other` (n,) floating in [0, 1] says how likely each sample is outside the label space, typically a memory map: its
    part of the mean is weighed by 1 - other, so that such samples leave training in proportion.

    `wanted`: the classes that the student's outputs stand for; None: all, in the order of the columns of `probs`.
    """

    def __init__(
        self,
        probs: NDArray[np.floating],
        device: torch.device,
        temperature: float = 1.0,
        fingerprint: str = "",
        samples: NDArray[np.int64] | None = None,
        other: NDArray[np.floating] | None = None,
        wanted: Wanted | None = None,
    ) -> None:
        self.fingerprint = f"soft-labels {temperature} {fingerprint}"
        if wanted is not None:
            self.fingerprint += f" {wanted.fingerprint}"
        self._probs, self._device, self._temperature, self._samples = probs, device, temperature, samples
        self._other, self._wanted, self._resident = other, wanted, Resident()

    def __call__(self, logits: Tensor, ids: Tensor) -> Tensor:
        """Return the scalar loss of (b, L) logits for the samples `ids` (b,)."""
        at = ids.cpu().numpy() if self._samples is None else self._samples[ids.cpu().numpy()]
        rows, weights = self._rows(at)
        self._resident.note(len(at), [self._probs])
        log_probs = torch.log_softmax(logits / self._temperature, dim=1)
        terms = -(rows * log_probs).sum(dim=1)
        if weights is not None:
            terms = terms * weights
        return terms.mean() * self._temperature**2

    def _rows(self, at: NDArray[np.int64]) -> tuple[Tensor, Tensor | None]:
        """Return (b, outputs) labels and (b,) weights, None where all count alike, of the rows `at` (b,)."""
        other = None if self._other is None else np.asarray(self._other[at], np.float32)
        if self._wanted is None:
            rows = torch.from_numpy(self._probs[at]).to(self._device, torch.float32, non_blocking=True)
            return rows, None if other is None else torch.from_numpy(1 - other).to(self._device)
        told = torch.from_numpy(self._probs[np.ix_(at, np.asarray(self._wanted.classes))])
        rows, weights = self._wanted.labels(told, None if other is None else torch.from_numpy(other))
        rows = rows.to(self._device, torch.float32)
        return rows, None if weights is None else weights.to(self._device, torch.float32)
