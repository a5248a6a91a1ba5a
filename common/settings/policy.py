"""What a site allows to leave, and how much of it.

Does not live here: holding a question against it (client/policy).
"""

from __future__ import annotations

import datetime
from typing import Annotated, Literal

from pydantic import Field, model_validator

from consilience.common.files import canonical_json, sha256
from consilience.common.settings.base import (
    ENCODINGS,
    OFF_IS_A_WORD,
    TAP_PATTERN,
    CoverageEncoding,
    Encoding,
    FeatureEncoding,
    Settings,
)


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


class Reduction(Settings):
    """What is taken from a tap's features before they leave."""

    size: int | None = Field(default=None, ge=1, le=4096)
    """Maps are averaged down to at most so many rows and columns; by default they leave at the layer's size."""
    channels: int | None = Field(default=None, ge=1, le=65_536)
    """Most channels: where the layer has more, its principal components over the site's first pool leave instead."""


EVERY_LAYER = "*"
"""In `features.taps`: every layer before the scores, of a teacher of one of our architectures."""


class Features(Settings):
    """Features that may leave, of named layers of the teacher: its taps. They tell far more than answers do."""

    taps: dict[Annotated[str, Field(pattern=rf"{TAP_PATTERN}|^\*$")], Reduction] = Field(default={})
    """Tap -> what is taken from it; without any, no features leave. `consilience site taps` lists the teacher's;
    `"*"` stands for every layer of one of our architectures that is not named."""
    precision: FeatureEncoding = "f16"
    """The finest encoding: `f16`, or `u8`, which tells each value to 1/255 of its sample's range."""
    bytes: int = Field(default=2**30, ge=1, le=2**53)
    """Most bytes of features that a job may ask for, over all taps and samples, principal components among them."""
    bytes_lifetime: int = Field(default=2**32, ge=1, le=2**53)
    """Most bytes of features that may be newly released since the ledger began, over all jobs, taps and policies,
    principal components among them. What left before leaves again, to any job, as the same bytes and at no cost."""

    @property
    def encodings(self) -> tuple[FeatureEncoding, ...]:
        """Encodings of features the server may ask for, finest first; none where no features leave."""
        if not self.taps:
            return ()
        return ("f16", "u8") if self.precision == "f16" else ("u8",)


_NARROWING = ("temperature", "decimals", "cap", "floor", "sums_only", "sealed_only")
"""Fields of the policy that keep something of answers back, which a tail, asked or lent, would tell all the same."""


class Tail(Settings):
    """The teacher's last blocks and head, for filtered amalgamation (docs/filtered.md). They tell far more than answers
    about a pool do: whoever may send features of its own making learns what the blocks compute."""

    allow: Annotated[Literal["off", "questions", "blocks"], OFF_IS_A_WORD] = "off"
    """`questions`: the blocks stay at the site, and features that the server sends are answered with outputs and
    gradients, within the limits below. `blocks`: their weights leave, once and for all; nothing is asked of them
    afterwards."""
    first: int = Field(default=1, ge=1, le=1000)
    """The first block whose features are taken: the blocks after it, and the head, are what is asked or leaves. With
    more, less of the teacher is told, and the student's branches can leave its trunk only later."""
    rounds: int = Field(default=100_000, ge=0, le=2**53)
    """Most questions of a job about features."""
    samples: int = Field(default=2_000_000, ge=0, le=2**53)
    """Most samples of features that a job may send, over all its questions."""
    samples_lifetime: int = Field(default=20_000_000, ge=0, le=2**53)
    """The same since the ledger began, over all jobs."""
    bytes: int = Field(default=2**36, ge=0, le=2**53)
    """Most bytes of features, outputs and gradients that a job may send and get."""

    @property
    def open(self) -> bool:
        """Whether it is allowed at all."""
        return self.allow != "off"


class Policy(Settings):
    """What the site allows to leave. Nothing the server sends can widen it.

    Another policy is another version: what left under an earlier one counts anew if it is asked again.
    """

    precision: Encoding = "f16"
    """The finest encoding of log-probabilities that may leave: `f32`, `f16`, `u8` (a byte a class), `top-K`, for
    example `top-3` (the three largest and the sum of the others), `top-K-u8` (the same in fewer bits) or `votes` (the
    largest class alone). Whatever can be computed from it may leave too: see [encodings](encodings.md)."""
    coverage: Annotated[Literal["off", "u8", "f16"], OFF_IS_A_WORD] = "off"
    """The finest encoding of coverage that may leave: of the site's estimate, one number a pool sample, of how likely
    the sample is of one of its classes. `u8` tells it to 1/256; `off`: it does not leave."""
    features: Features = Features()
    """Features of the teacher's layers that may leave; by default none (docs/amalgamation.md)."""
    tail: Tail = Tail()
    """Whether filtered amalgamation may use the teacher's last blocks; by default it may not."""
    class_priors: bool = False
    """Whether the shares of the classes in the private data, in hundredths, may be told."""
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
    sum_owners: int = Field(default=1, ge=1, le=255)
    """How many sites, this one among them, must know each of its classes, and still do if as many are lost as may be,
    for its answers to be summed. With 1 they are summed also for a class that it alone knows, where the sum is its
    answer."""
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
        if self.sums_only and self.features.taps:
            raise ValueError("sums_only is true, and features leave openly; leave features.taps out")
        return self

    @model_validator(mode="after")
    def _a_tail_tells_all(self) -> Policy:
        whole = Policy.model_fields
        narrowed = [name for name in _NARROWING if getattr(self, name) != whole[name].default]
        narrowed += ["precision"] if self.precision not in ("f32", "f16") else []
        if self.tail.open and narrowed:
            raise ValueError(
                f"tail.allow is {self.tail.allow!r}, which tells what {narrowed[0]} ({getattr(self, narrowed[0])}) "
                "keeps back from answers; set tail.allow to off, or leave that field out"
            )
        return self

    @property
    def encodings(self) -> tuple[Encoding, ...]:
        """Encodings the server may ask for, finest first; `allowed_by` says which `top-K` they allow."""
        if self.precision in ENCODINGS:
            return ENCODINGS[ENCODINGS.index(self.precision) :]
        return (self.precision, "votes")

    @property
    def coverage_encodings(self) -> tuple[CoverageEncoding, ...]:
        """Encodings of coverage the server may ask for, finest first."""
        allowed: dict[str, tuple[CoverageEncoding, ...]] = {"off": (), "u8": ("u8",), "f16": ("f16", "u8")}
        return allowed[self.coverage]

    @property
    def version(self) -> str:
        """A digest of the policy: another policy is another version."""
        return sha256(canonical_json(self.model_dump(mode="json")))[:16]
