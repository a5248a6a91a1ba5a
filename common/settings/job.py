"""job.yaml: one job's settings, and which of them go together.

Does not live here: what sites have and allow (site), how they are asked (ask), the student (student), the sites of a
simulation (simulation).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from consilience.common.settings.ask import PATIENCE_FIELDS, Ask
from consilience.common.settings.base import (
    Name,
    Settings,
    allowed_by,
    encoding_names,
    largest_sent,
)
from consilience.common.settings.data import DataSource
from consilience.common.settings.grouped import refuse_for_groups
from consilience.common.settings.simulation import Simulation
from consilience.common.settings.student import Student

Method = Literal["sd", "ce", "mf-p", "mf-lv", "mf-lf"]
Across = Literal["centred", "equal", "proportional"]
COVERAGE_METHODS: tuple[Method, ...] = ("sd", "ce")
"""Methods of unification that make use of coverage."""


class Labels(Settings):
    """How sites' class names become one label space."""

    synonyms: dict[str, tuple[str, ...]] = Field(default={})
    """Canonical name -> other names of the same class."""
    groups: dict[str, tuple[str, ...]] = Field(default={})
    """Name of a group -> the classes that it stands for, two or more: a site whose class is called so answers on the
    group, and does not say which of its classes ([groups](groups.md)). The name is of no class."""
    classes: tuple[str, ...] | None = None
    """Order of the label space; by default the order in which sites, sorted by name, bring their classes."""


class Unify(Settings):
    """How answers become soft labels."""

    method: Method = "ce"
    across: Across = "centred"
    weights: dict[Name, Annotated[float, Field(gt=0)]] = Field(default={})
    temperature: float = Field(default=1.0, gt=0, le=100)
    prior_correction: bool = False
    """Correct answers for the class priors of the sites whose policy tells them, towards a uniform prior."""
    strength: float = Field(default=0.1, gt=0, le=1)
    """How much coverage counts beside answers, for method `ce`: with 1 a site's answer is weighed by its coverage, near
    0 coverage decides only what the answers leave open (docs/unify.md)."""
    strengths: dict[Name, Annotated[float, Field(gt=0, le=1)]] = Field(default={})
    """Site -> how much its coverage counts, for the sites where that is not `strength`."""
    other: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Prior weight of "outside the whole label space", where sites give coverage; 0: every sample is of some class.
    For method `ce` only.
    With more, `labels/other.npy` says how likely a sample is outside, and soft labels count by the rest."""

    robust: bool = False
    """Compare the sites' answers over the pool, leave out those of a site that a majority of the others contradicts, as
    a whole or about single classes, and let one of whose answers the others confirm less count less (docs/robust.md).
    Of classes with fewer than three owners nothing can be known. Needs single answers, and a student that learns
    unified labels and nothing of sites' own blocks."""

    def strength_of(self, site: str) -> float:
        """How much a site's coverage counts."""
        return self.strengths.get(site, self.strength)

    @property
    def takes_coverage(self) -> bool:
        """Whether the method makes use of coverage."""
        return self.method in COVERAGE_METHODS

    @model_validator(mode="after")
    def _other_needs_coverage(self) -> Unify:
        if self.other and self.method != "ce":
            raise ValueError(
                f"other is {self.other:g}, which method {self.method!r} does not know; set it to 0, or method to ce"
            )
        return self


class Judge(Settings):
    """What the student is judged by. Nothing here is seen by training or by any choice."""

    test: DataSource | None = None
    """Labelled images nobody trained on; without them the report says nothing about accuracy."""
    test_pool: Path | None = None
    """The same images as a pool that sites hold too, in the same order: with it the baselines are judged."""
    pool_labels: Path | None = None
    """.npy of the pool's true labels, numbered by the test data's class names: for the oracle alone."""


class JobPrivacy(Settings):
    """What of the sites' answers the server may see."""

    secure_sum: bool = False
    """Whether the server learns only sums of answers over sites (docs/secure_sums.md). For `unify.method: ce`, without
    coverage, and for `student.learning: soft-labels`. Baselines, which need single answers, are left out. Sites may be
    lost in the middle down to `ask.min_sites`, but not below two thirds."""
    sealed: bool = False
    """Whether sites seal answers for this server alone, so that a SuperLink and its database hold ciphertext
    (docs/sealed.md)."""

    @model_validator(mode="after")
    def _sums_or_seals(self) -> JobPrivacy:
        if self.secure_sum and self.sealed:
            raise ValueError("secure_sum and sealed exclude each other: sums are not sealed; set one to false")
        return self


class JobSettings(Settings):
    """job.yaml: what to do."""

    name: Name
    seed: int = Field(default=0, ge=0, lt=2**63)
    pool: Path | None = None
    """Folder of the pool (`consilience pool build`). A simulation makes its own."""
    labels: Labels = Labels()
    ask: Ask = Ask()
    unify: Unify = Unify()
    student: Student = Student()
    judge: Judge = Judge()
    privacy: JobPrivacy = JobPrivacy()
    simulation: Simulation | None = None

    @property
    def asks_coverage(self) -> bool:
        """Whether sites that offer coverage are asked for it."""
        return self.ask.coverage and self.unify.takes_coverage and not self.privacy.secure_sum

    @property
    def asks_features(self) -> bool:
        """Whether sites whose policy lets features out are asked for some."""
        return self.student.learns_features

    def same_job(self, other: JobSettings) -> bool:
        """Whether a run of this job may go on as one of the other: nothing but `PATIENCE_FIELDS` differs."""
        return self.identity() == other.identity()

    def identity(self) -> dict[str, Any]:
        """Return what makes this job another than others, as JSON values."""
        return self.model_dump(mode="json", exclude={"ask": set(PATIENCE_FIELDS)})

    @model_validator(mode="after")
    def _parts_fit(self) -> JobSettings:
        learning, learns_labels = self.student.learning, self.student.learns_labels
        if self.unify.prior_correction and not learns_labels:
            raise ValueError(
                f"unify.prior_correction corrects soft labels; student.learning is {learning!r}, which learns from the "
                "answers as they are"
            )
        if self.unify.other and not learns_labels:
            raise ValueError(
                f"unify.other is {self.unify.other:g}, which student.learning {learning!r} cannot follow; "
                "set it to 0, or student.learning to soft-labels"
            )
        if self.unify.robust and learning == "filtered":
            raise ValueError(
                "unify.robust is True, and student.learning is 'filtered', whose branches learn from every site, also "
                "from one that is left out of unification; set it to false, or student.learning to soft-labels"
            )
        if self.unify.robust and not learns_labels:
            raise ValueError(
                f"unify.robust is True, which student.learning {learning!r} cannot follow: it learns from the answers "
                "as they are; set it to false, or student.learning to soft-labels"
            )
        self._scores_side_by_side_fit()
        if self.unify.temperature != 1 and learning == "filtered" and not learns_labels:
            raise ValueError(
                f"unify.temperature is {self.unify.temperature:g}, which student.learning 'filtered' cannot follow "
                "where branches learn their teachers' answers as they are; set it to 1, or filtered.target to unified"
            )
        if self.labels.groups:
            refuse_for_groups(self)
        if learning == "concentration":
            self._concentration_fits()
        if self.ask.choose != "random" and learning != "soft-labels":
            raise ValueError(
                f"ask.choose is {self.ask.choose!r}, for which students learn from unified labels between rounds; "
                f"student.learning is {learning!r}; set ask.choose to random, or student.learning to soft-labels"
            )
        if self.privacy.secure_sum:
            weights = [1.0, *self.unify.weights.values()]
            if max(weights) > 2 * min(weights):
                raise ValueError(
                    f"unify.weights lie between {min(weights):g} and {max(weights):g}; with privacy.secure_sum the "
                    "largest may be twice the smallest (1 where none is given), or the sum tells that site's answers"
                )
            if self.unify.temperature < 1:
                raise ValueError(
                    f"unify.temperature is {self.unify.temperature:g}; with privacy.secure_sum it must be at least 1, "
                    "or sums would tell which class each site holds for the likeliest"
                )
            for field, value, allowed in (
                ("unify.method", self.unify.method, "ce"),
                ("unify.prior_correction", self.unify.prior_correction, False),
                ("unify.other", self.unify.other, 0.0),
                ("unify.robust", self.unify.robust, False),
                ("student.learning", self.student.learning, "soft-labels"),
            ):
                if value != allowed:
                    raise ValueError(
                        f"{field} is {value!r}, which needs single answers; with privacy.secure_sum it must be "
                        f"{allowed!r}"
                    )
            if self.ask.samples is not None:
                raise ValueError(
                    f"ask.samples is {self.ask.samples}, and privacy.secure_sum is true: sums are made of the whole "
                    "pool; leave ask.samples out, or set privacy.secure_sum to false"
                )
        if learning == "filtered" and self.privacy.sealed:
            raise ValueError(
                "student.learning is 'filtered', and privacy.sealed is true: blocks and what is asked of them are not "
                "sealed; set one of them otherwise"
            )
        if self.simulation is not None:
            if learning == "filtered" and not self.simulation.policy.tail.open:
                raise ValueError(
                    "student.learning is 'filtered', and simulation.policy.tail.allow is 'off'; set it to questions or "
                    "blocks"
                )
            if not allowed_by(self.simulation.policy.encodings, self.ask.encoding):
                raise ValueError(
                    f"ask.encoding is {self.ask.encoding!r}; simulation.policy allows: "
                    f"{', '.join(encoding_names(self.simulation.policy.encodings))}"
                )
            if self.simulation.data == self.simulation.test:
                raise ValueError("simulation.data and simulation.test are the same images; name another split")
        return self

    def _scores_side_by_side_fit(self) -> None:
        """Refuse what of unification the student would not follow where it learns sites' scores as they are."""
        if self.student.target != "concatenated":
            return
        field = f"student.{self.student.learning.replace('-', '_')}.target"
        if self.student.learning == "layer-wise" and self.unify.temperature != 1:
            raise ValueError(
                f"unify.temperature is {self.unify.temperature:g}, and {field} is 'concatenated', which learns the "
                "sites' scores as they are; set the temperature to 1, or the target to unified"
            )
        for site, weight in self.unify.weights.items():
            if weight != 1:
                raise ValueError(
                    f"unify.weights.{site} is {weight:g}, and {field} is 'concatenated', in which every site counts "
                    "alike; leave unify.weights out, or set the target to unified"
                )

    def _concentration_fits(self) -> None:
        chosen, sent = self.student.concentration, largest_sent(self.ask.encoding)
        if chosen.routing == "coverage" and not self.asks_coverage:
            raise ValueError(
                "student.concentration.routing is 'coverage', for which no site is asked; set ask.coverage to true and "
                f"unify.method to one of {', '.join(COVERAGE_METHODS)}, or routing to unified"
            )
        if chosen.target == "specialist" and sent is not None and (chosen.keep or 0) > sent:
            raise ValueError(
                f"student.concentration.keep is {chosen.keep}; ask.encoding {self.ask.encoding!r} brings {sent} of a "
                "sample's classes; lower keep, or leave it out"
            )
