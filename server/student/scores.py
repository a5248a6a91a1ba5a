"""Learning the teachers' concatenated scores by squared error: the score layer and joint phase of methods.md 1.3, 1.4.

Lives here: the target and its loss for the training loop. Does not live here: unified soft labels, which take classes
that several sites know (soft_labels).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from consilience.common.errors import StudentError


class ConcatenatedScores:
    """1/2 |s(x) - [z_1(x); ...; z_N(x)]|^2, mean over the batch (Shen et al., AAAI 2019).

    `scores[i]` (n, k_i) floating, typically a memory map; `class_sets[i]` their classes in the label space, which are
    the student's outputs. Scores count as they are: log-probabilities, which are what sites send, are logits whose
    offset is such that a row's probabilities sum to 1. `fingerprint` names what the scores are, so that a training is
    not resumed with others. Raises `StudentError` unless each class 0, ..., L - 1 is known to exactly one site.
    """

    def __init__(
        self,
        scores: Sequence[NDArray[np.floating]],
        class_sets: Sequence[Sequence[int]],
        device: torch.device,
        fingerprint: str = "",
    ) -> None:
        owners = np.bincount(np.concatenate([np.asarray(classes, np.int64) for classes in class_sets]))
        if (owners != 1).any():
            odd = int(np.flatnonzero(owners != 1)[0])
            raise StudentError(
                f"Class {odd} is known to {owners[odd]} sites; concatenated scores need each class to be known to "
                "exactly one",
                hint="Learn from unified soft labels, which take classes that several sites know",
            )
        self.fingerprint = f"concatenated-scores {[list(classes) for classes in class_sets]} {fingerprint}"
        self._scores, self._class_sets, self._device, self._classes = scores, class_sets, device, len(owners)

    def target(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return (b, L) float32: the samples' scores, each class's in its place."""
        rows = np.empty((len(ids), self._classes), np.float32)
        for scores, classes in zip(self._scores, self._class_sets, strict=True):
            rows[:, classes] = scores[ids]
        return rows

    def __call__(self, logits: Tensor, ids: Tensor) -> Tensor:
        """Return the scalar loss of (b, L) logits for the samples `ids` (b,)."""
        target = torch.from_numpy(self.target(ids.cpu().numpy())).to(self._device)
        return (logits - target).square().sum(dim=1).mean() / 2
