"""How good the student is by the sites' answers alone: an estimate where nobody has labels.

Lives here: the estimate, its interval, and what would mend what is weak. Does not live here: where arrays come from
(server/publishing_quality), wording of the report (server/report_quality). No true label comes in here.

Were the unified labels q calibrated, the student would be right with probability q(its class) on average. They are as a
rule too timid or too bold. So q is sharpened with the b at which the labels say of the *sites'* own classes what is
known of them: that site i is right on a sample of its classes as often as on its held-out images, or, where a site does
not tell that, as often as its calibrated answers claim. What is known so is how well a site tells *its own* classes
apart; how likely a sample is of them at all nobody has measured, and that stays as the labels have it:

    p(c) ~ mean over sites i of q(L_i) q(c)^b / q^b(L_i)        of those that tell c, those that know the most classes

Where one site knows all classes that is q^b. Where no site tells c but in groups, those that know it so are taken; a
class of sites that were left out alone stays q(c). Assumed is that the pool's images of a class look like the sites',
that it has the classes in their proportions, and that errors of labels and student come from the same doubt; a student
trained on the pool has learnt errors of the labels too.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from consilience.common.labels import LabelSpace
from consilience.server.judge_groups import Columns

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Advice = Literal["", "more pool", "more owners", "recalibrate"]

SHARPENINGS = np.exp(np.linspace(-math.log(8), math.log(8), 65))
"""The exponents b that are tried; between them is interpolated."""
WEAK = 0.7
"""A class that is estimated to be recognised less often is weak, and told what would mend it."""
LAGS = 0.05
"""A student that is right so much less often than its labels needs a larger pool, or longer training."""
FEWEST = 100
"""Samples below which nothing is estimated; of a class 20."""
FEWEST_OF_CLASS = 20.0
MODEL_ERROR = 0.02
"""Standard error of what the assumptions are worth; measured by benchmarks/quality.py."""
CONTRADICTED = 0.1
"""Where labels and sites differ by more about how often sites are right, beyond chance, nothing is estimated."""
_TINY = 1e-12


class Estimate(BaseModel):
    """A share, and the interval that holds it in 95 of 100 cases if the assumptions do."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    value: float
    low: float
    high: float


class ClassQuality(BaseModel):
    """One class: how often the student recognises it; None where the pool shows too few of it.

    `labels`: how often the unified labels do. `owners`: sites that tell it from others: of a class of one site alone,
    its own word is all there is. `advice`: what would mend a weak class.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    recall: Estimate | None
    labels: float | None
    owners: int
    samples: float
    advice: Advice = ""


class SiteQuality(BaseModel):
    """One site: how often the student is right on samples of its classes, `student`, and what the site itself is.

    A site is right on a group where it holds the sample's class; the student has to name the class.

    `student` is None where nothing can be estimated.

    `known`: how often the site is right on its classes, by `by`; `labels`: the same by the sharpened labels. Where the
    two differ by more than chance, its calibration or its held-out images are unlike the pool: `recalibrate`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    student: Estimate | None
    known: float
    by: Literal["held-out", "claimed"]
    labels: float
    advice: Advice = ""


class Quality(BaseModel):
    """All that is estimated; with `reason` where nothing can be, and then at most what contradicts it at `sites`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    accuracy: Estimate | None = None
    unsharpened: float | None = None
    sharpening: float | None = None
    samples: int = 0
    classes: dict[str, ClassQuality] = {}
    sites: dict[str, SiteQuality] = {}
    reason: str = ""


@dataclass(frozen=True)
class Rows:
    """b samples: unified labels (b, L), the student's classes (b,), and by site its answers (b, k_i), None for none.

    A site's answers are in the order of `LabelSpace.entries`.

    Answers are log-probabilities; labels need not be normalised, but no row may be 0 throughout.
    """

    labels: NDArray[np.floating]
    student: Ints
    answers: Sequence[NDArray[np.floating] | None]


@dataclass(frozen=True)
class HeldOut:
    """What a site tells of its teacher: accuracy on `samples` images kept out of training."""

    accuracy: float
    samples: int


def estimate(
    space: LabelSpace, rows: Iterable[Rows], held_out: Sequence[HeldOut | None], left_out: Container[int] = ()
) -> Quality:
    """Estimate from blocks of rows, in one pass; memory is 65 numbers a class, and a few times those of a block.

    `held_out`: one a site of `space`, None for a site that does not tell. `left_out`: sites that nothing is made of;
    `rows` have none of their answers.
    """
    sums = _Sums(space, left_out)
    for block in rows:
        sums.add(block)
    if sums.samples < FEWEST:
        return Quality(reason=f"there are {sums.samples} samples; below {FEWEST} nothing is estimated")
    return sums.quality(held_out)


class _Sums:
    """Expectations under q^b over samples, for every b at once."""

    def __init__(self, space: LabelSpace, left_out: Container[int]) -> None:
        sites, size, tried = len(space.sites), len(space), len(SHARPENINGS)
        self.space, self.samples = space, 0
        self._sets = [np.array(classes) for classes in space.class_sets]
        self._columns = [Columns.of(space, site) for site in range(sites)]
        self._judged = _judged(space, left_out)
        self._judges = np.zeros(size)
        for own, judged in zip(self._sets, self._judged, strict=True):
            self._judges[own[judged]] += 1
        self._mass, self._right, self._best = (np.zeros((tried, size)) for _ in range(3))
        self._site_right, self._site_mass = np.zeros((tried, sites)), np.zeros((tried, sites))
        self._claimed, self._claims = np.zeros(sites), np.zeros(sites)
        self._whole = np.zeros(tried)

    def add(self, block: Rows) -> None:
        labels = np.maximum(np.asarray(block.labels, np.float64), _TINY)
        logs = np.log(labels)
        logs -= logs.max(axis=1, keepdims=True)
        n, size = np.arange(len(logs)), len(self.space)
        best = logs.argmax(axis=1)
        self.samples += len(logs)
        plain = np.exp(logs)
        inside = [plain[:, own].sum(axis=1) for own in self._sets]
        tops: list[Ints | None] = []
        for i, answers in enumerate(block.answers):
            if answers is None:
                tops.append(None)
                continue
            rows = np.asarray(answers, np.float64)
            tops.append(rows.argmax(axis=1))
            claims = np.exp(rows.max(axis=1) - np.logaddexp.reduce(rows, axis=1))
            mine = inside[i] / plain.sum(axis=1)
            self._claimed[i] += float(mine @ claims)
            self._claims[i] += float(mine.sum())
        for k, sharpening in enumerate(SHARPENINGS):
            probs = self._sharpened(np.exp(sharpening * logs), plain, inside)
            right = probs[n, block.student]
            self._mass[k] += probs.sum(axis=0)
            self._right[k] += np.bincount(block.student, right, size)
            self._best[k] += np.bincount(best, probs[n, best], size)
            self._whole[k] += right.sum()
            for i, top in enumerate(tops):
                if top is not None:
                    own = self._columns[i].summed(probs[:, self._sets[i]])
                    self._site_right[k, i] += own[n, top].sum()
                    self._site_mass[k, i] += own.sum()

    def _sharpened(self, powers: Floats, plain: Floats, inside: Sequence[Floats]) -> Floats:
        """Return p (b, L) for q^b and q, neither normalised, and what q has (b,) in each site's classes."""
        probs = np.where(self._judges == 0, plain, 0.0)
        for own, judged, mass in zip(self._sets, self._judged, inside, strict=True):
            if judged.any():
                theirs = powers[:, own]
                probs[:, own[judged]] += theirs[:, judged] * (mass / theirs.sum(axis=1))[:, None]
        probs /= np.maximum(self._judges, 1)
        normal: Floats = probs / probs.sum(axis=1, keepdims=True)
        return normal

    def quality(self, held_out: Sequence[HeldOut | None]) -> Quality:
        space, present = self.space, [i for i, m in enumerate(self._claims) if m > 0 and len(self._sets[i]) > 1]
        if not present:
            return Quality(reason="no site that tells classes apart answered")
        known = [
            held.accuracy if (held := held_out[i]) is not None else self._claimed[i] / self._claims[i] for i in present
        ]
        counts = [float(held.samples) if (held := held_out[i]) is not None else math.inf for i in present]
        said = self._site_right[:, present] / np.maximum(self._site_mass[:, present], _TINY)
        target, curve = float(np.mean(known)), np.maximum.accumulate(said.mean(axis=1))
        at = _place(curve, target)
        left = np.array([_at(said[:, k], at) for k in range(len(present))]) - known
        chance = sum(a * (1 - a) / c for a, c in zip(known, counts, strict=True)) / len(present) ** 2
        spread = float(np.var(left, ddof=1)) / len(present) if len(present) > 1 else 0.0
        noise = float(np.mean([a * (1 - a) / c for a, c in zip(known, counts, strict=True)]))
        beyond = math.sqrt(max(float(np.mean(left**2)) - noise, 0.0))
        possible = beyond <= CONTRADICTED and 0 < at < len(curve) - 1
        error = math.sqrt(max(chance, spread) + MODEL_ERROR**2)
        lower, upper = _place(curve, target - 2 * error), _place(curve, target + 2 * error)

        def told(values: Floats, samples: float) -> Estimate:
            value = _at(values, at)
            half = 2 * math.sqrt(max(value * (1 - value), 0.0) / max(samples, 1.0))
            low, high = (
                min(_at(values, x) for x in (lower, at, upper)),
                max(_at(values, x) for x in (lower, at, upper)),
            )
            return Estimate(
                value=value,
                low=max(0.0, value - math.hypot(value - low, half)),
                high=min(1.0, value + math.hypot(high - value, half)),
            )

        recall, labels = (part / np.maximum(self._mass, _TINY) for part in (self._right, self._best))
        shares = np.array([_at(self._mass[:, c], at) for c in range(len(space))])
        classes = {}
        for c, name in enumerate(space.names):
            owners, value = len(space.tellers[c]), _at(labels[:, c], at)
            enough = shares[c] >= FEWEST_OF_CLASS
            found = told(recall[:, c], shares[c]) if enough else None
            classes[name] = ClassQuality(
                recall=found,
                labels=value if enough else None,
                owners=owners,
                samples=float(shares[c]),
                advice=_advice(None if found is None else found.value, value, owners),
            )
        sites = {}
        for k, i in enumerate(present):
            mass = self._mass[:, self._sets[i]].sum(axis=1)
            inside = self._right[:, self._sets[i]].sum(axis=1) / np.maximum(mass, _TINY)
            own = math.sqrt(known[k] * (1 - known[k]) / counts[k] + spread * possible + MODEL_ERROR**2)
            off = abs(left[k]) > 3 * own
            sites[space.sites[i]] = SiteQuality(
                student=told(inside, _at(mass, at)) if possible else None,
                known=float(known[k]),
                by="claimed" if held_out[i] is None else "held-out",
                labels=float(known[k] + left[k]),
                advice="recalibrate" if off else "",
            )
        if not possible:
            differ = (
                f"differ by {100 * beyond:.0f} points beyond chance"
                if beyond > CONTRADICTED
                else "cannot be reconciled"
            )
            return Quality(
                reason=f"what sites tell of their own accuracy and what the unified labels say of it {differ}, so that "
                "the pool’s images or their proportions are unlike the sites’",
                samples=self.samples,
                sites=sites,
            )
        whole = self._whole / self.samples
        return Quality(
            accuracy=told(whole, self.samples),
            unsharpened=float(whole[len(SHARPENINGS) // 2]),
            sharpening=float(np.exp(np.interp(at, np.arange(len(SHARPENINGS)), np.log(SHARPENINGS)))),
            samples=self.samples,
            classes=classes,
            sites=sites,
        )


def _judged(space: LabelSpace, left_out: Container[int]) -> list[NDArray[np.bool_]]:
    """Say of each site's classes, (k_i,), which it tells apart: of those that do, the sites that know the most."""
    judged = [np.zeros(len(own), np.bool_) for own in space.class_sets]
    places = [{c: k for k, c in enumerate(own)} for own in space.class_sets]
    for c in range(len(space)):
        able = [i for i in space.tellers[c] or space.owners[c] if i not in left_out]
        most = max((len(judged[i]) for i in able), default=0)
        for i in able:
            if len(judged[i]) == most:
                judged[i][places[i][c]] = True
    return judged


def _advice(recall: float | None, labels: float, owners: int) -> Advice:
    """Say what would mend a class; the labels come first, for a student is hardly better than they."""
    if recall is None:
        return "more pool"
    if recall >= WEAK:
        return ""
    if labels - recall > LAGS:
        return "more pool"
    return "more owners" if owners < 3 else "recalibrate"


def _place(curve: Floats, value: float) -> float:
    """Return where a curve that never falls reaches `value`, as a number of its points; at an end where it does not."""
    if value <= curve[0]:
        return 0.0
    if value >= curve[-1]:
        return float(len(curve) - 1)
    k = int(np.searchsorted(curve, value))
    return k - 1 + float((value - curve[k - 1]) / (curve[k] - curve[k - 1]))


def _at(values: Floats, place: float) -> float:
    """Return a curve's value at a place between its points."""
    return float(np.interp(place, np.arange(len(values)), values))
