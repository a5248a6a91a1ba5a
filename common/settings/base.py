"""What settings of both sides are made of: names, encodings, and the model that refuses unknown fields.

Does not live here: any field.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

NAME_PATTERN = r"^[a-z0-9][a-z0-9-]{0,62}$"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
"""Lower-case letters, digits and hyphens: also a folder name and a DNS label."""

ClassName = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^\P{C}*$")]
"""Printable: a name of a stranger's is shown on terminals and pages."""

ENCODINGS = ("f32", "f16", "u8", "votes")
"""Encodings of log-probabilities that a fixed name has, finest first."""
_TOP = re.compile("top-([1-9][0-9]{0,5})(-u8)?")
_OF_EVERY_CLASS = {False: ("f32", "f16"), True: ("f32", "f16", "u8")}
"""Encodings of every class that a `top-K`, or (True) a `top-K-u8`, can be computed from."""


def _off(value: object) -> object:
    return "off" if value is False else value


OFF_IS_A_WORD = BeforeValidator(_off)
"""For a field of which `off` is a value: YAML reads a bare off as false."""


def largest_sent(encoding: str) -> int | None:
    """Return the K of `top-K` and `top-K-u8`, how many classes of a row are sent; None for every other encoding."""
    found = _TOP.fullmatch(encoding)
    return int(found[1]) if found else None


def sent_in_bytes(encoding: str) -> bool:
    """Whether an encoding is `top-K-u8`."""
    return largest_sent(encoding) is not None and encoding.endswith("-u8")


def _encoding(value: str) -> str:
    if value not in ENCODINGS and largest_sent(value) is None:
        raise PydanticCustomError(
            "encoding", "Input should be f32, f16, u8, top-K (for example top-3), top-K-u8 (top-3-u8) or votes"
        )
    return value


Encoding = Annotated[str, AfterValidator(_encoding)]
"""Encodings of log-probabilities (docs/encodings.md), finest first: `f32`, `f16`, `u8`, `top-K` and `top-K-u8` for a
K of 1 or more, `votes`."""
CoverageEncoding = Literal["f16", "u8"]
"""Encodings of coverage, finest first."""
FeatureEncoding = Literal["f16", "u8"]
"""Encodings of features, finest first."""
TAP_PATTERN = r"^[A-Za-z0-9_.]{1,100}$"
TapName = Annotated[str, Field(pattern=TAP_PATTERN)]
"""A named layer of a network: of ours `layer1`, `layer2` and so on, else the name of a module; or `penultimate`."""
CALLABLE_PATTERN = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"
"""`package.module:function`: Python code that was installed beside Consilience."""
CoverageFamily = Literal["network", "features", "outputs"]
LabelKind = Literal["single", "multi"]
"""Whether an image has one label, or any number of them."""


def allowed_by(encodings: Iterable[Encoding], asked: Encoding) -> bool:
    """Whether a site that allows `encodings` allows `asked`.

    f32 and f16 allow every `top-J` and `top-J-u8`, `top-K` those of J <= K; u8 allows every `top-J-u8`, `top-K-u8`
    those of J <= K. Each can be computed from what allows it, so it tells nothing more.
    """
    wanted = largest_sent(asked)
    if wanted is None:
        return asked in encodings
    small = sent_in_bytes(asked)
    return any(
        held in _OF_EVERY_CLASS[small] or ((largest_sent(held) or 0) >= wanted and small >= sent_in_bytes(held))
        for held in encodings
    )


def encoding_names(encodings: Iterable[Encoding]) -> list[str]:
    """Return for people what `encodings` allow: the names, and `top-K` and `top-K-u8` with the K that are allowed."""
    found = list(encodings)
    told = [name for name in found if name in ENCODINGS and name != "votes"]
    for small, end in ((False, ""), (True, "-u8")):
        if not set(_OF_EVERY_CLASS[small]).isdisjoint(found):
            told.append(f"top-K{end}")
        elif most := max((largest_sent(name) or 0 for name in found if small or not sent_in_bytes(name)), default=0):
            told.append(f"top-1{end} to top-{most}{end}" if most > 1 else f"top-1{end}")
    return [*told, *["votes"] * ("votes" in found)]


class Settings(BaseModel):
    """A part of a settings file: unknown fields are refused, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True)
