"""Learning from the sites' answers directly: the -BP route of methods.md 6.8.

The student's own logits stand in place of the unified label, and the estimator's objective is back-propagated. No
gradient flows between components of the class-overlap graph: the caller warns where there are several.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from numpy import typing as npt
from numpy.typing import NDArray
from torch import Tensor

from consilience.server.student.wanted import SitePart, Wanted


class _Direct(ABC):
    """Answers of several sites, read a batch at a time.

    `answers[i]` (n, k_i) floating log-probabilities, typically a memory map; `class_sets[i]` their classes;
    `weights[i]` the site's weight. `fingerprint` names what the answers are, so that a training is not resumed with
    others.

    Sites need not have answered every sample: `answered` (n, N) bool says who did, None when all did. A sample's
    loss is then the weighted mean over the sites that answered it, as its unified label would be; rows of `answers`
    that no site gave only have to be finite. `samples` (m,) are the rows that are learnt from, where not all are:
    training's sample j has the answers `answers[i][samples[j]]`; each needs a site that answered.

    `wanted`: the classes that the student's outputs stand for; None: all. A site's answer is then cut to those of its
    classes that are wanted, and its part of a sample's loss weighed by what it gives them together.
    """

    def __init__(
        self,
        answers: Sequence[NDArray[np.floating]],
        class_sets: Sequence[Sequence[int]],
        weights: Sequence[float],
        device: torch.device,
        temperature: float = 1.0,
        fingerprint: str = "",
        answered: NDArray[np.bool_] | None = None,
        samples: NDArray[np.int64] | None = None,
        wanted: Wanted | None = None,
    ) -> None:
        self.fingerprint = f"{type(self).__name__} {temperature} {list(weights)} {fingerprint}"
        self._answers, self._weights, self._device, self._temperature = answers, weights, device, temperature
        self._wanted, self._parts = wanted, None if wanted is None else [wanted.site(held) for held in class_sets]
        if wanted is not None:
            self.fingerprint += f" {wanted.fingerprint}"
        outputs = class_sets if self._parts is None else [part.outputs for part in self._parts]
        self._class_sets = [torch.tensor(classes, dtype=torch.int64, device=device) for classes in outputs]
        self._answered, self._samples = answered, samples

    def __call__(self, logits: Tensor, ids: Tensor) -> Tensor:
        """Return the scalar loss of (b, L) logits for the samples `ids` (b,)."""
        rows = ids.cpu().numpy()
        if self._samples is not None:
            rows = self._samples[rows]
        shares = None if self._answered is None else self._shares(self._answered[rows])
        total = logits.new_zeros(())
        for i, (answers, classes, weight) in enumerate(
            zip(self._answers, self._class_sets, self._weights, strict=True)
        ):
            part = None if self._parts is None else self._parts[i]
            if part is not None and not part.tells:
                continue
            given = torch.from_numpy(np.asarray(answers[rows], np.float32)).to(self._device)
            if part is None:
                terms = self._terms(given / self._temperature, logits[:, classes] / self._temperature)
                terms = self._covered(i, rows, terms * self._temperature**2, logits)
            else:
                terms = self._wanted_terms(i, part, rows, given, logits)
            if shares is None:
                total = total + weight * terms.mean()
            else:
                total = total + (shares[:, i] * terms.reshape(len(rows), -1).mean(dim=1)).mean()
        if self._wanted is not None:
            total = total * self._wanted.scale
        return total / (sum(self._weights) if shares is None else 1.0)

    def _wanted_terms(
        self, site: int, part: SitePart, rows: NDArray[np.int64], given: Tensor, logits: Tensor
    ) -> Tensor:
        """Return the loss of a site, (b,) or (b, k'), for the part of its answers (b, k) that is wanted."""
        told, mass = part.cut(given / self._temperature)
        terms = self._terms(told, logits[:, part.outputs] / self._temperature) * self._temperature**2
        return terms if part.pooled else terms * mass.reshape(-1, *[1] * (terms.ndim - 1))

    def _shares(self, answered: NDArray[np.bool_]) -> Tensor:
        """Return (b, N): each site's share of a sample's loss, 0 where it did not answer; rows sum to 1."""
        weights = answered * np.asarray(self._weights, np.float32)
        return torch.from_numpy((weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)).to(self._device)

    def _covered(self, site: int, rows: NDArray[np.int64], terms: Tensor, logits: Tensor) -> Tensor:
        """Return the terms of a site with what its coverage of the samples `rows` adds and takes."""
        return terms

    @abstractmethod
    def _terms(self, given: Tensor, own: Tensor) -> Tensor:
        """Return one site's loss, (b,) or (b, k), from (b, k) answers and the student's logits for the same classes."""


class DirectCE(_Direct):
    """sum_i w_i KL(p_i || softmax(s restricted to L_i)) / sum_i w_i, mean over the batch (methods.md 6.8, CE-BP).

    `coverage` (n, N) floating, typically a memory map: how likely site i holds a sample to be of one of its classes,
    NaN where it does not say; None when no site does. `strength`: one number for all sites, or one each, in (0, 1].
    Where a site says c, with q = softmax(s) over all classes, its part is (1 - strength + strength c) KL(p_i ||
    softmax(s restricted to L_i)) + strength BCE(c || q(L_i)). At strength 1 that is the likelihood of its answer when
    "none of mine" is one more choice, which stands for all classes that it does not know; near 0 coverage ties only
    what answers leave open. A site that knows every class has no such choice: its coverage says nothing. At a
    temperature T it is the answers that are softened: BCE is at T = 1.

    With classes W `wanted`, W_i those that site i knows, and m its answer's mass on them, its part is
    m KL(p_i | W_i || softmax(s restricted to W_i)): what the chain rule leaves of KL over L_i that speaks of the odds
    between wanted classes. With `other`, the rest of L_i is one pooled outcome, KL of (p_i(l) for l in W_i, 1 - m) and
    softmax(s restricted to W_i and other). That takes a site's rest for all that nobody wants, and is exact where a
    site that knows any such class knows them all.

    Coverage c weighs the KL by 1 - strength + strength c. Without `other` that is all: how much of what a site does not
    know is wanted, no site says. With it "none of mine" and "my rest" together are all outside W_i, which is exact:
    a site's part is (1 - strength) times the pooled one + strength (c m KL(p_i | W_i || ...) + BCE(c m || q(W_i))).
    """

    def __init__(
        self,
        answers: Sequence[NDArray[np.floating]],
        class_sets: Sequence[Sequence[int]],
        weights: Sequence[float],
        device: torch.device,
        temperature: float = 1.0,
        fingerprint: str = "",
        answered: NDArray[np.bool_] | None = None,
        samples: NDArray[np.int64] | None = None,
        wanted: Wanted | None = None,
        *,
        coverage: NDArray[np.floating] | None = None,
        strength: npt.ArrayLike = 1.0,
    ) -> None:
        super().__init__(answers, class_sets, weights, device, temperature, fingerprint, answered, samples, wanted)
        self._coverage = coverage
        self._every = len({label for classes in class_sets for label in classes})
        self._strength = [float(each) for each in np.broadcast_to(np.asarray(strength, np.float64), (len(answers),))]

    def _covered(self, site: int, rows: NDArray[np.int64], terms: Tensor, logits: Tensor) -> Tensor:
        if self._coverage is None:
            return terms
        if len(self._class_sets[site]) == logits.shape[1]:
            return terms
        c, says = self._told(self._coverage, site, rows)
        strength = self._strength[site]
        terms = (1 - strength + strength * c) * terms
        inside, outside = _in_and_out(logits, self._class_sets[site])
        return terms - strength * torch.where(says, c * inside + (1 - c) * outside, 0.0)

    def _wanted_terms(
        self, site: int, part: SitePart, rows: NDArray[np.int64], given: Tensor, logits: Tensor
    ) -> Tensor:
        plain = super()._wanted_terms(site, part, rows, given, logits)
        if self._coverage is None or len(part.columns) + len(part.rest) == self._every:
            return plain
        c, says = self._told(self._coverage, site, rows)
        strength = self._strength[site]
        if self._wanted is None or not self._wanted.other:
            return (1 - strength + strength * c) * plain
        # The odds between a site's wanted classes, whatever is pooled.
        alone = SitePart(part.columns, part.rest, part.outputs[: len(part.columns)], pooled=False)
        odds = super()._wanted_terms(site, alone, rows, given, logits)
        mine = c * part.cut(given)[1]
        inside, outside = _in_and_out(logits, torch.tensor(alone.outputs, device=self._device))
        covered = c * odds - (mine * inside + (1 - mine) * outside)
        return torch.where(says, (1 - strength) * plain + strength * covered, plain)

    def _told(self, coverage: NDArray[np.floating], site: int, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Return (b,) a site's coverage of the samples `rows`, 1 where it gives none, and (b,) bool where it does."""
        told = torch.from_numpy(np.asarray(coverage[rows, site], np.float32)).to(self._device)
        says = ~told.isnan()
        return torch.where(says, told, 1.0), says

    def _terms(self, given: Tensor, own: Tensor) -> Tensor:
        log_p = torch.log_softmax(given, dim=1)
        log_q = torch.log_softmax(own, dim=1)
        return (log_p.exp() * (log_p - log_q)).sum(dim=1)


def _in_and_out(logits: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Return (b,) the log-probability of `classes`, and of the others, under softmax of (b, L) logits."""
    mine = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
    mine[classes] = True
    whole = torch.logsumexp(logits, dim=1)
    return torch.logsumexp(logits[:, mine], dim=1) - whole, torch.logsumexp(logits[:, ~mine], dim=1) - whole


class DirectMFLF(_Direct):
    """sum_i w_i |centre(z_i) - centre(s restricted to L_i)|^2 / sum_i w_i, mean over the batch and a site's classes.

    methods.md 6.8, MF-LF-BP; the mean over classes instead of the sum keeps the step size independent of k_i.

    |centre(z)|^2 is the sum over pairs of classes of (z_l - z_l')^2 / k: of classes `wanted`, the pairs of two wanted
    classes are kept. A pooled outcome for the others has no such difference.
    """

    def _terms(self, given: Tensor, own: Tensor) -> Tensor:
        difference = given - own
        return (difference - difference.mean(dim=1, keepdim=True)).square()
