"""What of soft labels and answers a student learns that is to tell apart some classes alone.

Lives here: the cut of a batch's rows, and its derivation. Does not live here: which classes are wanted (server/chosen)
and the losses that take the cut.

With W the wanted classes and q a label over all of them, the cross-entropy to q falls apart by the chain rule:

    H(q, s) = H(Bernoulli(q(W)), s(W)) + q(W) H(q | W, s | W) + (1 - q(W)) H(q | not W, s | not W).

Only the middle term speaks of the odds between wanted classes, which are all that a student of W has. So it learns
q | W, and a sample counts by q(W): one of another class leaves training in proportion. With `other`, first and middle
term together are the cross-entropy to (q(l) for l in W, 1 - q(W)): the student has one more output for all else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Wanted:
    """Classes of the label space that a student learns, in the order of its outputs.

    `other`: one more output, the last, stands for all else. `scale` is what the weights of samples are multiplied by,
    so that they are about 1 on average and a training step keeps its size, however few samples are of wanted classes.
    """

    classes: tuple[int, ...]
    other: bool = False
    scale: float = 1.0

    @property
    def fingerprint(self) -> str:
        """What tells it from other choices."""
        return f"wanted {list(self.classes)} {self.other} {self.scale}"

    def labels(self, probs: Tensor, outside: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return soft labels (b, outputs) float64 and the samples' weights (b,), None where all count alike.

        `probs` (b, W): the wanted classes' columns of unified labels; `outside` (b,) in [0, 1]: how likely a sample is
        outside the label space. Where no mass is wanted, the row is even and its weight 0.
        """
        told = probs.double()
        if self.other:
            told = told if outside is None else told * (1 - outside.double())[:, None]
            rest = (1 - told.sum(dim=1, keepdim=True)).clamp(min=0)
            return torch.cat([told, rest], dim=1), None
        mass = told.sum(dim=1, keepdim=True)
        rows = torch.where(mass > 0, told / mass, 1 / told.shape[1])
        weights = mass[:, 0] * self.scale
        return rows, weights if outside is None else weights * (1 - outside.double())

    def site(self, classes: Sequence[int]) -> SitePart:
        """Return the part of a site whose answers are about `classes` of the label space, in their order."""
        place = {label: at for at, label in enumerate(self.classes)}
        columns = [column for column, label in enumerate(classes) if label in place]
        rest = [column for column, label in enumerate(classes) if label not in place]
        outputs = [place[classes[column]] for column in columns]
        pooled = self.other and bool(rest)
        return SitePart(columns, rest, [*outputs, len(self.classes)] if pooled else outputs, pooled)


@dataclass(frozen=True)
class SitePart:
    """What of a site's answers is about wanted classes: `columns` of its answer are, `rest` are not.

    `outputs` are the student's, one a column, and the last one too where the rest is `pooled` into it.
    """

    columns: list[int]
    rest: list[int]
    outputs: list[int]
    pooled: bool

    @property
    def tells(self) -> bool:
        """Whether a site's answers say anything about wanted classes."""
        return bool(self.columns)

    def cut(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probabilities (b, outputs) and the answer's wanted mass (b,), of the scores (b, k) of its classes.

        Where the rest is pooled its probability is the last column; else rows are over the wanted classes alone, even
        where the mass is 0. Rows that hold NaN stay NaN.
        """
        told = torch.log_softmax(scores, dim=1)
        wanted = told[:, self.columns]
        if self.pooled:
            every = torch.cat([wanted, told[:, self.rest].logsumexp(dim=1, keepdim=True)], dim=1)
            return every, wanted.exp().sum(dim=1)
        total = wanted.logsumexp(dim=1, keepdim=True)
        rows = torch.where(total == -torch.inf, torch.zeros_like(wanted), wanted - total)
        return torch.log_softmax(rows, dim=1), total.exp()[:, 0]
