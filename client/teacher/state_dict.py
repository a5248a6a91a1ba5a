"""A teacher from a torch `state_dict` for a named architecture.

Lives here: reading weights from safetensors or .pt without unpickling anything but tensors. Does not live here: the
architectures (common/nets) and the teacher that Consilience trained itself (trained).
"""

from __future__ import annotations

import io
from pathlib import Path

import torch
from safetensors.torch import load as load_safetensors
from torch import nn

from consilience.client.teacher.protocol import Scores, brief, refuse
from consilience.client.teacher.torch_modules import best_device, module_scores
from consilience.common.errors import TeacherError
from consilience.common.nets import architectures
from consilience.common.settings import StateDictTeacher


def scores_of(settings: StateDictTeacher, data: bytes) -> Scores:
    """Return the scoring function for a file's bytes.

    Raises `TeacherError` when they are no state_dict, hold anything but tensors, or do not fit the architecture.
    """
    weights = read_weights(settings.path, data)
    channels = settings.preprocessing.channels or input_channels(weights)
    module = architectures.build(settings.architecture, classes=len(settings.classes), channels=channels, seed=0)
    device = best_device()
    load_weights(module, weights, where=f"{settings.path}", architecture=settings.architecture)
    return module_scores(module.to(device, memory_format=torch.channels_last).eval(), device)


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
        if "weights only" in str(error).lower():
            refuse(path, "pickled objects that are not tensors", "Save model.state_dict() alone, best as safetensors")
        raise TeacherError(
            f"{path}: not a torch state_dict: {brief(error)}", hint="Save model.state_dict(), best as safetensors"
        ) from error
    if not isinstance(held, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in held.items()
    ):
        raise TeacherError(
            f"{path}: holds {type(held).__name__}, not tensors by name", hint="Save model.state_dict() alone"
        )
    return dict(held)


def input_channels(weights: dict[str, torch.Tensor]) -> int:
    """Return how many channels the first convolution takes; 1 where there is none."""
    return next((int(tensor.shape[1]) for tensor in weights.values() if tensor.ndim == 4), 1)


def load_weights(module: nn.Module, weights: dict[str, torch.Tensor], *, where: str, architecture: str) -> None:
    """Put `weights` into `module`. Raises `TeacherError` naming the first tensor that is missing, odd or misshapen."""
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in sorted(wanted.keys() | given.keys()):
        if wanted.get(name) != given.get(name):
            raise TeacherError(
                f"{where}: tensor {name!r} is {given.get(name, 'missing')}; "
                f"{architecture} has {wanted.get(name, 'no such tensor')}",
                hint="Correct teacher.architecture, teacher.classes or preprocessing.channels",
            )
    module.load_state_dict(weights)
