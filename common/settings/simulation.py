"""job.yaml: the sites of a simulation.

Does not live here: making them (deploy/simulation).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from consilience.common.settings.base import Settings
from consilience.common.settings.data import DataSource
from consilience.common.settings.multi_label import refuse_for_labels
from consilience.common.settings.policy import Policy
from consilience.common.settings.privacy import NoPrivacy, Privacy, refuse_what_passes_by
from consilience.common.settings.teacher import Coverage, TrainTeacher


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
