"""Learning the teachers' concatenated scores: by squared error, the score layer and joint phase of methods.md 1.3 and
1.4, and by the softmax over them, L_D of methods.md 2.3.

Lives here: the target and its losses for the training loop. Does not live here: unified soft labels, which take classes
that several sites know (soft_labels).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from consilience.common.errors import StudentError
from consilience.server.student.wanted import Wanted

SQUARED_RATE = 0.3
"""Of the scores' squared error, the learning rate over that of other losses: its gradient grows with the scores."""
SCORE_LAYER_RATE = 0.1
"""The same of the score layer by itself, whose rate is constant, and whose bound falls with the features' number."""


class ConcatenatedScores:
    """1/2 |s(x) - [z_1(x); ...; z_N(x)]|^2, mean over the batch (Shen et al., AAAI 2019).

    `scores[i]` (n, k_i) floating, typically a memory map; `class_sets[i]` their classes in the label space, which are
    the student's outputs. They are log-probabilities, which are what sites send: logits up to an offset a row. z_i are
    they less their row's mean. A network that learned by cross-entropy has logits of a mean close to 0, for the
    gradients of a row's logits sum to 0; the offset of log-probabilities is another, the larger the surer a site is,
    and fitting that would cost the student more than all else. `samples` (m,): training's sample j has the scores
    `scores[i][samples[j]]`; None: all are learnt from. `fingerprint` names what the scores are, so that a training is
    not resumed with others. `wanted`: the classes that the student's outputs stand for, and nothing else, for which the
    sum loses its other terms; None: all. Raises `StudentError` unless each class 0, ..., L - 1 is known to exactly one
    site.
    """

    def __init__(
        self,
        scores: Sequence[NDArray[np.floating]],
        class_sets: Sequence[Sequence[int]],
        device: torch.device,
        fingerprint: str = "",
        samples: NDArray[np.int64] | None = None,
        wanted: Wanted | None = None,
    ) -> None:
        owners = np.bincount(np.concatenate([np.asarray(classes, np.int64) for classes in class_sets]))
        if (owners != 1).any():
            odd = int(np.flatnonzero(owners != 1)[0])
            raise StudentError(
                f"Class {odd} is known to {owners[odd]} sites; concatenated scores need each class to be known to "
                "exactly one",
                hint="Learn from unified soft labels, which take classes that several sites know",
            )
        self.fingerprint = f"{type(self).__name__} centred {[list(classes) for classes in class_sets]} {fingerprint}"
        if wanted is not None:
            self.fingerprint += f" {wanted.fingerprint}"
        self._scores, self._class_sets, self._device, self._classes = scores, class_sets, device, len(owners)
        self._samples, self._wanted = samples, wanted

    def target(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return (b, L) float32: the samples' scores z, each class's in its place."""
        if self._samples is not None:
            ids = self._samples[ids]
        rows = np.empty((len(ids), self._classes), np.float32)
        for scores, classes in zip(self._scores, self._class_sets, strict=True):
            held = scores[ids]
            rows[:, classes] = held - held.mean(axis=1, keepdims=True)
        return rows

    def __call__(self, logits: Tensor, ids: Tensor) -> Tensor:
        """Return the scalar loss of (b, L) logits for the samples `ids` (b,)."""
        target = torch.from_numpy(self.target(ids.cpu().numpy())).to(self._device)
        if self._wanted is not None:
            target = target[:, list(self._wanted.classes)]
        return (logits - target).square().sum(dim=1).mean() / 2


class ConcatenatedSoftmax(ConcatenatedScores):
    """T^2 H(softmax([z_1(x); ...; z_N(x)] / T), softmax(s / T)), mean over the batch (Luo et al., IJCAI 2019).

    Where sites share no class this is their unified label by the rule `centred`. What is `wanted` of the softmax is cut
    out as of a unified label, `other` included.
    """

    def __init__(
        self,
        scores: Sequence[NDArray[np.floating]],
        class_sets: Sequence[Sequence[int]],
        device: torch.device,
        fingerprint: str = "",
        samples: NDArray[np.int64] | None = None,
        wanted: Wanted | None = None,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(scores, class_sets, device, fingerprint, samples, wanted)
        self.fingerprint += f" {temperature}"
        self._temperature = temperature

    def __call__(self, logits: Tensor, ids: Tensor) -> Tensor:
        """Return the scalar loss of (b, L) logits for the samples `ids` (b,)."""
        target = torch.from_numpy(self.target(ids.cpu().numpy())).to(self._device)
        probs, weights = torch.softmax(target / self._temperature, dim=1), None
        if self._wanted is not None:
            cut, weights = self._wanted.labels(probs[:, list(self._wanted.classes)])
            probs = cut.float()
        terms = -(probs * torch.log_softmax(logits / self._temperature, dim=1)).sum(dim=1)
        if weights is not None:
            terms = terms * weights.float()
        return terms.mean() * self._temperature**2
