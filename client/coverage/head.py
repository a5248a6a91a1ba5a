"""Small classifiers on vectors, cross-fitted: every image is scored by one that has not learned from it.

Lives here: which part an image belongs to, the heads, their training. Does not live here: where vectors come from
(vectors), the loss (risk), and prior and calibration (by_heads).

An image's part is decided by its bytes. Head k learns from private and pool images of all parts but k, and scores the
images of part k: private ones, the pool's, their copies, and any other. So every image, now or later, is scored in the
same way, by a head to which it is new, and what is fitted to some of these scores holds for all.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from consilience.client.coverage.risk import PositiveUnlabelled
from consilience.client.coverage.samples import repeats
from consilience.common.nets import default_device
from consilience.common.nets.loop import one_cycle
from consilience.common.nets.optimizers import plain
from consilience.common.nets.seeding import generator, seeded
from consilience.common.seeds import derive

PARTS = 5
WIDTH = 64
"""Hidden units of a head."""
EPOCHS = 15
BATCH = 256
LEARNING_RATE = 1e-2
WEIGHT_DECAY = 1e-4
_FLAT = 1e-6
"""A number that differs by less than this between the pool's images says nothing, and is left as it is."""


def parts_of(digests: list[str]) -> NDArray[np.int64]:
    """Return the parts (n,) in [0, PARTS) of images with these digests."""
    return np.array([int(digest[:8], 16) % PARTS for digest in digests], np.int64)


class Heads(nn.Module):
    """PARTS classifiers of K + 1 outputs ("none of mine" last) behind one standardisation, for vectors (n, size)."""

    centre: Tensor
    scale: Tensor

    def __init__(self, size: int, classes: int, seed: int = 0) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))
        with seeded(derive(seed, "initial weights")):
            self.heads = nn.ModuleList(
                nn.Sequential(nn.Linear(size, WIDTH), nn.ReLU(), nn.Linear(WIDTH, classes + 1)) for _ in range(PARTS)
            )

    def scores(self, vectors: NDArray[np.float32], parts: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return (n,) log-odds of "one of mine" for vectors (n, size), each by the head of its part (n,)."""
        found = np.empty(len(vectors), np.float64)
        device = self.centre.device
        with torch.inference_mode():
            for part, head in enumerate(self.heads):
                rows = np.flatnonzero(parts == part)
                standard = (torch.from_numpy(vectors[rows]).to(device) - self.centre) / self.scale
                logits = head(standard).double()
                odds = torch.logsumexp(logits[:, :-1], dim=1) - logits[:, -1]
                found[rows] = odds.cpu().numpy()
        return found


def train_heads(
    private: NDArray[np.float32],
    labels: NDArray[np.int64],
    classes: int,
    pool: NDArray[np.float32],
    parts: tuple[NDArray[np.int64], NDArray[np.int64]],
    prior: float,
    seed: int,
    epochs: int = EPOCHS,
    weights: NDArray[np.float64] | None = None,
) -> Heads:
    """Return heads that have learned from private vectors (n, size) of `labels` (n,) in [0, classes), and the pool's.

    `parts` are the parts of both, (n,) and (m,); `prior` and `weights` are as `PositiveUnlabelled` takes them. On the
    CPU the same arguments give the same heads. Vectors are finite; n and m at least 1.
    """
    device = default_device()
    heads = Heads(private.shape[1], classes, seed)
    deviation = pool.std(axis=0, dtype=np.float64)
    heads.centre.copy_(torch.from_numpy(pool.mean(axis=0, dtype=np.float64)))
    heads.scale.copy_(torch.from_numpy(np.where(deviation > _FLAT, deviation, 1.0)))
    heads.to(device)
    inputs = torch.from_numpy(np.concatenate([private, pool])).to(device).sub_(heads.centre).div_(heads.scale)
    counts = None if weights is None else torch.tensor(weights, dtype=torch.float32).to(device)
    loss = PositiveUnlabelled(torch.from_numpy(labels).to(device), classes, prior, "vectors", counts)
    part_of, ours = np.concatenate(parts), np.arange(len(private) + len(pool)) < len(private)
    for part, head in enumerate(heads.heads):
        own, others = (np.flatnonzero((part_of != part) & who) for who in (ours, ~ours))
        times = repeats(len(own), len(others))
        ids = np.concatenate([own] * times[0] + [others] * times[1])
        _train(head, inputs, ids, loss, epochs, derive(seed, "head", part))
    return heads.eval()


def _train(
    head: nn.Module, inputs: Tensor, ids: NDArray[np.int64], loss: PositiveUnlabelled, epochs: int, seed: int
) -> None:
    """Train one head on the rows `ids` of `inputs`."""
    batch = max(1, min(BATCH, len(ids)))
    steps = len(ids) // batch
    optimizer = plain(torch.optim.AdamW)(head.parameters(), weight_decay=WEIGHT_DECAY, fused=True)
    known = torch.from_numpy(ids)
    for epoch in range(epochs):
        order = known[torch.randperm(len(ids), generator=generator(seed, "order", epoch))].to(inputs.device)
        for step in range(steps):
            rows = order[step * batch : (step + 1) * batch]
            optimizer.param_groups[0]["lr"] = one_cycle(epoch * steps + step, epochs * steps, LEARNING_RATE)
            optimizer.zero_grad()
            torch.autograd.backward(loss(head(inputs[rows]), rows))
            optimizer.step()
