"""Learning sparse targets, of which a few classes a sample are not zero (methods.md 4.2), without a dense one.

Lives here: the targets on disk, the sigmoid and the softmax loss for the training loop. Does not live here: how targets
are made (concentration), the scores of a head of verticals made and taught in one pass (blocked_loss).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from consilience.common.files import Resident, sha256
from consilience.common.nets.seeding import generator
from consilience.server.student.blocked_loss import blocked_sigmoid


@dataclass(frozen=True)
class SparseTargets:
    """`labels` (n, K) int32 classes and `values` (n, K) float32 in [0, 1], typically memory maps; zero elsewhere.

    A sample with fewer than K classes has values of 0 in the places that are left, of any class.
    """

    labels: NDArray[np.int32]
    values: NDArray[np.float32]


class SparseSigmoid:
    """sum_j softplus(x_j) - sum_k z_k x_{j_k}: sigmoid cross-entropy summed over classes, mean over the batch.

    Takes (b, L) scores, or the parts that a `ConcentratedHead` gives, of which it makes scores a vertical at a time.
    `verticals`: the head's, in its order. `samples` (m,): training's sample j has the target of row samples[j]; None:
    all are learnt from. `fingerprint` names what the targets are, so that a training is not resumed with others.

    `drawn` in (0, 1): for the samples that a vertical does not teach, this share of its classes is drawn for each
    batch, by the batch's samples and `seed`, and stands for all: the loss and its gradients are right on average. For
    parts of a head without scaling; with 1 every class counts. Scores as they are always count whole.
    """

    def __init__(
        self,
        targets: SparseTargets,
        verticals: Sequence[Sequence[int]],
        device: torch.device,
        fingerprint: str = "",
        samples: NDArray[np.int64] | None = None,
        drawn: float = 1.0,
        seed: int = 0,
    ) -> None:
        self.fingerprint = f"sparse-sigmoid {targets.labels.shape} {drawn} {fingerprint}"
        self._drawn, self._seed = drawn, seed
        self._targets, self._samples, self._resident, self._device = targets, samples, Resident(), device
        flat = [label for classes in verticals for label in classes]
        self._starts = np.cumsum([0, *map(len, verticals)])
        self._place = np.empty(len(flat), np.int64)
        self._place[flat] = np.arange(len(flat))

    def __call__(self, logits: Any, ids: Tensor) -> Tensor:
        """Return the scalar loss of (b, L) logits, or what stands for them, for the samples `ids` (b,)."""
        labels, values = read(self._targets, self._samples, ids, self._resident)
        if isinstance(logits, Tensor):
            at, z = torch.from_numpy(labels).to(self._device), torch.from_numpy(values).to(self._device)
            return (F.softplus(logits).sum() - (z * logits.gather(1, at)).sum()) / len(logits)
        hidden, coarse, gammas, weights = logits
        drawn = None if self._drawn == 1 else self._draw(weights, ids)
        places = self._by_vertical(labels, values)
        return blocked_sigmoid(hidden, gammas, weights, places, coarse=bool(coarse), drawn=drawn)

    def _draw(self, weights: Sequence[Tensor], ids: Tensor) -> list[Tensor]:
        """Return drawn classes of each vertical: no state to keep, so that a resumed training draws the same."""
        chance = generator(self._seed, f"classes {sha256(ids.cpu().numpy().tobytes())}")
        counts = [max(1, round(self._drawn * len(weight))) for weight in weights]
        return [
            torch.randperm(len(weight), generator=chance)[:count].to(self._device)
            for weight, count in zip(weights, counts, strict=True)
        ]

    def _by_vertical(self, labels: NDArray[np.int64], values: NDArray[np.float32]) -> list[tuple[Tensor, ...]]:
        """Return for each vertical where targets are, as (rows, columns in it, values), on the device."""
        place = self._place[labels]
        rows, columns = np.nonzero(values)
        at, z = place[rows, columns], values[rows, columns]
        order = np.argsort(at, kind="stable")
        rows, at, z = rows[order], at[order], z[order]
        cuts = np.searchsorted(at, self._starts)
        found = []
        for v, start in enumerate(self._starts[:-1]):
            part = slice(cuts[v], cuts[v + 1])
            arrays = (rows[part], at[part] - start, z[part])
            found.append(tuple(torch.from_numpy(array).to(self._device) for array in arrays))
        return found


class SparseSoftmax:
    """T^2 times cross-entropy to unified labels of which the K highest are kept, mean over the batch.

    The rest of a sample's mass is spread evenly over the other classes: the K are as they were, and nothing is said of
    the order of the rest. With f a class's part of the rest, the loss is logsumexp(x) - f sum_j x_j -
    sum_k (z_k - f) x_{j_k}, x = scores / T. `weights` (n,): how much each sample counts; None: all alike. The rest as
    `SparseSigmoid`; scores alone are taken.
    """

    def __init__(
        self,
        targets: SparseTargets,
        device: torch.device,
        temperature: float = 1.0,
        fingerprint: str = "",
        samples: NDArray[np.int64] | None = None,
        weights: NDArray[np.floating] | None = None,
    ) -> None:
        self.fingerprint = f"sparse-softmax {targets.labels.shape} {temperature} {fingerprint}"
        self._targets, self._samples, self._device, self._temperature = targets, samples, device, temperature
        self._weights, self._resident = weights, Resident()

    def __call__(self, logits: Tensor, ids: Tensor) -> Tensor:
        """Return the scalar loss of (b, L) logits for the samples `ids` (b,)."""
        labels, values = read(self._targets, self._samples, ids, self._resident)
        at, z = torch.from_numpy(labels).to(self._device), torch.from_numpy(values).to(self._device)
        x = logits / self._temperature
        rest = x.shape[1] - z.shape[1]
        flat = (1 - z.sum(dim=1)).clamp_min(0) / rest if rest else z.new_zeros(len(z))
        terms = torch.logsumexp(x, dim=1) * (z.sum(dim=1) + flat * rest)
        terms = terms - flat * x.sum(dim=1) - ((z - flat[:, None]) * x.gather(1, at)).sum(dim=1)
        if self._weights is not None:
            rows = ids.cpu().numpy() if self._samples is None else self._samples[ids.cpu().numpy()]
            terms = terms * torch.from_numpy(np.asarray(self._weights[rows], np.float32)).to(self._device)
        return terms.mean() * self._temperature**2


def read(
    targets: SparseTargets, samples: NDArray[np.int64] | None, ids: Tensor, resident: Resident
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return a batch's (b, K) classes and values."""
    rows = ids.cpu().numpy() if samples is None else samples[ids.cpu().numpy()]
    resident.note(2 * len(rows), [targets.labels, targets.values])
    return targets.labels[rows].astype(np.int64), np.asarray(targets.values[rows], np.float32)
