"""What a report is made from: one typed record of a finished run.

Lives here: the fields, and what follows from them alone. Does not live here: filling them in (server/job), telling
them (server/report, server/card).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from consilience.common.labels import LabelSpace
from consilience.common.pages.numbers import number_of
from consilience.server.audits import SiteAudit
from consilience.server.grouped import told_groups
from consilience.server.judge import Judgement
from consilience.server.judge_coverage import CoverageFigures
from consilience.server.judge_labels import LabelJudgement
from consilience.server.quality import Quality
from consilience.server.robust import Trust

Curve = Sequence[Mapping[str, Any]]
"""One mapping an epoch, with `epoch`, `loss`, `learning_rate`, `seconds`, and `terms` by name."""


@dataclass(frozen=True)
class PoolFindings:
    """The public pool, or the part of it that was asked about: digest of the whole, number of samples, shape (H, W, C)
    of one.

    `whole`: samples of the whole pool, where a part was asked about, and `choice`, how its samples were chosen.
    `left_out` samples were not learnt from, because no site that answered them knows some class; `unknown` says
    class -> for how many samples it was such a class.
    """

    digest: str
    size: int
    shape: tuple[int, ...]
    left_out: int = 0
    unknown: Mapping[str, int] = field(default_factory=dict)
    whole: int | None = None
    choice: str | None = None

    @property
    def words(self) -> str:
        """How many samples, and which."""
        part = "" if self.whole is None else f" of the pool’s {self.whole:,}, {self.choice}"
        return f"{number_of(self.size, 'unlabelled image')}{part}"


@dataclass(frozen=True)
class CoverageExamples:
    """Pool samples at one end of a site's coverage, the utmost first.

    `ids` (k,) their numbers in the pool, `coverage` (k,), `images` (k, H, W, C) or (k, H, W) uint8; `truth` (k,)
    indices into the label space, -1 for a class of no site, or None.
    """

    ids: NDArray[np.integer[Any]]
    coverage: NDArray[np.floating[Any]]
    images: NDArray[np.uint8]
    truth: NDArray[np.integer[Any]] | None = None


@dataclass(frozen=True)
class CoverageFindings:
    """What one site told of coverage, about pool and test pool together.

    `encoding` is None where it was not asked; `bytes` is the size of the `answers`; `missed` are samples that it was
    asked about and did not answer. `figures` and the examples `largest` and `smallest` are about the pool alone, None
    where the site told nothing about it. `agreement` with the other sites is None where they cannot judge it;
    `left_out` says why its coverage is left out of unification, and `offset` what its logits were moved by there.
    `used`: samples in whose labels it has a part.
    """

    asked: bool = False
    encoding: str | None = None
    bytes: int = 0
    answers: int = 0
    missed: int = 0
    figures: CoverageFigures | None = None
    largest: CoverageExamples | None = None
    smallest: CoverageExamples | None = None
    agreement: float | None = None
    left_out: str | None = None
    offset: float = 0.0
    used: int = 0


@dataclass(frozen=True)
class FeatureFindings:
    """What one site told of its features: of which taps, in what encoding, in how many bytes.

    `answers` counts samples of all taps together, `missed` those that it was asked about and did not answer.
    """

    taps: tuple[str, ...]
    encoding: str
    bytes: int
    answers: int
    missed: int = 0


@dataclass(frozen=True)
class SiteFindings:
    """One site, whether it took part to the end or not.

    `classes` are its own names in the order of its answers. `asked`, `answers` and `missed` count samples of pool and
    test pool together; `bytes` is the size of the answers. `reason` says why samples were missed. `precision` is the
    encoding of its answers. `holdout_accuracy`, `holdout_ap` and `calibration` (the fields of `CalibrationCard`) are
    the site's own claims about its teacher, where it makes them. All these are about its teacher's answers; `coverage`
    is about coverage.
    `features`: what it told of features, None where it was not asked for any.
    `coverage_auroc`: AUROC of its coverage as a score for "this image is of one of my classes", None where that is not
    known. `guarantee` (the fields of `Guarantee`): what its answers come to, by its own word, where it has a mechanism.
    `signed`: of how many samples it signed what it answered, coverage and features included; `key`: fingerprint of the
    key that it signs with.
    """

    name: str
    classes: tuple[str, ...]
    teacher: str
    fingerprint: str
    answers: int
    asked: int
    bytes: int
    seconds: float
    missed: int = 0
    reason: str | None = None
    precision: str = "f32"
    holdout_accuracy: float | None = None
    holdout_ap: float | None = None
    calibration: Mapping[str, Any] | None = None
    coverage: CoverageFindings = CoverageFindings()
    coverage_auroc: float | None = None
    features: FeatureFindings | None = None
    guarantee: Mapping[str, Any] | None = None
    signed: int = 0
    key: str | None = None


@dataclass(frozen=True)
class UnifyFindings:
    """How unification went: `converged` is a share of samples, `residual` the largest of any sample.

    `joined`: the sites' coverage decides the odds between components, and not the rule `across`. `strength`: how much
    coverage counts beside answers, None for a method that knows no such thing; `strengths`: sites of which that is
    something else. `other`: how likely a sample is outside the label space on average, and `mostly_other`: how many
    samples count less than half for that; None in a closed world. `claimed`: the sum over sites of their
    mean coverage, where they share all classes out among them; None elsewhere. `exponent`: labels made with coverage
    are the solver's to this power.
    """

    method: str
    across: str
    components: int
    seconds: float
    converged: float | None = None
    residual: float | None = None
    joined: bool = False
    strength: float | None = None
    strengths: Mapping[str, float] = field(default_factory=dict)
    other: float | None = None
    mostly_other: int | None = None
    claimed: float | None = None
    exponent: float | None = 1.0


@dataclass(frozen=True)
class StudentFindings:
    """The student in words.

    `taught` are its outputs, where they are not the label space, with the sites that know a wanted class; `other`:
    whether the last is all that is no wanted class; `other_share`: how much of the unified labels' mass over the pool
    is on no wanted class. None where the student learnt every class.
    """

    architecture: str
    learning: str
    parameters: int | None = None
    taught: LabelSpace | None = None
    other: bool = False
    other_share: float | None = None


@dataclass(frozen=True)
class Partition:
    """How a simulation shared out its private data: `counts` (sites, classes) images."""

    sites: tuple[str, ...]
    classes: tuple[str, ...]
    counts: NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Samples:
    """A few pool samples to look at.

    `ids` (k,) their numbers in the pool; `images` (k, H, W, C) or (k, H, W) uint8; `soft_labels` (k, L) unified
    probabilities; `answers[i]` (k, k_i) log-probabilities of site i's `entries` of the label space, None for none,
    NaN in the rows of samples it did not answer;
    `student` (k, L) log-probabilities; `truth` (k,) indices into the label space, -1 unknown, or None. The label space
    is here that of the student's outputs, `Findings.taught`. Of a multi-label run soft labels are NaN where nobody told
    a label, answers are log-odds, the student's are of each label by itself, and `many` (k, L) in place of `truth` says
    1, 0 or, where that is not known, -1.
    """

    ids: NDArray[np.integer[Any]]
    images: NDArray[np.uint8]
    soft_labels: NDArray[np.floating[Any]]
    answers: Sequence[NDArray[np.floating[Any]] | None]
    student: NDArray[np.floating[Any]]
    truth: NDArray[np.integer[Any]] | None = None
    many: NDArray[np.integer[Any]] | None = None


@dataclass(frozen=True)
class CardTexts:
    """What only people know about a student; an empty text leaves the card's own words."""

    about: str = ""
    intended_use: str = ""
    limits: str = ""
    licence: str = ""


@dataclass(frozen=True)
class Findings:
    """Everything a report needs.

    `space` holds the sites that took part to the end, in the order of every array here; `sites` may list more.
    `learning` has the curves `student` and, where there is one, `oracle`. `agreement` is what `judge.agreement`
    gives. `left_out` says who was there and does not take part, and why. `timing` are seconds by stage. `settings` is
    the job as a plain mapping. `judgement` is of a run of one label an image, `labelled` of a multi-label one; without
    a test set there is neither. `amalgamation` is the student's amalgamation.json, None where no features were learnt
    from; `concentration` its concentration.json with what the test set tells of verticals, None where it has none;
    `filtered` its branches.json with what the sites' last blocks were asked, None where it has no branches. `audits` is
    what the sites of a simulation found out about their own answers. `trust`: what sites' answers
    say of one another's, None without `unify.robust`; `quality`: what is estimated without labels, None for a run of
    several labels an image, of a secure sum, or of a student of chosen classes.
    """

    job: str
    seed: int
    settings: Mapping[str, Any]
    pool: PoolFindings
    space: LabelSpace
    sites: Sequence[SiteFindings]
    unify: UnifyFindings
    student: StudentFindings
    warnings: Sequence[str] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    judgement: Judgement | None = None
    labelled: LabelJudgement | None = None
    learning: Mapping[str, Curve] = field(default_factory=dict)
    agreement: NDArray[np.float64] | None = None
    partition: Partition | None = None
    samples: Samples | None = None
    timing: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    card: CardTexts = CardTexts()
    audits: Mapping[str, SiteAudit] = field(default_factory=dict)
    amalgamation: Mapping[str, Any] | None = None
    concentration: Mapping[str, Any] | None = None
    filtered: Mapping[str, Any] | None = None
    trust: Trust | None = None
    quality: Quality | None = None

    @property
    def taught(self) -> LabelSpace:
        """The student's outputs."""
        return self.student.taught or self.space

    def synonyms(self) -> dict[str, dict[str, str]]:
        """Return class -> site -> the site's own name of it, where that is another one."""
        own = {site.name: site.classes for site in self.sites}
        found: dict[str, dict[str, str]] = {}
        for i, site in enumerate(self.space.sites):
            for entry, name in zip(self.space.entries(i), own.get(site, ()), strict=False):
                if len(entry) == 1 and name != (label := self.space.names[entry[0]]):
                    found.setdefault(label, {})[site] = name
        return {name: found[name] for name in self.space.names if name in found}

    def groups(self) -> dict[str, dict[str, list[str]]]:
        """Return site -> its own name of a group -> the group's classes, for the sites that answer on any."""
        return told_groups(self.space, {site.name: site.classes for site in self.sites})
