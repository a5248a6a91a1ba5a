"""What every loss is, and the one that both sides use.

Does not live here: losses that learn from sites' answers (server/student).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from consilience.common.errors import StudentError
from consilience.common.files import canonical_json, sha256


@dataclass(frozen=True)
class Parted:
    """A batch's loss, a scalar, and what it is made of: scalars by name, the same names for every batch."""

    total: Tensor
    terms: Mapping[str, Tensor]


Loss = Callable[[Any, Tensor], Tensor | Parted]
"""What the network gives, and (b,) int64 sample ids, both on the training's device -> the batch's mean, a scalar.

The network gives (b, K) float32 logits, or a tuple of which they are the first; its other tensors are float32 too. A
loss with an attribute `fingerprint: str` ties a training's checkpoint to what it learns from.
"""


class Supervised:
    """Cross-entropy to true labels (n,) in [0, K), held on `device`."""

    def __init__(self, labels: NDArray[np.integer], device: torch.device, label_smoothing: float = 0.0) -> None:
        """Raises `StudentError` when a label is negative: torch would skip some of them in silence."""
        held = np.ascontiguousarray(labels, np.int64)
        if held.size and held.min() < 0:
            raise StudentError(f"Label {held.min()} is negative", hint="Give every sample a class")
        self.fingerprint = sha256(held.data) + sha256(canonical_json(label_smoothing))
        self._labels = torch.from_numpy(held.copy()).to(device)
        self._smoothing = label_smoothing

    def __call__(self, logits: Tensor, ids: Tensor) -> Tensor:
        """Return the scalar loss of (b, K) logits for the samples `ids` (b,)."""
        return F.cross_entropy(logits, self._labels[ids], label_smoothing=self._smoothing)


class SupervisedLabels:
    """Binary cross-entropy to true labels (n, L): 1 applies, 0 does not, -1 not known; held on `device`.

    Summed over the labels that are known and averaged over the batch: each label by itself learns as in `Supervised`.
    """

    def __init__(self, labels: NDArray[np.int8], device: torch.device) -> None:
        held = np.ascontiguousarray(labels, np.int8)
        self.fingerprint = f"labels {held.shape} {sha256(held.data)}"
        self._labels = torch.from_numpy(held.copy()).to(device)

    def __call__(self, logits: Tensor, ids: Tensor) -> Tensor:
        """Return the scalar loss of (b, L) logits for the samples `ids` (b,)."""
        return label_loss(logits, self._labels[ids].float(), self._labels[ids] >= 0)


def label_loss(logits: Tensor, probs: Tensor, known: Tensor) -> Tensor:
    """Return the mean over the batch of the binary cross-entropy of (b, L) logits to `probs` (b, L), summed over L.

    Entries that are not `known` (b, L) do not count, whatever they hold.
    """
    each = F.binary_cross_entropy_with_logits(logits, torch.where(known, probs, 0.5), reduction="none")
    return (each * known).sum(dim=1).mean()
