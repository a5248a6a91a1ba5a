"""The taps of a job's student: which there are, and whether the job's way of learning from features can take them.

Does not live here: what sites' taps have to be (server/student_taps).
"""

from __future__ import annotations

import torch
from torch import nn

from consilience.common.errors import SettingsError
from consilience.common.nets.architectures import Residual
from consilience.common.nets.tapped import tap_layouts, tap_shapes
from consilience.common.nets.taps import Tap
from consilience.common.settings import Student

_FIELD = "student.common_feature.spaces"


def own_taps(
    network: nn.Module, settings: Student, shape: tuple[int, int, int]
) -> tuple[dict[str, tuple[int, ...]], dict[str, Tap]]:
    """Return the shapes of a sample's features by tap, and the layout where `network` is one of ours.

    `network` is the student, for images of `shape` (H, W, C); it is left in evaluation mode. Raises `SettingsError` for
    images that it does not take, for a tap that it has not, and for a network that layer-wise amalgamation cannot take.
    """
    height, width = settings.preprocessing.size or shape[:2]
    channels = settings.preprocessing.channels or shape[2]
    try:
        shapes = tap_shapes(network, torch.zeros(2, channels, height, width))
    except (RuntimeError, ValueError) as error:
        raise SettingsError(
            f"job.yaml: field 'student.architecture' is {settings.architecture!r}, which does not take images of "
            f"{height}x{width} pixels: {str(error).splitlines()[0]}",
            hint="Set student.preprocessing.size, or choose another architecture",
        ) from error
    layouts = tap_layouts(network)
    if settings.learning == "layer-wise":
        _need_layers(network, settings.architecture, layouts)
    else:
        for at, space in enumerate(settings.common_feature.spaces):
            if space.student is not None and space.student not in shapes:
                raise SettingsError(
                    f"job.yaml: field '{_FIELD}.{at}.student' is {space.student!r}; the student "
                    f"{settings.architecture} has: {', '.join(shapes)}",
                    hint="Name one of these taps",
                )
    return shapes, layouts


def _need_layers(network: nn.Module, name: str, layouts: dict[str, Tap]) -> None:
    if not layouts:
        raise SettingsError(
            f"job.yaml: field 'student.architecture' is {name!r}, which is none of ours; layer-wise amalgamation takes "
            "these alone",
            hint="Choose cnn3, vgg6, resnet8@1, resnet20@1 or mobilenet-small as the teachers', with a width such as "
            "@1.25, or set student.learning to common-feature",
        )
    if any(isinstance(m, Residual) and isinstance(m.shortcut, nn.Identity) for m in network.modules()):
        raise SettingsError(
            f"job.yaml: field 'student.architecture' is {name!r}, whose shortcuts have no weights that adapted "
            "features could go into",
            hint=f"Write {name}@1, which is the same with shortcuts of 1x1 convolutions, or {name}@1.25",
        )
