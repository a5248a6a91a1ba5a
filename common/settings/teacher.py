"""A site's teacher and its coverage: how they are trained, or where they are.

Does not live here: doing it (client/teacher, client/coverage).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from consilience.common.settings.base import CALLABLE_PATTERN, ClassName, CoverageFamily, LabelKind, Settings
from consilience.common.settings.data import Preprocessing


class _Training(Settings):
    epochs: int
    batch_size: int = Field(default=64, ge=1, le=65_536)
    learning_rate: float = Field(default=0.1, gt=0, le=10)
    weight_decay: float = Field(default=5e-4, ge=0, le=1)
    augment: bool = True
    """Whether images are moved by up to an eighth of their size, and mirrored, each time anew."""
    compile: bool = False
    precision: Literal["auto", "f32"] = "auto"
    """auto: bf16 where a measurement at the start shows that it pays, else f32; f32: the same result every time."""


class Fit(_Training):
    """How a network is trained: SGD with Nesterov momentum under a one-cycle learning rate."""

    epochs: int = Field(default=60, ge=1, le=10_000)
    """Passes over the images. Small data needs more of them: teachers of 4,000 to 6,000 images gain one to eight points
    from 60 in place of 20 (docs/coverage.md)."""
    mirror: bool = True
    """Whether augmentation mirrors images left and right: not for digits, writing, or sides of a body."""


class CoverageFit(_Training):
    """How a coverage network is trained: as `Fit`, with defaults of its own."""

    epochs: int = Field(default=15, ge=1, le=10_000)
    pretrain: int = Field(default=60, ge=0, le=10_000)
    """Passes over the private images alone before, in batches of 64 at most, to tell the site's classes apart; 0: none.
    Data without labels, or of one class, has nothing to tell apart."""
    batch_size: int = Field(default=256, ge=1, le=65_536)
    learning_rate: float = Field(default=0.05, gt=0, le=10)
    mirror: bool | None = None
    """Whether augmentation mirrors images left and right; by default as for the teacher, where it is trained here, else
    yes."""


class _Labelled(Settings):
    labels: LabelKind = "single"
    """`multi`: an image has any number of the teacher's labels, and each output says of one label, by itself, how
    likely it applies (docs/multi_label.md); probabilities are then those of a sigmoid, logits are log-odds."""

    def identity(self) -> dict[str, Any]:
        """Return what tells the teacher from others, as JSON values, without its path."""
        held = self.model_dump(mode="json", exclude={"path"})
        return {name: value for name, value in held.items() if (name, value) != ("labels", "single")}


class TrainTeacher(_Labelled):
    """Train one of our architectures, or any of torchvision's by name, on the site's private data."""

    kind: Literal["train"]
    architecture: str
    """cnn3, resnet8, resnet20, vgg6 or mobilenet-small, or `vgg6@1.25` for layers 1.25 times as wide; the name of one
    of torchvision's classifiers; or `python:package.module:function`, a network of your own, which that function
    returns (docs/architectures.md)."""
    fit: Fit = Fit()
    preprocessing: Preprocessing = Preprocessing()
    holdout: float = Field(default=0.1, ge=0, lt=0.9)
    """Share of the private data kept out of training, to measure the teacher's accuracy and to calibrate it."""


class _Hosted(_Labelled):
    classes: tuple[ClassName, ...] = Field(min_length=1)
    preprocessing: Preprocessing

    @model_validator(mode="after")
    def _each_class_once(self) -> _Hosted:
        for name in self.classes:
            if self.classes.count(name) > 1:
                raise ValueError(f"class {name!r} is named twice; name every class once")
        return self


class StateDictTeacher(_Hosted):
    """A torch `state_dict` (safetensors, or .pt read with weights_only) for a named architecture."""

    kind: Literal["state_dict"]
    architecture: str
    path: Path


class TorchScriptTeacher(_Hosted):
    """A TorchScript file that maps (n, C, H, W) float32 to (n, classes) scores."""

    kind: Literal["torchscript"]
    path: Path
    outputs: Literal["logits", "probabilities"] = "logits"


class ExportTeacher(_Hosted):
    """A `torch.export` file (.pt2) that maps (n, C, H, W) float32 to (n, classes) scores."""

    kind: Literal["export"]
    path: Path
    outputs: Literal["logits", "probabilities"] = "logits"


class SklearnTeacher(_Hosted):
    """A scikit-learn classifier with `predict_proba`, saved by skops; rows are flattened images."""

    kind: Literal["sklearn"]
    path: Path


class OnnxTeacher(_Hosted):
    """An ONNX file run by onnxruntime, (n, C, H, W) float32 in, (n, classes) scores out."""

    kind: Literal["onnx"]
    path: Path
    outputs: Literal["logits", "probabilities"] = "logits"


class CallableTeacher(_Hosted):
    """A Python callable the site itself installed: (n, C, H, W) float32 in, (n, classes) probabilities out.

    Where it has an attribute `features`, that is called with the same images and gives taps by name, from the input to
    the output: (n, C) or (n, C, H, W) floating each (docs/amalgamation.md).
    """

    kind: Literal["callable"]
    callable: str = Field(pattern=CALLABLE_PATTERN)


TeacherSettings = Annotated[
    TrainTeacher
    | StateDictTeacher
    | TorchScriptTeacher
    | ExportTeacher
    | SklearnTeacher
    | OnnxTeacher
    | CallableTeacher,
    Field(discriminator="kind"),
]


class Coverage(Settings):
    """How the site learns which images are of its classes: by telling its private data from its first pool.

    Not learned where `policy.coverage` is off.
    """

    family: CoverageFamily = "network"
    """What tells them apart. `network`: a network of its own, from pixels. `features`: small heads on what the
    teacher's last linear layer is fed, for a teacher of kind `train` or `state_dict`. `outputs`: small heads on the
    teacher's calibrated log-probabilities, for any teacher. The latter two learn in seconds once the teacher has seen
    the images, and what they see is what the teacher sees of them."""
    architecture: str = "vgg6"
    """Of the network; this, `fit` and `preprocessing` count for `family: network` alone."""
    fit: CoverageFit = CoverageFit()
    preprocessing: Preprocessing = Preprocessing()
    """Means and deviations; size and channels are the pool's."""
    prior: float | None = Field(default=None, gt=0, le=1)
    """Share of the pool that is of the site's classes, where the site knows it; by default it is estimated."""
    shares: Literal["private", "equal"] = "private"
    """How frequent the site's classes are taken to be in the pool, beside one another: as among its private images, or
    equally. Coverage of classes that are more frequent in the pool than taken is too low. With `private` coverage tells
    the shares of the classes among the private images to whoever sees it beside answers; with `equal` it does not."""

    @model_validator(mode="after")
    def _shaped_as_the_pool(self) -> Coverage:
        if self.preprocessing.size is not None or self.preprocessing.channels is not None:
            raise ValueError("preprocessing names size or channels, which are the pool's; leave them out")
        return self
