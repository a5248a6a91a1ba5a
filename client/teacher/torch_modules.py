"""Scoring with a torch module, shared by every kind of teacher that is one.

Lives here: preprocessing on the device, memory format and inference mode. Does not live here: where a module comes
from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from consilience.client.teacher.protocol import Scores
from consilience.common.nets.batches import Normalise
from consilience.common.preprocessing import Images, fit_shape
from consilience.common.settings import Preprocessing


def module_scores(module: Callable[[torch.Tensor], Any], preprocessing: Preprocessing, device: torch.device) -> Scores:
    """Return the function that scores images with a module that is on `device` and in evaluation mode."""
    normalise = Normalise(preprocessing, device)

    def scores(images: Images) -> NDArray[np.float32]:
        # A copy: images may be a read-only view of the pool, which torch warns about.
        shaped = torch.from_numpy(np.array(fit_shape(images, preprocessing)))
        with torch.inference_mode():
            out = module(normalise(shaped.to(device)))
            if not isinstance(out, torch.Tensor):
                raise TypeError(f"the model gives {type(out).__name__}; expected one tensor")
            return np.asarray(out.float().cpu().numpy())

    return scores
