"""The layers of a teacher: which there are, and what they compute.

Lives here: the layers of networks, and of callables that tell some; which teachers have none. Does not live here: which
layers the policy lets out and what is taken from them (taps), how a network is looked into (common/nets/tapped).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from consilience.client.teacher import CalibratedMulti, CalibratedTeacher, MultiTeacher, Teacher
from consilience.client.teacher.protocol import Scoring, brief
from consilience.client.teacher.python_callable import CallableScores
from consilience.common.errors import TeacherError
from consilience.common.preprocessing import Images
from consilience.common.settings import Preprocessing

Maps = NDArray[np.float32]
"""(n, C) or (n, C, H, W) float32: n samples' features of a layer."""


@dataclass(frozen=True)
class Layer:
    """A layer by name: of one of our architectures what leads to it (`taps.Tap.unit`), and a sample's features' shape.

    The shape is (C,) or (C, H, W).
    """

    name: str
    layout: str
    shape: tuple[int, ...]


class Layers(Protocol):
    """The layers of one teacher."""

    fingerprint: str
    """Of the teacher without calibration, which features do not go through."""
    preprocessing: Preprocessing

    def find(self, images: Images) -> tuple[Layer, ...]:
        """Try (n, H, W, C) uint8, n >= 1; return the layers from the input to the output. Raises `TeacherError`."""
        ...

    def features(self, images: Images, names: Sequence[str]) -> tuple[Maps, ...]:
        """Return the features of the layers `names`, as they are computed. Raises `TeacherError`."""
        ...


def layers_of(teacher: Teacher | MultiTeacher) -> Layers | None:
    """Return the layers of a site's teacher; None where it has none that could be looked into."""
    behind = teacher.teacher if isinstance(teacher, CalibratedTeacher | CalibratedMulti) else teacher
    if not isinstance(behind, Scoring):
        return None
    if isinstance(behind.scores, CallableScores):
        return _CallableLayers(behind.fingerprint, behind.scores) if behind.scores.tells_features else None
    from consilience.client.features import network_layers  # which brings torch

    return network_layers.layers_of(behind)


class _CallableLayers:
    """What a callable's `features` gives, by the names under which it does."""

    def __init__(self, fingerprint: str, scores: CallableScores) -> None:
        self.fingerprint, self.preprocessing, self._scores = fingerprint, scores.preprocessing, scores

    def find(self, images: Images) -> tuple[Layer, ...]:
        """See `Layers.find`."""
        found = self._told(images)
        return tuple(Layer(name, "", self._maps(found, name, len(images)).shape[1:]) for name in found)

    def features(self, images: Images, names: Sequence[str]) -> tuple[Maps, ...]:
        """See `Layers.features`."""
        found = self._told(images)
        return tuple(self._maps(found, name, len(images)) for name in names)

    def _told(self, images: Images) -> Mapping[str, Any]:
        try:
            found = self._scores.features(images)
        except Exception as error:  # a stranger's callable may raise anything
            raise TeacherError(
                f"{self._where}: failed on {len(images)} images of shape {images.shape[1:]}: {brief(error)}",
                hint="Try it outside Consilience",
            ) from error
        if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
            raise TeacherError(
                f"{self._where}: gives {type(found).__name__}", hint="Let it return a dict from names to arrays"
            )
        return found

    def _maps(self, found: Mapping[str, Any], name: str, images: int) -> Maps:
        if name not in found:
            raise TeacherError(
                f"{self._where}: gives no {name!r}, only: {', '.join(found)}", hint="Let it return every tap each time"
            )
        values = np.asarray(found[name])
        if values.ndim not in (2, 4) or len(values) != images or values.dtype.kind != "f" or 0 in values.shape:
            raise TeacherError(
                f"{self._where}: gives {name!r} as {values.dtype} of shape {values.shape} for {images} images; "
                f"expected floating, ({images}, C) or ({images}, C, H, W)",
                hint="Let it return one row of features an image",
            )
        return values.astype(np.float32)

    @property
    def _where(self) -> str:
        return f"{self._scores.where}, features"
