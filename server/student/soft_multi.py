"""Learning from unified labels that do not exclude one another, estimated beforehand.

Works for any student; the labels stay on disk and only a batch's rows are read.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from consilience.common.files import Resident
from consilience.common.nets.losses import label_loss


class SoftMultiLabels:
    """Binary cross-entropy to unified labels, summed over labels: T^2 times the mean over the batch of

    sum_l -(q_l log sigmoid(s_l / T) + (1 - q_l) log sigmoid(-s_l / T)), where q_l is known.

    `probs` is (n, L) floating in [0, 1], NaN where no site told a label, typically a memory map; `temperature` is the T
    at which the labels were estimated. `fingerprint` names what the labels are, so that a training is not resumed with
    others. `samples` (m,) are the rows of `probs` that are learnt from, where not all are; `classes` the
    columns that the student has outputs for, in their order, where these are not all.
    """

    def __init__(
        self,
        probs: NDArray[np.floating],
        device: torch.device,
        temperature: float = 1.0,
        fingerprint: str = "",
        samples: NDArray[np.int64] | None = None,
        classes: Sequence[int] | None = None,
    ) -> None:
        self._classes = None if classes is None else list(classes)
        wanted = "" if classes is None else f" of {self._classes}"
        self.fingerprint = f"soft-multi-labels {temperature} {fingerprint}{wanted}"
        self._probs, self._device, self._temperature, self._samples = probs, device, temperature, samples
        self._resident = Resident()

    def __call__(self, logits: Tensor, ids: Tensor) -> Tensor:
        """Return the scalar loss of (b, L) logits for the samples `ids` (b,)."""
        at = ids.cpu().numpy() if self._samples is None else self._samples[ids.cpu().numpy()]
        held = self._probs[at] if self._classes is None else self._probs[at][:, self._classes]
        rows = torch.from_numpy(held).to(self._device, torch.float32, non_blocking=True)
        self._resident.note(len(at), [self._probs])
        return label_loss(logits / self._temperature, rows, ~torch.isnan(rows)) * self._temperature**2
