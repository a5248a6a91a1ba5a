"""A trained network's use and its file.

Lives here: logits of images, and weights as safetensors. Does not live here: training (loop), probabilities and
what is written beside the weights (client/teacher, server/learning).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import nn

from consilience.common.errors import StudentError
from consilience.common.files import write_bytes
from consilience.common.nets.batches import Normalise, default_device
from consilience.common.preprocessing import Images, fit_shape
from consilience.common.settings import Preprocessing


def scores(
    model: nn.Module,
    images: Images,
    preprocessing: Preprocessing,
    *,
    batch_size: int = 512,
    device: torch.device | None = None,
) -> NDArray[np.float32]:
    """Return (n, K) float32 logits of (n, H, W, C) uint8 `images`, an array or a memory map; n may be 0.

    Always float32 arithmetic and evaluation mode, in which the model is left, on `device`. An image's logits do not
    depend on the others', up to rounding.
    """
    device = device or default_device()
    model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.eval()
    normalise = Normalise(preprocessing, device)
    found = []
    with torch.inference_mode():
        for start in range(0, max(len(images), 1), batch_size):
            shaped = fit_shape(np.array(images[start : start + batch_size]), preprocessing)
            found.append(model(normalise(torch.from_numpy(shaped).to(device))).float().cpu().numpy())
    return np.concatenate(found)


def save_model(path: Path, model: nn.Module) -> None:
    """Write the weights as safetensors, atomically. Raises `StorageError`."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_bytes(path, safetensors.torch.save(tensors))


def load_model(path: Path, model: nn.Module) -> None:
    """Read weights that `save_model` wrote into `model`, a network of the same architecture.

    Raises `StudentError` when the file is no safetensors file, or a tensor is missing, unknown or of another shape.
    """
    try:
        held = safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise StudentError(
            f"{path}: cannot be read as a safetensors file: {error}", hint="Restore the file, or train again"
        ) from error
    given = {name: tuple(tensor.shape) for name, tensor in held.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted(given.keys() | wanted.keys()):
        if given.get(name) != wanted.get(name):
            raise StudentError(
                f"{path}: tensor {name!r} is {given.get(name, 'missing')}; "
                f"the architecture has {wanted.get(name, 'no such tensor')}",
                hint="Name the architecture, classes and channels that the file was saved with",
            )
    model.load_state_dict(held)
