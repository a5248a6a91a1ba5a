"""The layers of a teacher that is a torch network in hand. Does not live here: other teachers (layers)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from consilience.client.features.layers import Layer, Maps
from consilience.client.teacher.protocol import Scoring, brief
from consilience.client.teacher.torch_modules import NetworkScores
from consilience.common.errors import StudentError, TeacherError
from consilience.common.nets.tapped import Tapped, tap_layouts, tap_shapes
from consilience.common.preprocessing import Images


def layers_of(teacher: Scoring) -> NetworkLayers | None:
    """Return the layers of a teacher; None where its network is not in hand."""
    return NetworkLayers(teacher.fingerprint, teacher.scores) if isinstance(teacher.scores, NetworkScores) else None


class NetworkLayers:
    """The layers of a torch network. Not for two threads at once."""

    def __init__(self, fingerprint: str, scores: NetworkScores) -> None:
        self.fingerprint, self.preprocessing, self._scores = fingerprint, scores.preprocessing, scores

    def find(self, images: Images) -> tuple[Layer, ...]:
        """See `Layers.find`."""
        network = self._scores.network
        try:
            shapes = tap_shapes(network, self._scores.prepare(images))
        except (RuntimeError, ValueError) as error:
            raise self._failed(images, error) from error
        layouts = tap_layouts(network)
        return tuple(
            Layer(name, layouts[name].unit if name in layouts else "", shape) for name, shape in shapes.items()
        )

    def features(self, images: Images, names: Sequence[str]) -> tuple[Maps, ...]:
        """See `Layers.features`."""
        try:
            with torch.inference_mode():
                _, found = Tapped(self._scores.network, names)(self._scores.prepare(images))
        except (RuntimeError, ValueError, StudentError) as error:
            raise self._failed(images, error) from error
        return tuple(np.ascontiguousarray(one.float().cpu().numpy()) for one in found)

    def _failed(self, images: Images, error: Exception) -> TeacherError:
        return TeacherError(
            f"The teacher gives no features of {len(images)} images of shape {images.shape[1:]}: {brief(error)}",
            hint="Compare preprocessing.size and preprocessing.channels with what the model expects",
        )
