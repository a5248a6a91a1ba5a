"""Site cards: what a site says of itself before it is asked anything.

Does not live here: which of it a policy lets out (client/card), the messages about a job (protocol).
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, FailFast, Field, model_validator

from consilience.common.encoding.features import basis_bytes
from consilience.common.errors import IdentityError
from consilience.common.identity import key_fingerprint, read_key_line
from consilience.common.records import FINGERPRINT_SHOWN, Digest, Line, Record, SiteName
from consilience.common.settings import (
    ENCODINGS,
    ClassName,
    CoverageEncoding,
    Encoding,
    FeatureEncoding,
    LabelKind,
    TapName,
)

MOST_CLASSES = 400_000
MOST_CHANNELS = 16_384
"""Of a layer: who joins layers holds numbers for each pair of channels."""
MOST_FEATURES = 2**22
"""Numbers that a sample's features of a tap may be: who learns from them holds a batch."""
MOST_COMPONENTS = 8 * 2**20
"""Bytes of the principal components of all taps of a site, which one message holds."""


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


class SumNoiseCard(BaseModel):
    """The noise that a site needs a secure sum to carry, in units of a probability; `honest` sites share it out."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    sigma: Annotated[float, Field(gt=0, le=1e9)]
    honest: int = Field(ge=1, le=255)


PRIVATE = ("holdout_accuracy", "holdout_ap", "calibration", "class_priors")
"""Fields of a site card that are figures of private data: a site may tell them at one time and not at another."""


class SiteCard(Record):
    """Who a site is and what its policy allows. `classes` are in the order of its answers."""

    labels: LabelKind = "single"
    """`multi`: the classes are labels that do not exclude one another, and answers are log-odds."""

    name: SiteName
    classes: tuple[ClassName, ...] = Field(min_length=1, max_length=MOST_CLASSES)
    encodings: tuple[Encoding, ...] = Field(min_length=1, max_length=len(ENCODINGS))
    """What it may be asked for; `settings.allowed_by` says which of `top-K` and `top-K-u8` these allow."""
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
