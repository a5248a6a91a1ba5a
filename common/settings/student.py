"""job.yaml: the student, and the ways in which it learns.

Does not live here: what has a module of its own (concentration, filtered), how it is trained (teacher).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from consilience.common.settings.base import (
    Name,
    Settings,
    TapName,
)
from consilience.common.settings.concentration import Concentration
from consilience.common.settings.data import Preprocessing
from consilience.common.settings.filtered import Filtered
from consilience.common.settings.teacher import Fit

Target = Literal["unified", "concatenated"]
"""What the student's scores learn: unified soft labels, or the sites' answers side by side as in the papers, which
takes classes that one site each knows."""


class LayerWise(Settings):
    """Layer-wise amalgamation (Shen et al., AAAI 2019): each layer from the teachers' features, then all jointly."""

    autoencoder: Literal["principal", "descent"] = "principal"
    """How a layer's features are amalgamated: `principal` components, in closed form, or by gradient `descent` as in
    the paper."""
    order: Literal["direct", "incremental"] = "direct"
    """Of three teachers or more: all at once, or one after another."""
    epochs: int = Field(default=10, ge=1, le=10_000)
    """Of each layer's own training, and of `descent`."""
    learning_rate: float = Field(default=0.05, gt=0, le=10)
    """Of each layer's own training; for scores side by side (`target: concatenated`) a tenth of it."""
    layers: bool = True
    """Whether layers are trained by themselves; without, no features are asked for, and the joint phase is all."""
    joint: bool = True
    """Whether the whole student is trained after its layers, by `student.fit`; for scores side by side
    (`target: concatenated`) at three tenths of its learning rate."""
    target: Target = "unified"

    @model_validator(mode="after")
    def _something_is_trained(self) -> LayerWise:
        if not self.layers and not self.joint:
            raise ValueError("layers and joint are both false, so that nothing is trained; set one of them to true")
        return self


class CommonSpace(Settings):
    """One common space, and the taps that lead to it."""

    student: TapName | None = None
    """The student's tap; by default `penultimate` where a site's tap is a vector, else the last that is a map."""
    sites: dict[Name, TapName] = Field(default={})
    """Site -> its tap; by default the last that its policy allows."""
    width: int | None = Field(default=None, ge=1, le=4_096)
    """Channels of the space; by default as many as the student's tap has, and where maps meet a quarter of them, as in
    the authors' later code; at most 128, which is the paper's."""
    size: int | None = Field(default=None, ge=1, le=4096)
    """Rows and columns that maps are averaged down or interpolated up to; by default those of the smallest. Not to
    be given where a tap is a vector: maps are then averaged to one."""


class CommonFeature(Settings):
    """Common-feature learning (Luo et al., IJCAI 2019): student and teachers agree in a space of their features.

    The loss is `soft` times the soft targets', `mmd` times the distance in the common space and `reconstruction` times
    the teachers' reconstruction; 0 switches a term off. The paper's code: 1, 10 and 10.
    With `mmd` 0 no features are asked for, and the student learns from labels alone: reconstruction does not reach it.
    With `soft` 0 nothing teaches its scores.
    """

    spaces: tuple[CommonSpace, ...] = Field(default=(CommonSpace(),), min_length=1)
    soft: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    mmd: float = Field(default=10.0, ge=0, allow_inf_nan=False)
    reconstruction: float = Field(default=10.0, ge=0, allow_inf_nan=False)
    target: Target = "unified"

    @model_validator(mode="after")
    def _something_is_taught(self) -> CommonFeature:
        if not self.soft and not self.mmd:
            raise ValueError("soft and mmd are both 0, so that nothing reaches the student; set one of them above 0")
        return self


Learning = Literal[
    "soft-labels", "direct-ce", "direct-mf-lf", "layer-wise", "common-feature", "concentration", "filtered"
]


class Student(Settings):
    """The classifier the server trains."""

    architecture: str = "resnet8"
    """Named as a trained teacher's."""
    learning: Learning = "soft-labels"
    """`layer-wise` and `common-feature` take features too, of the sites that tell some (docs/amalgamation.md); the
    other sites take part by their labels. `concentration` takes each sample's labels from one site
    (docs/concentration.md). `filtered` makes it for `classes` alone, of a trunk and branches, through the blocks of the
    sites that know them (docs/filtered.md)."""
    classes: tuple[str, ...] | None = Field(default=None, min_length=1)
    """The classes that the student tells apart, by any of their names; by default all that sites know. Every site is
    asked all the same (docs/researcher.md)."""
    other: bool = False
    """Whether it has one more output, named `other`, for all that is none of `classes`. Without it, samples of other
    classes count in training by how likely they are of one of `classes`."""
    layer_wise: LayerWise = LayerWise()
    common_feature: CommonFeature = CommonFeature()
    concentration: Concentration = Concentration()
    filtered: Filtered = Filtered()
    preprocessing: Preprocessing = Preprocessing()
    fit: Fit = Fit()

    @model_validator(mode="after")
    def _classes_can_be_learnt(self) -> Student:
        if self.other and self.learning == "concentration":
            raise ValueError(
                "other is true, and learning is 'concentration', whose verticals share out wanted classes alone; set "
                "other to false, or learning to soft-labels"
            )
        if self.other and self.learning == "filtered":
            raise ValueError(
                "other is true, and learning is 'filtered', whose branches score wanted classes alone; set other to "
                "false, or learning to soft-labels"
            )
        if self.other and self.learning == "direct-mf-lf":
            raise ValueError(
                "other is true, and learning is 'direct-mf-lf', which learns differences of single classes' scores: "
                "many classes in one have none; set learning to soft-labels or direct-ce, or other to false"
            )
        if self.other and self.learning == "layer-wise" and self.target == "concatenated":
            raise ValueError(
                "other is true, and layer_wise.target is 'concatenated', which learns each class's score of the one "
                "site that knows it: many classes in one have none; set the target to unified, or other to false"
            )
        return self

    @property
    def target(self) -> Target | None:
        """What the scores learn where features are learnt from too; None where they are not."""
        if self.learning == "layer-wise":
            return self.layer_wise.target
        return self.common_feature.target if self.learning == "common-feature" else None

    @property
    def learns_features(self) -> bool:
        """Whether features are learnt from."""
        if self.learning == "layer-wise":
            return self.layer_wise.layers
        return self.learning == "common-feature" and self.common_feature.mmd > 0

    @property
    def learns_labels(self) -> bool:
        """Whether the scores learn unified soft labels."""
        if self.learning == "concentration":
            return self.concentration.target == "unified"
        if self.learning == "filtered":
            return self.filtered.joint and self.filtered.target != "teachers"
        return self.learning == "soft-labels" or self.target == "unified"
