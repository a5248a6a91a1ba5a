"""Where images are, and what a classifier expects of them.

Does not live here: reading them (common/data).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from consilience.common.settings.base import Settings

Size = tuple[Annotated[int, Field(ge=1, le=65_536)], Annotated[int, Field(ge=1, le=65_536)]]
"""Height, width in pixels."""


class NpzData(Settings):
    """Arrays in one NumPy file, loaded without pickle: images (n, H, W[, C]) uint8, labels (n,) integer.

    Labels of images that have any number of them are (n, number of labels): 1 where one applies, 0 where it does not,
    -1 or NaN where that is not known.
    """

    kind: Literal["npz"]
    path: Path
    images: str = "x"
    labels: str | None = "y"
    names: str | None = "names"


class FolderData(Settings):
    """One sub-folder of images a class, or images without classes in the folder itself (a pool)."""

    kind: Literal["folder"]
    path: Path
    size: Size | None = None
    channels: Literal[1, 3] = 3


class TorchvisionData(Settings):
    """A data set class of torchvision.datasets, already downloaded: nothing is fetched."""

    kind: Literal["torchvision"]
    dataset: str
    root: Path
    options: dict[str, str | int | bool] = Field(default={})
    size: Size | None = None
    channels: Literal[1, 3] = 3


class EmbeddedData(Settings):
    """The Fashion-MNIST sample that comes with Consilience: 500 train and 100 test images a class."""

    kind: Literal["embedded"]
    split: Literal["train", "test"] = "train"


DataSource = Annotated[NpzData | FolderData | TorchvisionData | EmbeddedData, Field(discriminator="kind")]


class Preprocessing(Settings):
    """What a classifier expects: uint8 images become float32, (x / 255 - mean) / std per channel.

    `size` (height, width) resizes first, bilinearly with antialiasing; `channels` converts grey to colour
    by repetition and colour to grey by ITU-R 601 luma.
    """

    size: Size | None = None
    channels: Literal[1, 3] | None = None
    mean: tuple[float, ...] = (0.5,)
    std: tuple[Annotated[float, Field(gt=0)], ...] = (0.5,)

    @model_validator(mode="after")
    def _same_channels(self) -> Preprocessing:
        allowed = {1, self.channels} if self.channels else {1, 3}
        if len(self.mean) != len(self.std) or len(self.mean) not in allowed:
            raise ValueError(
                f"mean has {len(self.mean)} and std {len(self.std)} values; give one for all channels or one each"
            )
        return self
