"""job.yaml: one job's settings, and those of a simulation's sites.

Does not live here: what sites have and allow (site).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from consilience.common.settings.base import (
    Encoding,
    FeatureEncoding,
    Name,
    Settings,
    TapName,
    allowed_by,
    encoding_names,
    largest_sent,
)
from consilience.common.settings.concentration import Concentration
from consilience.common.settings.data import DataSource, Preprocessing
from consilience.common.settings.filtered import Filtered
from consilience.common.settings.grouped import refuse_for_groups
from consilience.common.settings.multi_label import refuse_for_labels
from consilience.common.settings.policy import Policy
from consilience.common.settings.privacy import NoPrivacy, Privacy, refuse_what_passes_by
from consilience.common.settings.teacher import Coverage, Fit, TrainTeacher

Method = Literal["sd", "ce", "mf-p", "mf-lv", "mf-lf"]
Across = Literal["centred", "equal", "proportional"]


Choose = Literal["random", "uncertainty", "disagreement", "k-centre"]
"""How samples of the pool are chosen."""
MOST_ROUNDS = 20
"""In which samples are chosen."""


class Labels(Settings):
    """How sites' class names become one label space."""

    synonyms: dict[str, tuple[str, ...]] = Field(default={})
    """Canonical name -> other names of the same class."""
    groups: dict[str, tuple[str, ...]] = Field(default={})
    """Name of a group -> the classes that it stands for, two or more: a site whose class is called so answers on the
    group, and does not say which of its classes ([groups](groups.md)). The name is of no class."""
    classes: tuple[str, ...] | None = None
    """Order of the label space; by default the order in which sites, sorted by name, bring their classes."""


class Ask(Settings):
    """How the pool is asked about."""

    samples: int | None = Field(default=None, ge=1, le=2**27)
    """How many samples of the pool are asked about; by default all. The student learns from these alone
    ([which samples](choosing.md)). The test pool is always asked about as a whole."""
    choose: Choose = "random"
    """Which samples: drawn by `seed`, or, after a first round that is, in each further round those of which a student
    that learnt from the answers so far is least certain (`uncertainty`), on which sites are expected to differ most
    (`disagreement`), or which lie farthest in its features from all that were asked about (`k-centre`)."""
    rounds: int | None = Field(default=None, ge=1, le=MOST_ROUNDS)
    """In how many rounds of about equal size they are chosen: 1 where they are drawn, else 2 or more; by default 2."""
    encoding: Encoding = "f16"
    """How sites' log-probabilities come: `f32`, `f16`, `u8`, `top-K` such as `top-3`, `top-K-u8` such as `top-1-u8`,
    or `votes`; every site's policy must allow it. [Encodings](encodings.md) says what each costs and loses."""
    coverage: bool = True
    """Ask the sites that offer coverage for it, each in the finest encoding that it allows. Only the methods `sd` and
    `ce` make use of coverage, `sd` where every site that answered a sample gave it: with another `unify.method` no
    site is asked."""
    features: FeatureEncoding = "f16"
    """How features come, where `student.learning` takes them; every site that tells some must allow it."""
    feature_bytes: int = Field(default=2**34, ge=1, le=2**53)
    """Most bytes of features that one site may bring, over all taps and samples, principal components among them; a
    site whose card declares more does not fit the job."""
    tail_bytes: int = Field(default=2**28, ge=1, le=2**32)
    """Most bytes of blocks that one site may lend, for `student.learning: filtered`; a site whose card declares more
    does not fit the job."""
    question_size: int | None = Field(default=None, ge=1, le=1_000_000)
    """Pool samples a question speaks of; by default tuned for each site, to about two seconds of its teacher's work."""
    in_flight: int = Field(default=4, ge=1, le=64)
    """Questions on their way to one site at a time."""
    retries: int = Field(default=2, ge=0, le=100)
    """How often a failed question is sent again. A site that is away uses none of them up."""
    wait_for: int | None = Field(default=None, ge=1)
    """How many sites must be there before the job begins; by default it begins with whoever is there, at least one and
    at least `min_sites`."""
    wait: float = Field(default=3600.0, ge=0)
    """Seconds the job waits for sites that are not there yet, and, without a deadline, for one that has gone silent."""
    deadline: float | None = Field(default=None, gt=0)
    """Seconds after asking began at which it ends, with whatever was answered; by default it ends when all is asked.
    It runs on while the server is down; a run that is submitted again has all of it again."""
    min_sites: int | None = Field(default=None, ge=1)
    """With fewer sites that answered every question, but for those about coverage, the job stops; by default it
    needs them all. With this or `wait_for`, a site that cannot present itself, does not fit the job or does not
    agree to the contract is left out as long as enough others remain; with neither it stops the job."""

    @property
    def parts(self) -> int:
        """In how many rounds samples are chosen."""
        return self.rounds or (1 if self.choose == "random" else 2)

    @model_validator(mode="after")
    def _choice_fits(self) -> Ask:
        if self.choose == "random" and self.parts > 1:
            raise ValueError(
                f"rounds is {self.rounds}, and choose is 'random', which draws all samples at once; leave rounds out, "
                "or set choose to uncertainty, disagreement or k-centre"
            )
        if self.choose != "random" and self.samples is None:
            raise ValueError(
                f"choose is {self.choose!r}, and samples is not given: all of the pool is asked about; give samples, "
                "or leave choose out"
            )
        if self.choose != "random" and self.parts < 2:
            raise ValueError(
                f"rounds is 1, and choose is {self.choose!r}, whose first round is drawn at random; set rounds to 2 or "
                "more, or choose to random"
            )
        if self.samples is not None and self.samples < self.parts:
            raise ValueError(
                f"samples is {self.samples}, fewer than rounds, {self.parts}; raise samples, or lower rounds"
            )
        return self


PATIENCE_FIELDS = frozenset({"wait_for", "wait", "deadline", "min_sites", "retries", "in_flight", "question_size"})
"""Fields of `ask` that say how many sites are enough and how long they have: a run may go on under others."""


COVERAGE_METHODS: tuple[Method, ...] = ("sd", "ce")
"""Methods of unification that make use of coverage."""


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


Target = Literal["unified", "concatenated"]
"""What the student's scores learn: unified soft labels, or the sites' answers side by side as in the papers, which
takes classes that one site each knows."""


class LayerWise(Settings):
    """Layer-wise amalgamation (Shen et al., AAAI 2019): each layer from the teachers' features, then all jointly."""

    autoencoder: Literal["principal", "descent"] = "principal"
    """How a layer's features are amalgamated: `principal` components, in closed form, or by gradient `descent` as in
    the paper."""
    order: Literal["direct", "incremental"] = "direct"
    """Of three teachers or more: all at once, or one after another."""
    epochs: int = Field(default=10, ge=1, le=10_000)
    """Of each layer's own training, and of `descent`."""
    learning_rate: float = Field(default=0.05, gt=0, le=10)
    """Of each layer's own training; for scores side by side (`target: concatenated`) a tenth of it."""
    layers: bool = True
    """Whether layers are trained by themselves; without, no features are asked for, and the joint phase is all."""
    joint: bool = True
    """Whether the whole student is trained after its layers, by `student.fit`; for scores side by side
    (`target: concatenated`) at a tenth of its learning rate."""
    target: Target = "unified"

    @model_validator(mode="after")
    def _something_is_trained(self) -> LayerWise:
        if not self.layers and not self.joint:
            raise ValueError("layers and joint are both false, so that nothing is trained; set one of them to true")
        return self


class CommonSpace(Settings):
    """One common space, and the taps that lead to it."""

    student: TapName | None = None
    """The student's tap; by default `penultimate` where a site's tap is a vector, else the last that is a map."""
    sites: dict[Name, TapName] = Field(default={})
    """Site -> its tap; by default the last that its policy allows."""
    width: int | None = Field(default=None, ge=1, le=65_536)
    """Channels of the space; by default as many as the student's tap has, and where maps meet a quarter of them, as in
    the authors' later code; at most 128, which is the paper's."""
    size: int | None = Field(default=None, ge=1, le=4096)
    """Rows and columns that maps are averaged down or interpolated up to; by default those of the smallest. Not to
    be given where a tap is a vector: maps are then averaged to one."""


class CommonFeature(Settings):
    """Common-feature learning (Luo et al., IJCAI 2019): student and teachers agree in a space of their features.

    The loss is `soft` times the soft targets', `mmd` times the distance in the common space and `reconstruction` times
    the teachers' reconstruction; 0 switches a term off. The paper's code: 1, 10 and 10.
    With `mmd` 0 no features are asked for, and the student learns from labels alone: reconstruction does not reach it.
    With `soft` 0 nothing teaches its scores.
    """

    spaces: tuple[CommonSpace, ...] = Field(default=(CommonSpace(),), min_length=1)
    soft: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    mmd: float = Field(default=10.0, ge=0, allow_inf_nan=False)
    reconstruction: float = Field(default=10.0, ge=0, allow_inf_nan=False)
    target: Target = "unified"

    @model_validator(mode="after")
    def _something_is_taught(self) -> CommonFeature:
        if not self.soft and not self.mmd:
            raise ValueError("soft and mmd are both 0, so that nothing reaches the student; set one of them above 0")
        return self


Learning = Literal[
    "soft-labels", "direct-ce", "direct-mf-lf", "layer-wise", "common-feature", "concentration", "filtered"
]


class Student(Settings):
    """The classifier the server trains."""

    architecture: str = "resnet8"
    """Named as a trained teacher's."""
    learning: Learning = "soft-labels"
    """`layer-wise` and `common-feature` take features too, of the sites that tell some (docs/amalgamation.md); the
    other sites take part by their labels. `concentration` takes each sample's labels from one site
    (docs/concentration.md). `filtered` makes it for `classes` alone, of a trunk and branches, through the blocks of the
    sites that know them (docs/filtered.md)."""
    classes: tuple[str, ...] | None = Field(default=None, min_length=1)
    """The classes that the student tells apart, by any of their names; by default all that sites know. Every site is
    asked all the same (docs/researcher.md)."""
    other: bool = False
    """Whether it has one more output, named `other`, for all that is none of `classes`. Without it, samples of other
    classes count in training by how likely they are of one of `classes`."""
    layer_wise: LayerWise = LayerWise()
    common_feature: CommonFeature = CommonFeature()
    concentration: Concentration = Concentration()
    filtered: Filtered = Filtered()
    preprocessing: Preprocessing = Preprocessing()
    fit: Fit = Fit()

    @model_validator(mode="after")
    def _classes_can_be_learnt(self) -> Student:
        if self.other and self.learning == "concentration":
            raise ValueError(
                "other is true, and learning is 'concentration', whose verticals share out wanted classes alone; set "
                "other to false, or learning to soft-labels"
            )
        if self.other and self.learning == "filtered":
            raise ValueError(
                "other is true, and learning is 'filtered', whose branches score wanted classes alone; set other to "
                "false, or learning to soft-labels"
            )
        if self.other and self.learning == "direct-mf-lf":
            raise ValueError(
                "other is true, and learning is 'direct-mf-lf', which learns differences of single classes' scores: "
                "many classes in one have none; set learning to soft-labels or direct-ce, or other to false"
            )
        if self.other and self.learning == "layer-wise" and self.target == "concatenated":
            raise ValueError(
                "other is true, and layer_wise.target is 'concatenated', which learns each class's score of the one "
                "site that knows it: many classes in one have none; set the target to unified, or other to false"
            )
        return self

    @property
    def target(self) -> Target | None:
        """What the scores learn where features are learnt from too; None where they are not."""
        if self.learning == "layer-wise":
            return self.layer_wise.target
        return self.common_feature.target if self.learning == "common-feature" else None

    @property
    def learns_features(self) -> bool:
        """Whether features are learnt from."""
        if self.learning == "layer-wise":
            return self.layer_wise.layers
        return self.learning == "common-feature" and self.common_feature.mmd > 0

    @property
    def learns_labels(self) -> bool:
        """Whether the scores learn unified soft labels."""
        if self.learning == "concentration":
            return self.concentration.target == "unified"
        if self.learning == "filtered":
            return self.filtered.joint and self.filtered.target != "teachers"
        return self.learning == "soft-labels" or self.target == "unified"


class Judge(Settings):
    """What the student is judged by. Nothing here is seen by training or by any choice."""

    test: DataSource | None = None
    """Labelled images nobody trained on; without them the report says nothing about accuracy."""
    test_pool: Path | None = None
    """The same images as a pool that sites hold too, in the same order: with it the baselines are judged."""
    pool_labels: Path | None = None
    """.npy of the pool's true labels, numbered by the test data's class names: for the oracle alone."""


class ClassLists(Settings):
    """Each site gets the listed classes; classes are names of the data set or their indices, or names of
    `labels.groups`: such a site's images are labelled by the group."""

    kind: Literal["class-lists"] = "class-lists"
    classes: tuple[tuple[str | int, ...], ...] = Field(min_length=1)


class RandomClasses(Settings):
    """Each site gets random classes, the same number each; `overlap` is the mean number of owners of a class."""

    kind: Literal["random-classes"]
    sites: int = Field(ge=1)
    overlap: float = Field(default=1.5, ge=1)


class DirichletPartition(Settings):
    """Each class is shared out by Dirichlet(alpha); a class with fewer than `min_images` at a site is dropped."""

    kind: Literal["dirichlet"]
    sites: int = Field(ge=1)
    alpha: float = Field(default=0.5, gt=0)
    min_images: int = Field(default=5, ge=1)


PartitionSettings = Annotated[ClassLists | RandomClasses | DirichletPartition, Field(discriminator="kind")]


class Simulation(Settings):
    """Sites that exist only on this machine: one labelled set, shared out."""

    data: DataSource
    test: DataSource
    pool_share: float = Field(default=0.4, gt=0, lt=1)
    """Share of `data` that becomes the pool, unlabelled; the rest is shared out among the sites."""
    partition: PartitionSettings
    quantity_skew: float = Field(default=0.0, ge=0, le=5)
    """0: sites share a class evenly; larger: log-normal spread of the sites' sizes with this sigma."""
    teachers: tuple[TrainTeacher, ...] = Field(min_length=1)
    """One a site, in order, repeated when there are more sites."""
    coverage: Coverage = Coverage()
    """How every site learns its coverage, where `policy.coverage` lets it out."""
    policy: Policy = Policy()
    privacy: Privacy = NoPrivacy()
    """The mechanism behind which every site's teacher answers."""
    calibration: Literal["temperature", "dirichlet", "off"] = "temperature"
    """As at a site; `pate` and `dp-sgd` need `off`."""

    @model_validator(mode="after")
    def _nothing_passes_by_the_mechanism(self) -> Simulation:
        refuse_what_passes_by(self.privacy, self.policy, self.calibration, self.teachers)
        refuse_for_labels(self.privacy, self.policy, self.calibration, self.teachers)
        return self


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
