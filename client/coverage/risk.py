"""What a coverage network learns from: private samples of known classes, and a pool of which nothing is known.

Lives here: the loss. Does not live here: the training loop (common/nets) and what is made of the network (learned).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from consilience.common.files import canonical_json, sha256


class PositiveUnlabelled:
    """Non-negative risk of a classifier with the site's K classes and "none of mine" (class K), from ids alone.

    Samples 0..len(labels)-1 are private, with `labels` (n,) in [0, K); later ones are the pool's. `prior` in (0, 1] is
    the share of the pool that is of the site's classes. With l the cross-entropy, the risk over the pool's distribution
    is prior * E_private[l(x, its class)] + E_pool[l(x, K)] - prior * E_private[l(x, K)], where the last two are the
    share of the risk of samples that are not mine, which cannot be negative (Kiryo et al., NeurIPS 2017; with several
    positive classes Xu et al., IJCAI 2017). Once a batch makes them negative the network has begun to learn the pool by
    heart: they are left out there. Telling its own classes apart, not just "mine", makes the network see what they are.
    """

    def __init__(self, labels: Tensor, classes: int, prior: float, about: str, weights: Tensor | None = None) -> None:
        """`about` names the samples, so that a training is not resumed with others.

        `weights` (K,): how much a private sample of each class counts, 1 on average over samples; None: 1 each.
        """
        self._labels, self._classes, self._prior, self._weights = labels, classes, prior, weights
        self.fingerprint = sha256(
            canonical_json([about, classes, prior, None if weights is None else weights.tolist()])
        )

    def __call__(self, logits: Tensor, ids: Tensor) -> Tensor:
        """Return the scalar risk of (b, K + 1) logits for the samples `ids` (b,); a part without samples counts 0."""
        log_probs = torch.log_softmax(logits, dim=1)
        private = ids < len(self._labels)
        mine, pool = log_probs[private], log_probs[~private]
        labels = self._labels[ids[private]]
        weights = None if self._weights is None else self._weights[labels]
        of_others = _mean(-pool[:, self._classes]) - self._prior * _mean(-mine[:, self._classes], weights)
        own = -mine.gather(1, labels[:, None])[:, 0]
        return self._prior * _mean(own, weights) + of_others.clamp(min=0)


class OwnClasses:
    """Cross-entropy among the site's K classes; the output "none of mine" (class K) takes no part."""

    def __init__(self, labels: Tensor, classes: int, about: str) -> None:
        """`labels` (n,) in [0, K); `about` as of `PositiveUnlabelled`."""
        self._labels, self._classes = labels, classes
        self.fingerprint = sha256(canonical_json(["own classes", about, classes]))

    def __call__(self, logits: Tensor, ids: Tensor) -> Tensor:
        """Return the mean over the samples `ids` (b,) with (b, K + 1) logits."""
        return nn.functional.cross_entropy(logits[:, : self._classes], self._labels[ids])


def _mean(values: Tensor, weights: Tensor | None = None) -> Tensor:
    return (values if weights is None else values * weights).sum() / max(len(values), 1)
