"""job.yaml and site.yaml as typed models.

Lives here: every field a user may write, its default and its allowed values. Does not live here: reading the files
and how a mistake in them reads (settings_file), what the fields do.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from consilience.common.files import canonical_json, sha256

NAME_PATTERN = r"^[a-z0-9][a-z0-9-]{0,62}$"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
"""Lower-case letters, digits and hyphens: also a folder name and a DNS label."""

ClassName = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^\P{C}*$")]
"""Printable: a name of a stranger's is shown on terminals and pages."""

ENCODINGS = ("f32", "f16", "u8", "votes")
"""Encodings of log-probabilities that a fixed name has, finest first."""
_TOP = re.compile("top-([1-9][0-9]{0,5})")


def largest_sent(encoding: str) -> int | None:
    """Return the K of `top-K`, how many classes of a row are sent; None for every other encoding."""
    found = _TOP.fullmatch(encoding)
    return int(found[1]) if found else None


def _encoding(value: str) -> str:
    if value not in ENCODINGS and largest_sent(value) is None:
        raise PydanticCustomError("encoding", "Input should be f32, f16, u8, top-K (for example top-3) or votes")
    return value


Encoding = Annotated[str, AfterValidator(_encoding)]
"""Encodings of log-probabilities (docs/encodings.md), finest first: `f32`, `f16`, `u8`, `top-K` for a K of 1 or more,
`votes`."""
CoverageEncoding = Literal["f16", "u8"]
"""Encodings of coverage, finest first."""
CoverageFamily = Literal["network", "features", "outputs"]


def allowed_by(encodings: Iterable[Encoding], asked: Encoding) -> bool:
    """Whether a site that allows `encodings` allows `asked`: f32, f16 and `top-K` allow `top-J` for every J, or J <= K.

    A `top-J` can be computed from each of these, so it tells nothing more.
    """
    wanted = largest_sent(asked)
    if wanted is None:
        return asked in encodings
    return any(held in ("f32", "f16") or (largest_sent(held) or 0) >= wanted for held in encodings)


def encoding_names(encodings: Iterable[Encoding]) -> list[str]:
    """Return for people what `encodings` allow: the names, with `top-K` where every K is allowed."""
    found = list(encodings)
    place = found.index("votes") if "votes" in found else len(found)
    return [*found[:place], *["top-K"] * (not {"f32", "f16"}.isdisjoint(found)), *found[place:]]


Method = Literal["sd", "ce", "mf-p", "mf-lv", "mf-lf"]
Across = Literal["centred", "equal", "proportional"]


def some_noise(value: object) -> object:
    """Refuse noise of nothing, with the reason."""
    if isinstance(value, int | float) and not isinstance(value, bool) and value == 0:
        raise ValueError("it is 0, and without noise there is no guarantee; give at least 0.01, or mechanism: none")
    return value


class Settings(BaseModel):
    """A part of a settings file: unknown fields are refused, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Size = tuple[Annotated[int, Field(ge=1, le=65_536)], Annotated[int, Field(ge=1, le=65_536)]]
"""Height, width in pixels."""


class NpzData(Settings):
    """Arrays in one NumPy file, loaded without pickle: images (n, H, W[, C]) uint8, labels (n,) integer."""

    kind: Literal["npz"]
    path: Path
    images: str = "x"
    labels: str | None = "y"
    names: str | None = "names"


class FolderData(Settings):
    """One sub-folder of images a class, or images without classes in the folder itself (a pool)."""

    kind: Literal["folder"]
    path: Path
    size: Size | None = None
    channels: Literal[1, 3] = 3


class TorchvisionData(Settings):
    """A data set class of torchvision.datasets, already downloaded: nothing is fetched."""

    kind: Literal["torchvision"]
    dataset: str
    root: Path
    options: dict[str, str | int | bool] = {}
    size: Size | None = None
    channels: Literal[1, 3] = 3


class EmbeddedData(Settings):
    """The Fashion-MNIST sample that comes with Consilience: 500 train and 100 test images a class."""

    kind: Literal["embedded"]
    split: Literal["train", "test"] = "train"


DataSource = Annotated[NpzData | FolderData | TorchvisionData | EmbeddedData, Field(discriminator="kind")]


class Preprocessing(Settings):
    """What a classifier expects: uint8 images become float32, (x / 255 - mean) / std per channel.

    `size` (height, width) resizes first, bilinearly with antialiasing; `channels` converts grey to colour
    by repetition and colour to grey by ITU-R 601 luma.
    """

    size: Size | None = None
    channels: Literal[1, 3] | None = None
    mean: tuple[float, ...] = (0.5,)
    std: tuple[Annotated[float, Field(gt=0)], ...] = (0.5,)

    @model_validator(mode="after")
    def _same_channels(self) -> Preprocessing:
        allowed = {1, self.channels} if self.channels else {1, 3}
        if len(self.mean) != len(self.std) or len(self.mean) not in allowed:
            raise ValueError(
                f"mean has {len(self.mean)} and std {len(self.std)} values; give one for all channels or one each"
            )
        return self


class Fit(Settings):
    """How a network is trained: SGD with Nesterov momentum under a one-cycle learning rate."""

    epochs: int = Field(default=20, ge=1, le=10_000)
    batch_size: int = Field(default=64, ge=1, le=65_536)
    learning_rate: float = Field(default=0.1, gt=0, le=10)
    weight_decay: float = Field(default=5e-4, ge=0, le=1)
    augment: bool = True
    """Whether images are moved by up to an eighth of their size, and mirrored, each time anew."""
    mirror: bool = True
    """Whether augmentation mirrors images left and right: not for digits, writing, or sides of a body."""
    compile: bool = False
    precision: Literal["auto", "f32"] = "auto"
    """auto: bf16 where a measurement at the start shows that it pays, else f32; f32: the same result every time."""


class CoverageFit(Fit):
    """How a coverage network is trained: as `Fit`, with defaults of its own."""

    epochs: int = Field(default=15, ge=1, le=10_000)
    batch_size: int = Field(default=256, ge=1, le=65_536)
    learning_rate: float = Field(default=0.05, gt=0, le=10)


class TrainTeacher(Settings):
    """Train one of our architectures, or any of torchvision's by name, on the site's private data."""

    kind: Literal["train"]
    architecture: str
    fit: Fit = Fit()
    preprocessing: Preprocessing = Preprocessing()
    holdout: float = Field(default=0.1, ge=0, lt=0.9)
    """Share of the private data kept out of training, to measure the teacher's accuracy and to calibrate it."""


class _Hosted(Settings):
    classes: tuple[ClassName, ...] = Field(min_length=1)
    preprocessing: Preprocessing

    @model_validator(mode="after")
    def _each_class_once(self) -> _Hosted:
        for name in self.classes:
            if self.classes.count(name) > 1:
                raise ValueError(f"class {name!r} is named twice; name every class once")
        return self


class StateDictTeacher(_Hosted):
    """A torch `state_dict` (safetensors, or .pt read with weights_only) for a named architecture."""

    kind: Literal["state_dict"]
    architecture: str
    path: Path


class TorchScriptTeacher(_Hosted):
    """A TorchScript file that maps (n, C, H, W) float32 to (n, classes) scores."""

    kind: Literal["torchscript"]
    path: Path
    outputs: Literal["logits", "probabilities"] = "logits"


class ExportTeacher(_Hosted):
    """A `torch.export` file (.pt2) that maps (n, C, H, W) float32 to (n, classes) scores."""

    kind: Literal["export"]
    path: Path
    outputs: Literal["logits", "probabilities"] = "logits"


class SklearnTeacher(_Hosted):
    """A scikit-learn classifier with `predict_proba`, saved by skops; rows are flattened images."""

    kind: Literal["sklearn"]
    path: Path


class OnnxTeacher(_Hosted):
    """An ONNX file run by onnxruntime, (n, C, H, W) float32 in, (n, classes) scores out."""

    kind: Literal["onnx"]
    path: Path
    outputs: Literal["logits", "probabilities"] = "logits"


class CallableTeacher(_Hosted):
    """A Python callable the site itself installed: (n, C, H, W) float32 in, (n, classes) probabilities out."""

    kind: Literal["callable"]
    callable: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")


TeacherSettings = Annotated[
    TrainTeacher
    | StateDictTeacher
    | TorchScriptTeacher
    | ExportTeacher
    | SklearnTeacher
    | OnnxTeacher
    | CallableTeacher,
    Field(discriminator="kind"),
]


class Coverage(Settings):
    """How the site learns which images are of its classes: by telling its private data from its first pool.

    Not learned where `policy.coverage` is off.
    """

    family: CoverageFamily = "network"
    """What tells them apart. `network`: a network of its own, from pixels. `features`: small heads on what the
    teacher's last linear layer is fed, for a teacher of kind `train` or `state_dict`. `outputs`: small heads on the
    teacher's calibrated log-probabilities, for any teacher. The latter two learn in seconds once the teacher has seen
    the images, and what they see is what the teacher sees of them."""
    architecture: str = "vgg6"
    """Of the network; this, `fit` and `preprocessing` count for `family: network` alone."""
    fit: CoverageFit = CoverageFit()
    preprocessing: Preprocessing = Preprocessing()
    """Means and deviations; size and channels are the pool's."""
    prior: float | None = Field(default=None, gt=0, le=1)
    """Share of the pool that is of the site's classes, where the site knows it; by default it is estimated."""

    @model_validator(mode="after")
    def _shaped_as_the_pool(self) -> Coverage:
        if self.preprocessing.size is not None or self.preprocessing.channels is not None:
            raise ValueError("preprocessing names size or channels, which are the pool's; leave them out")
        return self


class Limits(Settings):
    """Most samples that may be released. A sample counts once for each kind and encoding in which it leaves, under each
    teacher and policy; asked again, it leaves again as the same bytes, at no cost. `null`: no limit."""

    per_job: int | None = Field(default=100_000, ge=0, le=2**53)
    per_month: int | None = Field(default=200_000, ge=0, le=2**53)
    """In a calendar month of UTC, over all jobs."""
    lifetime: int | None = Field(default=1_000_000, ge=0, le=2**53)
    """Since the ledger began, over all jobs, teachers and policies."""
    epsilon_per_job: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Most privacy loss, at the delta that the mechanism names; needs a `privacy.mechanism`."""
    epsilon_per_month: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    epsilon_lifetime: float | None = Field(default=None, gt=0, allow_inf_nan=False)


EPSILON_LIMITS = {"epsilon_per_job", "epsilon_per_month", "epsilon_lifetime"}


class Policy(Settings):
    """What the site allows to leave. Nothing the server sends can widen it.

    Another policy is another version: what left under an earlier one counts anew if it is asked again.
    """

    precision: Encoding = "f32"
    """The finest encoding of log-probabilities that may leave: `f32`, `f16`, `u8` (a byte a class), `top-K`, for
    example `top-3` (the three largest and the sum of the others), or `votes` (the largest class alone). Whatever can be
    computed from it may leave too: see [encodings](encodings.md)."""
    coverage: Literal["off", "u8", "f16"] = "off"
    """The finest encoding of coverage that may leave: of the site's estimate, one number a pool sample, of how likely
    the sample is of one of its classes. `u8` tells it to 1/256; `off`: it does not leave."""
    class_priors: bool = False
    """Whether the shares of the classes in the private data may be told."""
    holdout_accuracy: bool = False
    """Whether the teacher's accuracy on private images kept out of its training may be told, and how well it is
    calibrated there."""
    pools: tuple[Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")], ...] = ()
    """Digests of the pools that may be asked about (`consilience pool show` tells a pool's); by default those whose
    folders `pools` in site.yaml names."""
    temperature: float = Field(default=1.0, ge=1, le=100)
    """Answers leave softened by it: log-probabilities are divided by it and normalised. With 1 they leave as they
    are; with more, large differences between classes are told less."""
    decimals: int | None = Field(default=None, ge=1, le=8)
    """Probabilities are rounded to so many decimals before they leave; by default they are not. Those that come out as
    0 share half a unit of the last decimal."""
    cap: float = Field(default=1.0, ge=0.5, le=1)
    """Largest probability that may leave; what is above is shared out among the other classes in proportion."""
    floor: float = Field(default=0.0, ge=0, lt=0.5)
    """Least probability that may leave; every class gets it, and the rest is shared out as before. It must be less than
    one over the number of the teacher's classes."""
    limits: Limits = Limits()
    """How many samples may leave in all. The defaults are enough for a pool of 100,000 images a job, and too little to
    copy the teacher over many: raise them when you know that you want more."""
    sums_only: bool = False
    """Whether answers leave only in secure sums over several sites (docs/secure_sums.md), and none openly."""
    sealed_only: bool = False
    """Whether answers leave only sealed for a key that the authority in the kit has signed (docs/sealed.md)."""
    approval: bool = False
    """Whether each job must be approved by a person at the site first (`consilience site approve`)."""
    ends: datetime.date | None = None
    """Last day (UTC) on which answers leave; by default there is none."""

    @model_validator(mode="after")
    def _some_way_is_left(self) -> Policy:
        if self.sums_only and self.sealed_only:
            raise ValueError("sums_only and sealed_only exclude each other: sums are not sealed; set one to false")
        return self

    @property
    def encodings(self) -> tuple[Encoding, ...]:
        """Encodings the server may ask for, finest first; `allowed_by` says which of `top-K` these allow."""
        if self.precision in ENCODINGS:
            return ENCODINGS[ENCODINGS.index(self.precision) :]
        return (self.precision, "votes")

    @field_validator("coverage", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: object) -> object:
        return "off" if value is False else value  # YAML reads a bare off as false

    @property
    def coverage_encodings(self) -> tuple[CoverageEncoding, ...]:
        """Encodings of coverage the server may ask for, finest first."""
        allowed: dict[str, tuple[CoverageEncoding, ...]] = {"off": (), "u8": ("u8",), "f16": ("f16", "u8")}
        return allowed[self.coverage]

    @property
    def version(self) -> str:
        """A digest of the policy: another policy is another version."""
        return sha256(canonical_json(self.model_dump(mode="json")))[:16]


Delta = Annotated[float, Field(gt=0, le=0.01)]
"""Chance with which epsilon may not hold: below one in the number of private records."""
Noise = Annotated[float, BeforeValidator(some_noise), Field(ge=0.01, le=1e9)]
"""A standard deviation; 0 is refused, since a guarantee is claimed."""


class NoPrivacy(Settings):
    """Answers leave as they are: no formal guarantee."""

    mechanism: Literal["none"] = "none"


class Pate(Settings):
    """The private data is split into disjoint parts, one teacher a part learns, and noisy sums of these answer.

    Protects a record of the private data (docs/privacy_mechanisms.md).
    """

    mechanism: Literal["pate"]
    parts: int = Field(ge=2, le=10_000)
    """Parts of the private data, each with a teacher of its own. More parts bear more noise, and know less each."""
    answer: Literal["arg-max", "confident", "average"] = "arg-max"
    """`arg-max`: the class with the most votes, after noise; `confident`: the same where the largest count passes
    `threshold`, after noise of its own, and else the uniform distribution, which says nothing; `average`: the mean of
    the parts' probabilities, after noise."""
    sigma: Noise
    """Noise on the count of votes of each class (`average`: on the sum of probabilities), in votes."""
    threshold: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """For `confident` only: votes that the largest count must reach."""
    threshold_sigma: Noise | None = None
    """For `confident` only: noise on the largest count before it is compared, in votes."""
    delta: Delta = 1e-5

    @model_validator(mode="after")
    def _threshold_where_confident(self) -> Pate:
        for field in ("threshold", "threshold_sigma"):
            given = getattr(self, field) is not None
            if given != (self.answer == "confident"):
                does = "needs" if not given else "does not use"
                step = "set it, in votes" if not given else "leave it out"
                raise ValueError(f"answer is {self.answer!r}, which {does} {field}; {step}")
        if self.threshold is not None and self.threshold > self.parts:
            raise ValueError(f"threshold is {self.threshold:g}; there are {self.parts} parts, so as many votes at most")
        return self


class DpSgd(Settings):
    """The teacher is trained by noisy gradients, so that answers of it cost nothing more.

    Protects a record of the private data (docs/privacy_mechanisms.md).
    """

    mechanism: Literal["dp-sgd"]
    noise_multiplier: Noise
    """Noise on the sum of a batch's gradients, in multiples of `clip`."""
    clip: float = Field(default=1.0, gt=0, le=1e6)
    """Length to which each sample's gradient is cut."""
    delta: Delta = 1e-5


class OutputNoise(Settings):
    """Noise on the teacher's probabilities. Protects one whole answer of the model, whatever the model is.

    It says nothing of a record (docs/privacy_mechanisms.md).
    """

    mechanism: Literal["output-noise"]
    sigma: Noise
    """Noise on each probability; two answers lie up to 1.41 apart."""
    delta: Delta = 1e-5


Privacy = Annotated[NoPrivacy | Pate | DpSgd | OutputNoise, Field(discriminator="mechanism")]


def refuse_what_passes_by(
    privacy: NoPrivacy | Pate | DpSgd | OutputNoise,
    policy: Policy,
    calibration: str,
    teachers: tuple[TeacherSettings, ...],
) -> None:
    """Raise `ValueError` for what would let private data out past the mechanism, or what it cannot train."""
    mechanism = privacy.mechanism
    if mechanism == "none":
        for field, most in policy.limits.model_dump(include=EPSILON_LIMITS).items():
            if most is not None:
                raise ValueError(
                    f"policy.limits.{field} is {most:g}, and without a privacy.mechanism answers have no epsilon; "
                    "choose one, or leave the limit out"
                )
        return
    for teacher in teachers if mechanism != "output-noise" else ():
        if teacher.kind != "train":
            raise ValueError(
                f"privacy.mechanism is {mechanism}, which trains the teacher itself; teacher.kind is "
                f"{teacher.kind!r}, allowed: 'train'"
            )
        if mechanism == "dp-sgd" and teacher.fit.compile:
            raise ValueError("teacher.fit.compile is true, which dp-sgd cannot make use of; set it to false")
    if mechanism != "output-noise" and calibration != "off":
        raise ValueError(
            f"calibration is {calibration}, which learns from the private data without noise; with "
            f"privacy.mechanism {mechanism} set it to off"
        )
    past = {
        "coverage": policy.coverage != "off",
        "class_priors": policy.class_priors,
        "holdout_accuracy": policy.holdout_accuracy,
    }
    for field in (field for field, told in past.items() if told):
        raise ValueError(
            f"policy.{field} lets out what the private data say, past privacy.mechanism {mechanism}; set it to "
            f"{'off' if field == 'coverage' else 'false'}"
        )


class SiteSettings(Settings):
    """site.yaml: one site's name, private data, teacher and policy."""

    name: Name
    data: DataSource | None = None
    teacher: TeacherSettings
    policy: Policy = Policy()
    privacy: Privacy = NoPrivacy()
    """The mechanism behind which the teacher answers, and how strong it is."""
    coverage: Coverage = Coverage()
    calibration: Literal["temperature", "dirichlet", "off"] = "temperature"
    """How the teacher's probabilities are made as good as they claim to be, by `consilience site train`: by one number
    for all classes, by a matrix over them (which needs 20 held-out samples of every class), or not at all. What is
    fitted on: the part that `teacher.holdout` keeps out of training; for a hosted teacher `data`, which should be
    images that it was not trained on."""
    pools: tuple[Path, ...] = ()
    """Folders of public pools the site holds a copy of; a question names one by its digest."""
    state: Path = Path("state")
    """Folder of the site's own: the trained teacher, the ledger and the released answers live there."""
    ledger_head: Path | None = None
    """File with the ledger's length and last hash, by default `ledger.head` in `state`. On another disk than `state`,
    it shows that an older copy of the whole of `state` was put back."""
    key: Path = Path("site.key")
    """The site's private key (`consilience site init` makes it). It never leaves the site."""
    kit: Path = Path("kit.json")
    """What the coordinator sent back: the server's address and certificate authority. No secret."""
    health_port: int | None = Field(default=None, ge=1, le=65_535)
    """Port on 127.0.0.1 where a running agent says how it is (GET /health); none by default."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    batch_size: int = Field(default=256, ge=1, le=65_536)
    """Pool samples the teacher scores at once."""

    @model_validator(mode="after")
    def _training_needs_data(self) -> SiteSettings:
        if self.teacher.kind == "train" and self.data is None:
            raise ValueError("teacher.kind is train, so data must name the private data to train on")
        return self

    @model_validator(mode="after")
    def _features_need_a_network(self) -> SiteSettings:
        if self.coverage.family == "features" and self.teacher.kind not in ("train", "state_dict"):
            raise ValueError(
                f"coverage.family is features, which needs a teacher of kind train or state_dict, not "
                f"{self.teacher.kind}; take coverage.family: outputs, which works with any teacher"
            )
        return self

    @model_validator(mode="after")
    def _nothing_passes_by_the_mechanism(self) -> SiteSettings:
        refuse_what_passes_by(self.privacy, self.policy, self.calibration, (self.teacher,))
        return self


class Labels(Settings):
    """How sites' class names become one label space."""

    synonyms: dict[str, tuple[str, ...]] = {}
    """Canonical name -> other names of the same class."""
    classes: tuple[str, ...] | None = None
    """Order of the label space; by default the order in which sites, sorted by name, bring their classes."""


class Ask(Settings):
    """How the pool is asked about."""

    encoding: Encoding = "f16"
    """How sites' log-probabilities come: `f32`, `f16`, `u8`, `top-K` such as `top-3`, or `votes`; every site's policy
    must allow it. [Encodings](encodings.md) says what each costs and loses."""
    coverage: bool = True
    """Ask the sites that offer coverage for it, each in the finest encoding that it allows. Only the methods `sd` and
    `ce` make use of coverage, `sd` where every site that answered a sample gave it: with another `unify.method` no
    site is asked."""
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
    """With fewer sites that answered every question the job stops; by default it needs them all. With this or
    `wait_for`, a site that cannot present itself, does not fit the job or does not agree to the contract is left out
    as long as enough others remain; with neither it stops the job."""


PATIENCE_FIELDS = frozenset({"wait_for", "wait", "deadline", "min_sites", "retries", "in_flight", "question_size"})
"""Fields of `ask` that say how many sites are enough and how long they have: a run may go on under others."""


COVERAGE_METHODS: tuple[Method, ...] = ("sd", "ce")
"""Methods of unification that make use of coverage."""


class Unify(Settings):
    """How answers become soft labels."""

    method: Method = "ce"
    across: Across = "centred"
    weights: dict[Name, Annotated[float, Field(gt=0)]] = {}
    temperature: float = Field(default=1.0, gt=0, le=100)
    prior_correction: bool = False
    """Correct answers for the class priors of the sites whose policy tells them, towards a uniform prior."""
    strength: float = Field(default=0.1, gt=0, le=1)
    """How much coverage counts beside answers, for method `ce`: with 1 a site's answer is weighed by its coverage, near
    0 coverage decides only what the answers leave open (docs/unify.md)."""
    strengths: dict[Name, Annotated[float, Field(gt=0, le=1)]] = {}
    """Site -> how much its coverage counts, for the sites where that is not `strength`."""
    other: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Prior weight of "outside the whole label space", where sites give coverage; 0: every sample is of some class.
    For method `ce` only.
    With more, `labels/other.npy` says how likely a sample is outside, and soft labels count by the rest."""

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


class Student(Settings):
    """The classifier the server trains."""

    architecture: str = "resnet8"
    learning: Literal["soft-labels", "direct-ce", "direct-mf-lf"] = "soft-labels"
    preprocessing: Preprocessing = Preprocessing()
    fit: Fit = Fit()


class Judge(Settings):
    """What the student is judged by. Nothing here is seen by training or by any choice."""

    test: DataSource | None = None
    """Labelled images nobody trained on; without them the report says nothing about accuracy."""
    test_pool: Path | None = None
    """The same images as a pool that sites hold too, in the same order: with it the baselines are judged."""
    pool_labels: Path | None = None
    """.npy of the pool's true labels, numbered by the test data's class names: for the oracle alone."""


class ClassLists(Settings):
    """Each site gets the listed classes; classes are names of the data set or their indices."""

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

    def same_job(self, other: JobSettings) -> bool:
        """Whether a run of this job may go on as one of the other: nothing but `PATIENCE_FIELDS` differs."""
        return self.identity() == other.identity()

    def identity(self) -> dict[str, Any]:
        """Return what makes this job another than others, as JSON values."""
        return self.model_dump(mode="json", exclude={"ask": set(PATIENCE_FIELDS)})

    @model_validator(mode="after")
    def _parts_fit(self) -> JobSettings:
        if self.unify.prior_correction and self.student.learning != "soft-labels":
            raise ValueError(
                f"unify.prior_correction corrects soft labels; student.learning is {self.student.learning!r}, "
                "which learns from the answers as they are"
            )
        if self.unify.other and self.student.learning != "soft-labels":
            raise ValueError(
                f"unify.other is {self.unify.other:g}, which student.learning {self.student.learning!r} cannot follow; "
                "set it to 0, or student.learning to soft-labels"
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
                ("student.learning", self.student.learning, "soft-labels"),
            ):
                if value != allowed:
                    raise ValueError(
                        f"{field} is {value!r}, which needs single answers; with privacy.secure_sum it must be "
                        f"{allowed!r}"
                    )
        if self.simulation is not None:
            if not allowed_by(self.simulation.policy.encodings, self.ask.encoding):
                raise ValueError(
                    f"ask.encoding is {self.ask.encoding!r}; simulation.policy allows: "
                    f"{', '.join(encoding_names(self.simulation.policy.encodings))}"
                )
            if self.simulation.data == self.simulation.test:
                raise ValueError("simulation.data and simulation.test are the same images; name another split")
        return self
