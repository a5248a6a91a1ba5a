"""Settings of knowledge concentration (Gao et al., 2017): verticals, what is learnt of them, and the student's head.

Does not live here: what the fields do, and whether verticals fit a label space (server/student).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from consilience.common.settings.base import ClassName, Name, Settings

Routing = Literal["coverage", "unified"]
HeadKind = Literal["fc-fc", "fc-sc", "sc-sc"]
Scaling = Literal["none", "vertical", "class"]
KEEP = 100
"""Classes kept of a specialist's answer, where the job does not say and the vertical has as many."""


class Head(Settings):
    """The student's last layers: two hidden ones, each shared (`fc`) or with a block for each vertical (`sc`)."""

    kind: HeadKind = "fc-sc"
    first: int = Field(default=1024, ge=1, le=65_536)
    """Units of the first hidden layer, for each vertical where it is `sc`."""
    second: int = Field(default=128, ge=1, le=65_536)
    """Units of the second hidden layer, for each vertical where it is `sc`: all that a class is scored by."""
    shared: int = Field(default=0, ge=0, le=65_536)
    """Of the `second` units of `fc-sc`, so many are the same for all verticals."""
    scaling: Scaling = "none"
    """A vertical's scores are brought to length 1 and multiplied by one number for each `vertical` or `class`; it
    wants higher rates (docs/concentration.md)."""
    start: float | None = Field(default=None, gt=0, le=1e6)
    """Where those numbers start, with a variance of 0.001; by default at the root of the number of classes of the
    vertical."""
    learned: bool = True
    """Whether those numbers are learnt; without, they stay at `start` itself."""

    @model_validator(mode="after")
    def _shared_fits(self) -> Head:
        if self.shared and self.kind != "fc-sc":
            raise ValueError(f"shared is {self.shared}, which head {self.kind!r} has no use for; leave it out")
        if self.shared > self.second:
            raise ValueError(f"shared is {self.shared}, more than the {self.second} units of second; lower it")
        return self


class Concentration(Settings):
    """Knowledge concentration: each sample is taught by the specialist of one vertical, a named part of the classes."""

    verticals: dict[Name, Annotated[tuple[ClassName, ...], Field(min_length=1)]] | None = None
    """Vertical -> its classes, every class in exactly one. By default one for each class set of a site, where those are
    disjoint."""
    target: Literal["specialist", "unified"] = "specialist"
    """What is learnt: of the specialist of the sample's vertical its `keep` highest probabilities, and zero elsewhere,
    by a sigmoid for each class as in the paper; or the `keep` highest unified ones, by a softmax over all classes."""
    routing: Routing | None = None
    """Which specialist a sample is taught by: the site with the highest `coverage`, or one of the vertical that the
    `unified` labels give most. By default by coverage where every site that answered gave it, else by unified
    labels."""
    keep: int | None = Field(default=None, ge=1, le=1_000_000)
    """Probabilities kept of a sample, at most as many as the smallest vertical has classes; by default 100, or all
    classes of a vertical that has fewer."""
    drawn: float = Field(default=1.0, gt=0, le=1)
    """Share of the classes of other verticals than the sample's that are drawn for each batch and stand for all, for
    `target: specialist` and a head with `scaling: none`: faster with very many classes, and right on average."""
    head: Head = Head()

    @model_validator(mode="after")
    def _draws_what_it_can(self) -> Concentration:
        if self.drawn < 1 and (self.target != "specialist" or self.head.scaling != "none"):
            raise ValueError(
                f"drawn is {self.drawn:g}, which target {self.target!r} with head.scaling {self.head.scaling!r} cannot "
                "take; set drawn to 1, or target to specialist and head.scaling to none"
            )
        return self

    @model_validator(mode="after")
    def _each_class_once(self) -> Concentration:
        held: dict[str, str] = {}
        for name, classes in (self.verticals or {}).items():
            for label in classes:
                if label in held:
                    raise ValueError(f"class {label!r} is in verticals {held[label]} and {name}; keep it in one")
                held[label] = name
        if self.verticals is not None and not self.verticals:
            raise ValueError("verticals names none; name them, or leave the field out for one a site")
        return self

    @model_validator(mode="after")
    def _keeps_what_there_is(self) -> Concentration:
        if self.keep is not None and self.verticals and self.target == "specialist":
            least = min(self.verticals, key=lambda name: len((self.verticals or {})[name]))
            if self.keep > len(self.verticals[least]):
                raise ValueError(
                    f"keep is {self.keep}; vertical {least} has {len(self.verticals[least])} classes; lower keep, or "
                    "leave it out"
                )
        return self
