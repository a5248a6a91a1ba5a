"""A teacher's tail on the wire: questions about features, pieces of lent blocks, and what comes back.

A tail is the blocks of a teacher after some block, and its head. Where a site lets questions be asked of it, the server
sends features at a block and gets outputs, or, with the outputs' gradient, the features' gradient. Where it lends its
blocks, the server fetches them as safetensors, piece by piece. Numbers are float32, little-endian, in the order sample,
channel, row, column.

Does not live here: what a card tells of a tail (common/cards), how many questions a job has (common/nets/tail_plan),
blocks as networks (common/nets/blocks).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from flwr.app import ConfigRecord, RecordDict
from numpy.typing import NDArray
from pydantic import Field, model_validator

from consilience.common.cards import MOST_CHANNELS, MOST_CLASSES
from consilience.common.errors import ProtocolError
from consilience.common.protocol import Refusal, RefusedReplyError
from consilience.common.records import Digest, Record, SiteName

TAIL, BLOCKS = "query.tail", "query.blocks"
QUESTION_BYTES = 16 * 2**20
"""Most bytes of numbers that a question carries, or its answer."""
PIECE_BYTES = 8 * 2**20
"""Most bytes of lent blocks in one answer."""
Floats = NDArray[np.float32]
_Side = Annotated[int, Field(ge=1, le=4096)]


class TailQuestion(Record):
    """Features of `samples` samples at a block: what are their outputs, or, with `gradient`, the features' gradient?"""

    job: SiteName
    tail: Digest
    """Fingerprint of the tail."""
    policy: str = Field(pattern=r"^[0-9a-f]{16}$")
    block: int = Field(ge=1, le=1000)
    samples: int = Field(ge=1, le=2**20)
    shape: tuple[Annotated[int, Field(ge=1, le=MOST_CHANNELS)], _Side, _Side]
    """Of one sample's features: channels, rows, columns."""
    outputs: int = Field(ge=1, le=MOST_CLASSES)
    """Outputs of the tail."""
    gradient: bool = False
    """Whether a gradient of the outputs comes with the features, and one of the features is asked for."""

    @model_validator(mode="after")
    def _bounded(self) -> TailQuestion:
        if 4 * self.samples * (math.prod(self.shape) + self.outputs) > QUESTION_BYTES:
            raise ValueError(f"samples have more than {QUESTION_BYTES:,} bytes of numbers")
        return self

    @property
    def sent(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of what comes with the question."""
        features, outputs = (self.samples, *self.shape), (self.samples, self.outputs)
        return (features, outputs) if self.gradient else (features,)

    @property
    def answered(self) -> tuple[int, ...]:
        """Shape of the answer."""
        return (self.samples, *self.shape) if self.gradient else (self.samples, self.outputs)

    @property
    def bytes(self) -> int:
        """Bytes of numbers, to the site and back."""
        return 4 * sum(math.prod(shape) for shape in (*self.sent, self.answered))


class BlocksQuestion(Record):
    """Bytes start..stop-1 of the blocks that a site lends."""

    job: SiteName
    tail: Digest
    policy: str = Field(pattern=r"^[0-9a-f]{16}$")
    start: int = Field(ge=0)
    stop: int = Field(ge=1)

    @model_validator(mode="after")
    def _range(self) -> BlocksQuestion:
        if not self.start < self.stop <= self.start + PIECE_BYTES:
            raise ValueError(f"stop is not after start, or by more than {PIECE_BYTES:,}")
        return self


@dataclass(frozen=True)
class Carried:
    """A question about a tail, and the bytes that go with it or answer it."""

    question: TailQuestion | BlocksQuestion
    data: bytes = b""

    def to_content(self) -> RecordDict:
        """Return the message content: one record, since each costs a round trip to carry."""
        return RecordDict({"record": ConfigRecord({"json": self.question.model_dump_json(), "data": self.data})})


def asked(content: RecordDict) -> tuple[TailQuestion, tuple[Floats, ...]]:
    """Return a question about features, and the numbers with it. Raises `ProtocolError` for anything else."""
    question = TailQuestion.from_content(content)
    return question, numbers(_data(content), question.sent)


def answered(content: RecordDict, expected: TailQuestion | BlocksQuestion) -> bytes:
    """Return what answers `expected`, its length checked and nothing else.

    Raises `ProtocolError` when it is a refusal, or answers anything else.
    """
    if (refusal := Refusal.find(content)) is not None:
        raise RefusedReplyError(refusal.code, refusal.reason)
    if type(expected).from_content(content) != expected:
        raise ProtocolError("An answer about a tail is not to the question")
    data = _data(content)
    size = 4 * math.prod(expected.answered) if isinstance(expected, TailQuestion) else expected.stop - expected.start
    if len(data) != size:
        raise ProtocolError(f"An answer about a tail has {len(data):,} bytes; expected {size:,}")
    return data


def packed(arrays: Sequence[Floats]) -> bytes:
    """Return arrays as they travel, one after another."""
    return b"".join(np.ascontiguousarray(array, "<f4").tobytes() for array in arrays)


def numbers(data: bytes, shapes: Sequence[tuple[int, ...]]) -> tuple[Floats, ...]:
    """Return the float32 arrays of these shapes that `data` is.

    Raises `ProtocolError` for another length, and a value that is not finite.
    """
    sizes = [math.prod(shape) for shape in shapes]
    if len(data) != 4 * sum(sizes):
        raise ProtocolError(f"Numbers of a tail have {len(data):,} bytes; expected {4 * sum(sizes):,}")
    flat = np.frombuffer(data, "<f4").astype(np.float32)
    if not np.isfinite(flat).all():
        raise ProtocolError("Numbers of a tail hold a value that is not finite")
    ends = np.cumsum(sizes)
    return tuple(flat[end - size : end].reshape(shape) for size, end, shape in zip(sizes, ends, shapes, strict=True))


def _data(content: RecordDict) -> bytes:
    record = content.get("record")
    data = record.get("data") if isinstance(record, ConfigRecord) and len(content) == 1 else None
    if not isinstance(data, bytes):
        raise ProtocolError("A message about a tail carries no data, or more than one record")
    return data
