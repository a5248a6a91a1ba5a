"""The mechanisms behind which a teacher answers, and what would pass by them.

Does not live here: the mechanisms (client/privacy).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from consilience.common.settings.base import Settings
from consilience.common.settings.policy import EPSILON_LIMITS, Policy
from consilience.common.settings.teacher import TeacherSettings


def some_noise(value: object) -> object:
    """Refuse noise of nothing, with the reason."""
    if isinstance(value, int | float) and not isinstance(value, bool) and value == 0:
        raise ValueError("it is 0, and without noise there is no guarantee; give at least 0.01, or mechanism: none")
    return value


Delta = Annotated[float, Field(gt=0, le=0.01)]
"""Chance with which epsilon may not hold: below one in the number of private records."""
LEAST_NOISE, MOST_NOISE = 0.01, 1e9
Noise = Annotated[float, BeforeValidator(some_noise), Field(ge=LEAST_NOISE, le=MOST_NOISE)]
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


class SumNoise(Settings):
    """Noise on the teacher's probabilities, of which each site of a secure sum adds a share.

    Protects one whole answer of the model, as `output-noise` does; it says nothing of a record
    (docs/privacy_mechanisms.md). Needs `policy.sums_only`.
    """

    mechanism: Literal["sum-noise"]
    sigma: Noise
    """Noise that the sum must carry on each of the site's probabilities; two answers lie up to 1.41 apart."""
    honest: int = Field(ge=1, le=255)
    """Sites with noise of their own, this one among them, that are trusted to stay to the end, add their share and tell
    nobody of it. With 1 this site trusts none and adds all of the noise itself."""
    delta: Delta = 1e-5


Mechanism = NoPrivacy | Pate | DpSgd | OutputNoise | SumNoise
Privacy = Annotated[Mechanism, Field(discriminator="mechanism")]
TEACHERS_WITH_BLOCKS = ("train", "state_dict")
"""Kinds of teachers whose network is one that is built here, so that it can be cut into blocks."""
WHOLE_MODEL = ("output-noise", "sum-noise")
"""Mechanisms that take any teacher as it is."""


def refuse_what_passes_by(
    privacy: Mechanism,
    policy: Policy,
    calibration: str,
    teachers: tuple[TeacherSettings, ...],
) -> None:
    """Raise `ValueError` for what would let private data out past the mechanism, or what it cannot train, and for a
    tail that the teacher cannot give or that would pass by its calibration."""
    mechanism = privacy.mechanism
    if policy.tail.open:
        _refuse_tail(policy, calibration, teachers)
    if mechanism == "none":
        for field, most in policy.limits.model_dump(include=EPSILON_LIMITS).items():
            if most is not None:
                raise ValueError(
                    f"policy.limits.{field} is {most:g}, and without a privacy.mechanism answers have no epsilon; "
                    "choose one, or leave the limit out"
                )
        return
    if mechanism == "sum-noise" and not policy.sums_only:
        raise ValueError(
            "privacy.mechanism is sum-noise, which is in secure sums alone, and policy.sums_only is false, so that "
            "answers could leave without it; set policy.sums_only to true"
        )
    for teacher in teachers if mechanism not in WHOLE_MODEL else ():
        if teacher.kind != "train":
            raise ValueError(
                f"privacy.mechanism is {mechanism}, which trains the teacher itself; teacher.kind is "
                f"{teacher.kind!r}, allowed: 'train'"
            )
        if mechanism == "dp-sgd" and teacher.fit.compile:
            raise ValueError("teacher.fit.compile is true, which dp-sgd cannot make use of; set it to false")
    if mechanism not in WHOLE_MODEL and calibration != "off":
        raise ValueError(
            f"calibration is {calibration}, which learns from the private data without noise; with "
            f"privacy.mechanism {mechanism} set it to off"
        )
    past = {
        "coverage": policy.coverage != "off",
        # what a network trained with dp-sgd computes is post-processing, at whatever layer
        "features": bool(policy.features.taps) and mechanism != "dp-sgd",
        "tail": policy.tail.open,
        "class_priors": policy.class_priors,
        "holdout_accuracy": policy.holdout_accuracy,
    }
    for field in (field for field, told in past.items() if told):
        instead = {"coverage": "set it to off", "features": "leave it out", "tail": "leave it out"}.get(
            field, "set it to false"
        )
        raise ValueError(
            f"policy.{field} lets out what the private data say, past privacy.mechanism {mechanism}; {instead}"
        )


def _refuse_tail(policy: Policy, calibration: str, teachers: tuple[TeacherSettings, ...]) -> None:
    allow = policy.tail.allow
    for teacher in teachers:
        if teacher.kind not in TEACHERS_WITH_BLOCKS:
            raise ValueError(
                f"policy.tail.allow is {allow!r}, and teacher.kind is {teacher.kind!r}, of which no blocks are in "
                f"hand; allowed: {', '.join(map(repr, TEACHERS_WITH_BLOCKS))}; set policy.tail.allow to off, or give "
                "the teacher as one of these"
            )
    if calibration == "dirichlet":
        raise ValueError(
            f"policy.tail.allow is {allow!r}, and calibration is 'dirichlet', which is applied after the last block: a "
            "tail would tell the answers from before it; set calibration to temperature, or policy.tail.allow to off"
        )
