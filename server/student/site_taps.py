"""Sites' features as learning takes them: one tap of one site, a batch of samples at a time, from its store.

Lives here: shape, scale, and which samples a site told. Does not live here: the store itself (server/answers), and
what is learnt from features (learn_common, learn_layers).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from consilience.common.cards import TapCard
from consilience.common.files import canonical_json, sha256
from consilience.server.answers import AnswerStore
from consilience.server.components import read_components

BLOCK_VALUES = 2**22
"""Numbers that a block of features holds at most, for each site."""
FEW = 0.5
"""Below this share of the samples that can be learnt from, too few are told by all sites together."""
SCALE_SAMPLES = 256
"""Samples, spread evenly, that a tap's scale is measured on."""
BOUND = 10.0
"""Scales that a sample's root mean square is at most: what is larger than any honest sample is brought down to it."""


@dataclass(frozen=True)
class SiteTap:
    """What one site tells of one of its teacher's layers; `store` holds it."""

    site: str
    card: TapCard
    store: AnswerStore
    components: Path | None = None
    """Where its principal components lie; None where there are none, and where the job needs none."""

    @cached_property
    def known(self) -> NDArray[np.bool_]:
        """Which of the pool's samples the site told, (size,) bool."""
        return self.store.answered(0, self.store.about.size)

    @cached_property
    def scale(self) -> float:
        """Root mean square of the features of the median one of a few samples, which a single odd one does not move.

        Of all of these where that is 0; 1 where they are all 0, or there are none.
        """
        ids = np.flatnonzero(self.known)
        if not len(ids):
            return 1.0
        some = ids[np.unique(np.linspace(0, len(ids) - 1, SCALE_SAMPLES).astype(np.int64))]
        squares = np.concatenate([_mean_squares(self.take(part)) for part in in_blocks(some, self.card.values)])
        return float(np.sqrt(np.median(squares) or np.mean(squares))) or 1.0

    @cached_property
    def fingerprint(self) -> str:
        """What tells these features from others, and which samples are told."""
        about = self.store.about.model_dump(mode="json")
        held = [about, list(self.store.missing()), self.card.model_dump(mode="json")]
        return sha256(canonical_json([*held, f"by the median, bounded at {BOUND:g}"]))

    def take(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the features of the samples `ids` (b,) as they left the site, (b, *card.shape) float32.

        Raises `StorageError` when one is missing or has changed since it was stored.
        """
        return self.store.take(ids).reshape(len(ids), *self.card.shape)

    def bounded(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the same, a sample of a root mean square above `BOUND` scales brought down to it. Raises as `take`."""
        held = self.take(ids)
        large = np.sqrt(_mean_squares(held)) / (BOUND * self.scale)
        if (large > 1).any():
            held = held / np.maximum(large, 1).astype(np.float32).reshape(-1, *[1] * (held.ndim - 1))
        return held

    def channels(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return `bounded` in the layer's own channels, (b, card.channels, ...): of components, what they stand for.

        Raises `StorageError` as `take`, and where the components themselves are lost or damaged.
        """
        held = self.bounded(ids)
        if self.card.components is None:
            return held
        directions, mean = self._basis
        flat = directions.T @ held.reshape(len(ids), len(directions), -1) + mean[:, None]
        return flat.reshape(len(ids), len(mean), *self.card.shape[1:])

    @cached_property
    def _basis(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        assert self.components is not None
        return read_components(self.components, self.card)


def _mean_squares(features: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return each sample's, (b,)."""
    found: NDArray[np.float64] = np.square(features, dtype=np.float64).mean(axis=tuple(range(1, features.ndim)))
    return found


def told_by_all(taps: Sequence[SiteTap], samples: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the places in `samples` (m,), pool ids, of those that every one of `taps` tells, ascending."""
    return np.flatnonzero(np.logical_and.reduce([tap.known[samples] for tap in taps]))


def most_together(known: Mapping[str, NDArray[np.bool_]], enough: Callable[[Collection[str]], bool]) -> list[str]:
    """Return the sites that stay where those are left out that keep the samples told by all below `FEW`.

    `known[site]` (m,): which samples it told. One at a time leaves, of those after whose leaving the others are
    `enough`: the one by which most samples are gained, then the one that told fewest, then by name. None does in vain.
    """
    left = sorted(known)
    stages = [(int(np.logical_and.reduce([known[site] for site in left]).sum()), left)]
    while stages[-1][0] < FEW * len(known[left[0]]):
        may = [site for site in left if enough([other for other in left if other != site])]
        if not may:
            break
        count = np.sum([known[site] for site in left], axis=0)
        gained = {site: int(((count == len(left) - 1) & ~known[site]).sum()) for site in may}
        out = min(may, key=lambda site: (-gained[site], int(known[site].sum()), site))
        left = [site for site in left if site != out]
        stages.append((stages[-1][0] + gained[out], left))
    return max(stages, key=lambda stage: stage[0])[1]  # the first of the best


def in_blocks(ids: NDArray[np.int64], values: int, most: int = BLOCK_VALUES) -> Iterator[NDArray[np.int64]]:
    """Yield `ids` in parts of at most `most` numbers where a sample is `values`; at least one sample each."""
    step = max(1, most // values)
    for start in range(0, len(ids), step):
        yield ids[start : start + step]
