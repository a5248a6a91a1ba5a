"""Questions and answers as typed records, and as Flower messages. Every field is validated on arrival.

Here are the queries `card` (the site speaks first: who it is and what its policy allows), `contract` (the server says
which label space and pools the job is about; the site checks its copies, and what it gives beside answers comes with
its agreement) and `answer` (a question about a range of pool samples, or a part of one); common/tails has those about
last blocks, common/sums those of secure sums. A site that will not or
cannot answer sends a `Refusal`: a code and a short reason of ours, never exception text, paths or values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

import numpy as np
from flwr.app import ConfigRecord, RecordDict
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from consilience.common.bounded import bounded
from consilience.common.cards import MOST_CLASSES, MOST_COMPONENTS
from consilience.common.errors import ProtocolError
from consilience.common.job_key import JobKey
from consilience.common.records import Digest, Line, Record, RecordType, SiteName, config_of
from consilience.common.settings import (
    ClassName,
    CoverageEncoding,
    Encoding,
    FeatureEncoding,
    LabelKind,
    TapName,
)
from consilience.common.subsets import subset_mask, text_length

CARD, CONTRACT, ANSWER = "query.card", "query.contract", "query.answer"
MOST_ANSWER_BYTES = 64 * 2**20
"""Encoded rows of an answer: more than a server takes in one call."""
MOST_SPAN = 2**20
"""Samples from the first to the last of a question about a part of its range."""
MOST_POOL = 2**27
"""Samples of a pool of which a job asks about a part."""
MOST_VOUCH_BYTES = 200
"""Salt and signature of an answer."""
MOST_ENCLOSED = 4 * -(-(MOST_COMPONENTS + 1000) // 3)
"""Characters of what comes with an agreement: the components, signature and seal, in base64."""

Kind = Literal["log-probs", "log-odds", "coverage", "features"]
"""What an answer tells of a pool sample: the teacher's log-probabilities of classes, or the log-odds of labels that do
not exclude one another; how likely it is of the site's classes; or the features of one of the teacher's taps."""
LABEL_KINDS: dict[LabelKind, Kind] = {"single": "log-probs", "multi": "log-odds"}
"""What a teacher's answers are, by how many labels an image has."""

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


class RefusedReplyError(ProtocolError):
    """A site sent a refusal instead of what it was asked for."""

    def __init__(self, code: RefusalCode, reason: str) -> None:
        super().__init__(f"The site refused: {code}, {reason}")
        self.final = code in FINAL_REFUSALS
        """Whether asking again would change nothing."""


class TailDemand(BaseModel):
    """What a job will ask of a site's tail at most: questions, samples in them, and bytes to the site and back.

    Of blocks that leave, `bytes` are theirs, and `samples` none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    rounds: int = Field(ge=0, le=2**53)
    samples: int = Field(ge=0, le=2**53)
    bytes: int = Field(ge=0, le=2**53)


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
        record = config_of(content, "record")
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
            return cls.model_validate_json(bounded(str(config_of(content, "refusal").get("json"))))
        except ValidationError:
            raise ProtocolError("A site sent a refusal that cannot be read") from None


def read_reply(content: RecordDict, record: type[RecordType]) -> RecordType:
    """Read a reply that must be a `record`. Raises `ProtocolError` when it is a refusal or something else."""
    refusal = Refusal.find(content)
    if refusal is not None:
        raise RefusedReplyError(refusal.code, refusal.reason)
    return record.from_content(content)
