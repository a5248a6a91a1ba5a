"""A teacher from a torch `state_dict` for a named architecture.

Lives here: reading weights from safetensors or .pt without unpickling anything but tensors. Does not live here: the
architectures (common/nets) and the teacher that Consilience trained itself (trained).
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load as load_safetensors
from torch import nn

from consilience.client.teacher.protocol import Scores, brief, refuse
from consilience.client.teacher.torch_modules import NetworkScores
from consilience.common.errors import TeacherError
from consilience.common.nets import build, default_device
from consilience.common.settings import Preprocessing, StateDictTeacher


def scores_of(settings: StateDictTeacher, data: bytes) -> Scores:
    """Return the scoring function for a file's bytes.

    Raises `TeacherError` when they are no state_dict, hold anything but tensors, or do not fit the architecture.
    """
    weights = read_weights(settings.path, data)
    candidates: tuple[int, ...] = (settings.preprocessing.channels,) if settings.preprocessing.channels else (1, 3)
    modules = [build(settings.architecture, classes=len(settings.classes), channels=c, seed=0) for c in candidates]
    module = next((module for module in modules if _shapes(module.state_dict()) == _shapes(weights)), modules[0])
    return network_scores(
        settings.path, settings.architecture, module, weights, settings.preprocessing, len(settings.classes)
    )


def network_scores(
    path: Path,
    architecture: str,
    module: nn.Module,
    weights: dict[str, torch.Tensor],
    preprocessing: Preprocessing,
    classes: int,
) -> NetworkScores:
    """Return the scoring function of `module`, built as `architecture` for `classes`, with `weights` from `path`.

    Raises `TeacherError` naming the first tensor that is missing, odd or misshapen.
    """
    wanted, given = _shapes(module.state_dict()), _shapes(weights)
    for name in sorted(wanted.keys() | given.keys()):
        if wanted.get(name) != given.get(name):
            raise TeacherError(
                f"{path}: tensor {name!r} is {given.get(name, 'missing')}; "
                f"{architecture} has {wanted.get(name, 'no such tensor')}",
                hint="Correct teacher.architecture, teacher.classes or preprocessing.channels",
            )
    module.load_state_dict(weights)
    device = default_device()
    module.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return NetworkScores(module.eval(), classes, preprocessing, device)


def read_weights(path: Path, data: bytes) -> dict[str, torch.Tensor]:
    """Return the tensors of a .safetensors or .pt file by name. Raises `TeacherError`."""
    if path.suffix == ".safetensors":
        try:
            return load_safetensors(data)
        except Exception as error:  # the library raises its own kinds, and struct's and JSON's
            raise TeacherError(
                f"{path}: not a safetensors file: {brief(error)}", hint="Save it with safetensors.torch.save_file"
            ) from error
    try:
        # weights_only is torch's restricted unpickler: tensors and plain containers, no call of anything else.
        held = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch raise nearly anything
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            refuse(path, f"a pickled {found[1]}, which is no tensor", "Save model.state_dict() alone")
        raise TeacherError(
            f"{path}: not a torch state_dict: {type(error).__name__}",
            hint="Save model.state_dict(), best as safetensors",
        ) from error
    if not isinstance(held, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in held.items()
    ):
        raise TeacherError(
            f"{path}: holds {type(held).__name__}, not tensors by name", hint="Save model.state_dict() alone"
        )
    return dict(held)


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
