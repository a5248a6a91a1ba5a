"""Questions and answers as typed records, and as Flower messages. Every field is validated on arrival.

Three queries: `card` (the site speaks first: who it is and what its policy allows), `contract` (the server says
which label space and pools the job is about; the site checks its copies, and what it gives beside answers comes with
its agreement) and `answer` (a question about a range of pool samples, or a part of one). A site that will not or
cannot answer sends a `Refusal`: a code and a short reason of ours, never exception text, paths or values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

import numpy as np
from flwr.app import ConfigRecord, RecordDict
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, model_validator

from consilience.common.bounded import bounded
from consilience.common.encoding.features import basis_bytes
from consilience.common.errors import IdentityError, ProtocolError
from consilience.common.identity import key_fingerprint, read_key_line
from consilience.common.job_key import JobKey
from consilience.common.settings import (
    ENCODINGS,
    NAME_PATTERN,
    ClassName,
    CoverageEncoding,
    Encoding,
    FeatureEncoding,
    LabelKind,
    TapName,
)
from consilience.common.subsets import subset_mask, text_length

CARD, CONTRACT, ANSWER = "query.card", "query.contract", "query.answer"
MOST_CLASSES = 400_000
_MOST_MISTAKES = 1000
"""Mistakes in a record that are looked at: a list of them takes far more than the record."""
MOST_ANSWER_BYTES = 64 * 2**20
"""Encoded rows of an answer: more than a server takes in one call."""
MOST_CHANNELS = 16_384
"""Of a layer: who joins layers holds numbers for each pair of channels."""
MOST_FEATURES = 2**22
"""Numbers that a sample's features of a tap may be: who learns from them holds a batch."""
MOST_COMPONENTS = 8 * 2**20
"""Bytes of the principal components of all taps of a site, which one message holds."""
MOST_SPAN = 2**20
"""Samples from the first to the last of a question about a part of its range."""
MOST_POOL = 2**27
"""Samples of a pool of which a job asks about a part."""
FINGERPRINT_SHOWN = 12
"""First digits of a fingerprint by which folders are named and people tell one from another."""
MOST_VOUCH_BYTES = 200
"""Salt and signature of an answer."""
MOST_ENCLOSED = 4 * -(-(MOST_COMPONENTS + 1000) // 3)
"""Characters of what comes with an agreement: the components, signature and seal, in base64."""

Kind = Literal["log-probs", "log-odds", "coverage", "features"]
"""What an answer tells of a pool sample: the teacher's log-probabilities of classes, or the log-odds of labels that do
not exclude one another; how likely it is of the site's classes; or the features of one of the teacher's taps."""
LABEL_KINDS: dict[LabelKind, Kind] = {"single": "log-probs", "multi": "log-odds"}
"""What a teacher's answers are, by how many labels an image has."""

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
SiteName = Annotated[str, Field(pattern=NAME_PATTERN)]
Line = Annotated[str, Field(max_length=500, pattern=r"^\P{C}*$")]
"""One line of printable characters: a stranger's text is shown on terminals."""
RefusalCode = Literal[
    "bad-question",
    "unknown-pool",
    "pool-damaged",
    "encoding-not-allowed",
    "other-teacher",
    "teacher-failed",
    "pool-not-allowed",
    "sums-only",
    "sealed-only",
    "job-key",
    "not-approved",
    "policy-ended",
    "budget-exhausted",
    "too-many-bytes",
    "tail-not-allowed",
    "tail-limits",
    "ledger-damaged",
    "sum-refused",
    "unknown-peer",
    "internal",
]
FINAL_REFUSALS: frozenset[RefusalCode] = frozenset(
    {
        "pool-not-allowed",
        "sums-only",
        "sealed-only",
        "job-key",
        "not-approved",
        "policy-ended",
        "budget-exhausted",
        "too-many-bytes",
        "tail-not-allowed",
        "tail-limits",
        "ledger-damaged",
        "sum-refused",
        "unknown-peer",
    }
)
"""Refusals that asking again does not change: a person at the site must act first."""

RecordType = TypeVar("RecordType", bound="Record")


class RefusedReplyError(ProtocolError):
    """A site sent a refusal instead of what it was asked for."""

    def __init__(self, code: RefusalCode, reason: str) -> None:
        super().__init__(f"The site refused: {code}, {reason}")
        self.final = code in FINAL_REFUSALS
        """Whether asking again would change nothing."""


class Record(BaseModel):
    """A flat record that travels as JSON text in a Flower ConfigRecord."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    protocol: Literal[3] = 3
    """Another one where records say something else than before: both sides must be of one. Since 2 principal components
    come with agreements, and cards tell no more of them than their digest. Since 3 questions, and contracts, may be
    about a part of the pool."""

    def to_content(self) -> RecordDict:
        """Return the message content that carries this record. Raises `ProtocolError` for more than may be read."""
        return RecordDict({"record": ConfigRecord({"json": bounded(self.model_dump_json())})})

    @classmethod
    def from_content(cls, content: RecordDict) -> Self:
        """Read the record back. Raises `ProtocolError` naming the first field that is not as it must be."""
        text = _config(content, "record").get("json")
        if not isinstance(text, str):
            raise ProtocolError("A message carries no record")
        try:
            return cls.model_validate_json(bounded(text))
        except ValidationError as error:
            if error.error_count() > _MOST_MISTAKES:
                raise ProtocolError(f"A message's {cls.__name__} is not as it must be: many fields") from None
            mistakes = error.errors(include_url=False, include_context=False, include_input=False)
            first = str((*mistakes[0]["loc"], "")[0])
            if first == "protocol":
                raise ProtocolError(
                    f"A message's {cls.__name__} is of another protocol than this version's, "
                    f"{cls.model_fields['protocol'].default}: site and server must run one version of Consilience"
                ) from None
            field = first if first in cls.model_fields else "a field it has not"  # a stranger may have named it
            raise ProtocolError(f"A message's {cls.__name__} is not as it must be: {field}") from None


class CalibrationCard(BaseModel):
    """How well a teacher is calibrated on private samples that it was not trained on, by the site's own account.

    `identity`: its answers stay as they are, and the figures after are those before.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    method: Literal["identity", "temperature", "dirichlet"]
    samples: int = Field(ge=1, le=2**53)
    ece_before: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
    """Expected calibration error over 15 bins of equal width; of a multi-label teacher, as the likelihood, the mean
    over its labels."""
    ece_after: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
    nll_before: Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)]
    """Mean negative log-likelihood in nats."""
    nll_after: Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)]


class CoverageCard(BaseModel):
    """The coverage that a site has learned and may tell."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    fingerprint: Digest
    """Another estimate has another one; a question about coverage names it in place of the teacher's."""
    encodings: tuple[CoverageEncoding, ...] = Field(min_length=1, max_length=len(get_args(CoverageEncoding)))
    description: Line
    """The estimate in words."""


class ComponentsCard(BaseModel):
    """What a card tells of the principal components that leave in place of a layer's channels; not the components."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    number: int = Field(ge=1, le=MOST_CHANNELS)
    kept: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
    """Share of the channels' variance, over the site's first pool, that they hold."""
    bytes: int = Field(ge=1, le=MOST_COMPONENTS)
    """What they come to (`encoding.pack_basis`): they leave with an agreement."""
    digest: Digest
    """SHA-256 of these bytes."""


class TapCard(BaseModel):
    """One layer of a teacher whose features a site may tell, as they leave."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: TapName
    layout: Line
    """What leads to it from the layer before, as `taps.Tap.unit` writes it; empty in networks that are none of ours."""
    shape: Annotated[tuple[Annotated[int, Field(ge=1, le=MOST_CHANNELS)], ...], Field(min_length=1, max_length=3)]
    """Of one sample's features: (C,), or (C, H, W)."""
    channels: int = Field(ge=1, le=MOST_CHANNELS)
    """The layer's own; where it has more than C, its principal components leave."""
    components: ComponentsCard | None = None
    """None where the channels leave as they are."""
    fingerprint: Digest
    """Another teacher, shape or digest of components has another one; a question about the tap names it in place of the
    teacher's."""

    @model_validator(mode="after")
    def _shaped(self) -> TapCard:
        if len(self.shape) == 2 or self.shape[0] > self.channels:
            raise ValueError("shape is not (C,) or (C, H, W), or C is more than channels")
        if self.values > MOST_FEATURES:
            raise ValueError(f"a sample's features are more than {MOST_FEATURES:,} numbers")
        if (self.components is not None) != (self.shape[0] < self.channels):
            raise ValueError("there are components, or none, where C is not less than channels, or is")
        held = self.components
        if held is not None and (held.number, held.bytes) != (self.shape[0], basis_bytes(self.shape[0], self.channels)):
            raise ValueError("number or bytes of components are not those of shape and channels")
        return self

    @property
    def values(self) -> int:
        """Numbers that a sample's features are."""
        return math.prod(self.shape)


class FeaturesCard(BaseModel):
    """The taps that a site's policy allows, from the input to the output, and the encodings of their features."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    taps: tuple[TapCard, ...] = Field(min_length=1, max_length=256)
    encodings: tuple[FeatureEncoding, ...] = Field(min_length=1, max_length=len(get_args(FeatureEncoding)))

    @model_validator(mode="after")
    def _each_once(self) -> FeaturesCard:
        if len({tap.name for tap in self.taps}) < len(self.taps):
            raise ValueError("a tap stands twice")
        if len({tap.fingerprint[:FINGERPRINT_SHOWN] for tap in self.taps}) < len(self.taps):
            raise ValueError("two taps have one fingerprint, by which their answers are kept apart")
        if sum(tap.components.bytes for tap in self.taps if tap.components is not None) > MOST_COMPONENTS:
            raise ValueError(f"the taps' principal components are more than {MOST_COMPONENTS:,} bytes")
        return self


class BlockCard(BaseModel):
    """One block of a teacher: the name of its tap, what leads to it (`taps.Tap.unit`), and its channels."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: TapName
    layout: Line
    channels: int = Field(ge=1, le=MOST_CLASSES)


class TailCard(BaseModel):
    """The last blocks of a teacher and its head, as a site lets filtered amalgamation use them (common/tails)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    allow: Literal["questions", "blocks"]
    """Whether it answers questions about features, or gives the blocks themselves."""
    architecture: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,40}(@[0-9.]{1,10})?$")]
    """By its name among ours."""
    first: int = Field(ge=1, le=1000)
    """The first block whose features it takes."""
    blocks: Annotated[tuple[BlockCard, ...], FailFast()] = Field(min_length=2, max_length=1001)
    """All of the teacher's, the head last."""
    fingerprint: Digest
    """Another teacher, calibration or `first` has another one; a question about the tail names it."""
    bytes: int = Field(ge=1, le=2**40)
    """What the blocks after `first` come to as safetensors."""
    digest: Digest
    """SHA-256 of these bytes."""

    @model_validator(mode="after")
    def _first_is_one(self) -> TailCard:
        if self.first >= len(self.blocks):
            raise ValueError("first is no block before the head")
        return self


class TailDemand(BaseModel):
    """What a job will ask of a site's tail at most: questions, samples in them, and bytes to the site and back.

    Of blocks that leave, `bytes` are theirs, and `samples` none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    rounds: int = Field(ge=0, le=2**53)
    samples: int = Field(ge=0, le=2**53)
    bytes: int = Field(ge=0, le=2**53)


class SumNoiseCard(BaseModel):
    """The noise that a site needs a secure sum to carry, in units of a probability; `honest` sites share it out."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    sigma: Annotated[float, Field(gt=0, le=1e9)]
    honest: int = Field(ge=1, le=255)


class SiteCard(Record):
    """Who a site is and what its policy allows. `classes` are in the order of its answers."""

    labels: LabelKind = "single"
    """`multi`: the classes are labels that do not exclude one another, and answers are log-odds."""

    name: SiteName
    classes: tuple[ClassName, ...] = Field(min_length=1, max_length=MOST_CLASSES)
    encodings: tuple[Encoding, ...] = Field(min_length=1, max_length=len(ENCODINGS))
    """What it may be asked for; `settings.allowed_by` says which of `top-K` these allow."""
    teacher: Digest
    """Fingerprint of the teacher: another teacher has another one."""
    description: Line
    """The teacher in words: kind, architecture."""
    policy: str = Field(pattern=r"^[0-9a-f]{16}$")
    holdout_accuracy: float | None = Field(default=None, ge=0, le=1)
    """Accuracy on private images kept out of training, where the site measured it."""
    holdout_ap: float | None = Field(default=None, ge=0, le=1)
    """Of a multi-label teacher, in its place: the mean over its labels of the average precision on these images."""
    calibration: CalibrationCard | None = None
    """How well the teacher is calibrated there, where the site measured it; both only if the policy tells them."""
    class_priors: tuple[Annotated[float, Field(gt=0, le=1)], ...] | None = None
    """Shares of the classes in the private data, if the policy shares them."""
    coverage: CoverageCard | None = None
    """The site's coverage, if it has learned one and the policy lets it out."""
    features: FeaturesCard | None = None
    """The layers whose features the policy lets out, if any."""
    tail: TailCard | None = None
    """The teacher's last blocks, if the policy lets them be asked or lends them."""
    identity: Digest | None = None
    """Fingerprint of the site's key, with which it signs; None for a site that has none."""
    public_key: Annotated[str, Field(max_length=1000)] | None = None
    """That key, as OpenSSH writes it: with it anyone can check what the site signed."""
    sums_only: bool = False
    """Whether it answers in secure sums alone."""
    sum_noise: SumNoiseCard | None = None
    """The noise that it adds a share of in secure sums; None: it adds none."""
    sealed_only: bool = False
    """Whether it answers sealed for the coordinator alone."""

    @model_validator(mode="after")
    def _priors_fit(self) -> SiteCard:
        if self.class_priors is not None and (
            len(self.class_priors) != len(self.classes) or abs(sum(self.class_priors) - 1) > 1e-6
        ):
            raise ValueError("class_priors are not one share per class")
        return self

    @model_validator(mode="after")
    def _tail_scores_the_classes(self) -> SiteCard:
        if self.tail is not None and self.tail.blocks[-1].channels != len(self.classes):
            raise ValueError("tail has not one output a class")
        return self

    @model_validator(mode="after")
    def _one_key(self) -> SiteCard:
        try:
            own = self.public_key is None or key_fingerprint(read_key_line(self.public_key)) == self.identity
        except IdentityError:
            own = False
        if not own:
            raise ValueError("public_key is not the key of this identity")
        return self


class CardRequest(Record):
    """The server asks a site for its card."""

    job: SiteName


class Contract(Record):
    """What the job is about, for one site: the site's classes in the label space, and the pools by digest."""

    job: SiteName
    labels: tuple[ClassName, ...] = Field(min_length=1, max_length=MOST_CLASSES)
    class_set: tuple[Annotated[int, Field(ge=0)], ...]
    pools: tuple[Digest, ...] = Field(min_length=1)
    subset: Annotated[str, Field(min_length=4, max_length=text_length(MOST_POOL))] | None = None
    """Which samples of the first of the pools will be asked about (`subsets.subset_text`); None: all."""
    more: int = Field(default=0, ge=0, le=MOST_POOL)
    """Of how many other samples of that pool answers will be asked for, which are not chosen yet."""
    teacher: Digest
    encoding: Encoding
    """In which log-probabilities will be asked for, where they are asked for openly."""
    coverage: bool = False
    """Whether coverage of the pools will be asked for too."""
    features: tuple[TapName, ...] = Field(default=(), max_length=256)
    """Taps whose features of the first of the pools will be asked for too."""
    feature_encoding: FeatureEncoding = "f16"
    """In which they will be asked for."""
    components: tuple[TapName, ...] = Field(default=(), max_length=256)
    """Those of these taps whose principal components are to come with the agreement."""
    tail: TailDemand | None = None
    """What will be asked of the site's tail; None: nothing."""
    secure_sum: bool = False
    """Whether answers will be asked for in secure sums alone; these are about the first of the pools."""
    job_key: JobKey | None = None
    """What answers, and what comes with the agreement, are to be sealed for; None: they are not."""

    @model_validator(mode="after")
    def _more_than_some(self) -> Contract:
        if self.more and self.subset is None:
            raise ValueError("more are to be chosen, and all are asked about")
        return self

    @model_validator(mode="after")
    def _components_of_features(self) -> Contract:
        if len(set(self.components)) < len(self.components) or set(self.components) - set(self.features):
            raise ValueError("components are not of taps whose features are asked for, each once")
        return self


class Guarantee(BaseModel):
    """What all that a site released comes to once it has answered a whole job, by differential privacy.

    The site's own word. `unit`: what it speaks of: one record of the private data, or the model behind the answers.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    mechanism: str = Field(min_length=1, max_length=500)
    unit: Literal["record", "model"]
    epsilon: float = Field(ge=0, allow_inf_nan=False)
    delta: float = Field(gt=0, lt=1)


class Enclosed(BaseModel):
    """What comes with an agreement: the principal components of `taps` (common/components says how `data` is made)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    taps: tuple[TapName, ...] = Field(min_length=1, max_length=256)
    data: Annotated[str, Field(max_length=MOST_ENCLOSED)]
    """In base64; ciphertext where the contract names a job key."""


class Agreement(Record):
    """The site holds every pool of the contract, verified, its teacher works, and it will answer."""

    pools: tuple[Digest, ...]
    samples: int = Field(default=0, ge=0)
    """Pool samples that the teacher was tried on; the server sizes its questions by how long that took."""
    seconds: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    guarantee: Guarantee | None = None
    """None: no formal guarantee."""
    enclosed: Enclosed | None = None
    """None where the contract asks for no components."""


class Question(Record):
    """What the server asks about pool samples start..stop-1, or some of them."""

    job: SiteName
    pool: Digest
    start: int = Field(ge=0)
    stop: int = Field(ge=1)
    subset: Annotated[str, Field(max_length=text_length(MOST_SPAN))] | None = None
    """Which of these samples it is about, the first and the last among them (`subsets.subset_text`); None: all."""
    kind: Kind = "log-probs"
    encoding: Encoding
    """Of coverage only a `CoverageEncoding`, of features a `FeatureEncoding`."""
    teacher: Digest
    """Fingerprint of what is to answer: of the teacher, or, by kind, of the coverage or the tap."""
    policy: str = Field(pattern=r"^[0-9a-f]{16}$")
    job_key: JobKey | None = None
    """What the answer is to be sealed for; None: it is not."""

    @model_validator(mode="after")
    def _range(self) -> Question:
        if self.stop <= self.start:
            raise ValueError("stop must be greater than start")
        if self.subset is not None:
            if self.stop - self.start > MOST_SPAN:
                raise ValueError(f"stop is more than {MOST_SPAN:,} after start, with a subset")
            mask = self.mask
            if not (mask[0] and mask[-1]) or mask.all():
                raise ValueError("subset lacks its first or last sample, or has them all")
        return self

    @model_validator(mode="after")
    def _encoding_fits(self) -> Question:
        allowed = {"coverage": get_args(CoverageEncoding), "features": get_args(FeatureEncoding)}.get(self.kind)
        if allowed is not None and self.encoding not in allowed:
            raise ValueError(f"encoding of {self.kind} must be one of {', '.join(allowed)}")
        return self

    def __len__(self) -> int:
        return self.stop - self.start if self.subset is None else int(self.mask.sum())

    @property
    def mask(self) -> NDArray[np.bool_]:
        """(stop - start,): which samples of its range it is about."""
        span = self.stop - self.start
        return np.ones(span, np.bool_) if self.subset is None else subset_mask(self.subset, span)

    @property
    def ids(self) -> NDArray[np.int64]:
        """The samples that it is about, ascending."""
        return np.flatnonzero(self.mask) + self.start


@dataclass(frozen=True)
class Answer:
    """A site's answer: the question it repeats, the encoded rows, and the seconds the teacher took.

    `vouch`: salt and signature (common/vouching), empty from a site without a key. In a sealed answer (common/sealing)
    rows and vouch are ciphertext in `data`.
    """

    question: Question
    data: bytes
    seconds: float
    vouch: bytes = b""

    def to_content(self) -> RecordDict:
        """Return the message content: one record, since each costs a round trip to carry."""
        return RecordDict(
            {
                "record": ConfigRecord(
                    {
                        "json": self.question.model_dump_json(),
                        "seconds": float(self.seconds),
                        "data": self.data,
                        "vouch": self.vouch,
                    }
                )
            }
        )

    @classmethod
    def from_content(cls, content: RecordDict, expected: Question) -> Answer:
        """Read an answer to `expected`. Raises `ProtocolError` when it is a refusal or answers anything else."""
        refusal = Refusal.find(content)
        if refusal is not None:
            raise RefusedReplyError(refusal.code, refusal.reason)
        question = Question.from_content(content)
        for name in type(question).model_fields:
            if getattr(question, name) != getattr(expected, name):
                raise ProtocolError(f"An answer's {name} is not the question's")
        if len(content) != 1:
            raise ProtocolError("An answer carries more than one record")
        record = _config(content, "record")
        seconds, data = record.get("seconds"), record.get("data")
        if not isinstance(seconds, float) or not 0 <= seconds < float("inf"):
            raise ProtocolError("An answer's seconds are no time")
        if not isinstance(data, bytes):
            raise ProtocolError("An answer carries no data")
        vouch = record.get("vouch", b"")
        if not isinstance(vouch, bytes) or len(vouch) > MOST_VOUCH_BYTES:
            raise ProtocolError("An answer's signature is none")
        return cls(question, data, seconds, vouch)


class Refusal(Record):
    """Why a site does not answer: a code of the list and a short constant reason."""

    code: RefusalCode
    reason: Line

    def to_content(self) -> RecordDict:
        """Return the message content that carries the refusal."""
        return RecordDict({"refusal": ConfigRecord({"json": self.model_dump_json()})})

    @classmethod
    def find(cls, content: RecordDict) -> Refusal | None:
        """Return the refusal that a reply carries, or None. Raises `ProtocolError` for a malformed one."""
        if "refusal" not in content:
            return None
        try:
            return cls.model_validate_json(bounded(str(_config(content, "refusal").get("json"))))
        except ValidationError:
            raise ProtocolError("A site sent a refusal that cannot be read") from None


def read_reply(content: RecordDict, record: type[RecordType]) -> RecordType:
    """Read a reply that must be a `record`. Raises `ProtocolError` when it is a refusal or something else."""
    refusal = Refusal.find(content)
    if refusal is not None:
        raise RefusedReplyError(refusal.code, refusal.reason)
    return record.from_content(content)


def _config(content: RecordDict, key: str) -> dict[str, Any]:
    record = content.get(key)
    return dict(record) if isinstance(record, ConfigRecord) else {}
