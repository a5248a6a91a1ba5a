"""Scoring with a torch module, shared by every kind of teacher that is one.

Lives here: device, memory format and inference mode. Does not live here: where a module comes from.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from consilience.client.teacher.protocol import Scores


def best_device() -> torch.device:
    """Return the first CUDA device if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def module_scores(module: nn.Module, device: torch.device) -> Scores:
    """Return the function that scores (n, C, H, W) float32 with a module that is on `device` and in eval mode."""

    def scores(inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        batch = torch.from_numpy(inputs).to(device).contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            out = module(batch)
        if not isinstance(out, torch.Tensor):
            raise TypeError(f"the model gives {type(out).__name__}; expected one tensor")
        return np.asarray(out.float().cpu().numpy(), np.float32)

    return scores
