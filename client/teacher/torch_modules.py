"""Scoring with a torch module, shared by every kind of teacher that is one.

Lives here: preprocessing on the device, memory format and inference mode; what the last layer of a
network is fed. Does not live here: where a module comes from, the features of other layers (client/features).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from consilience.client.teacher.protocol import Scores
from consilience.common.nets.batches import Normalise
from consilience.common.preprocessing import Images, fit_shape
from consilience.common.settings import Preprocessing


def module_scores(module: Callable[[torch.Tensor], Any], preprocessing: Preprocessing, device: torch.device) -> Scores:
    """Return the function that scores images with a module that is on `device` and in evaluation mode."""
    prepare = prepared(preprocessing, device)

    def scores(images: Images) -> NDArray[np.float32]:
        with torch.inference_mode():
            out = module(prepare(images))
            if not isinstance(out, torch.Tensor):
                raise TypeError(f"the model gives {type(out).__name__}; expected one tensor")
            return np.asarray(out.float().cpu().numpy())

    return scores


def prepared(preprocessing: Preprocessing, device: torch.device) -> Callable[[Images], torch.Tensor]:
    """Return the function that makes what a module is fed, (n, C, H, W) float32 on `device`, of images."""
    normalise = Normalise(preprocessing, device)

    def prepare(images: Images) -> torch.Tensor:
        # A copy: images may be a read-only view of the pool, which torch warns about.
        return normalise(torch.from_numpy(np.array(fit_shape(images, preprocessing))).to(device))

    return prepare


class NetworkScores:
    """Scores images with a torch network that is in hand, and gives the features that it scores by.

    `network` is on `device` and in evaluation mode, with `classes` outputs.
    """

    def __init__(self, network: nn.Module, classes: int, preprocessing: Preprocessing, device: torch.device) -> None:
        self.network, self.preprocessing = network, preprocessing
        self.prepare = prepared(preprocessing, device)
        """(n, H, W, C) uint8 images -> (n, C, H, W) float32 as the network takes them, on its device."""
        self._scores = module_scores(network, preprocessing, device)
        layers = [
            layer for layer in network.modules() if isinstance(layer, nn.Linear) and layer.out_features == classes
        ]
        self._last = layers[-1] if layers else None

    @property
    def feature_size(self) -> int | None:
        """How many features an image has; None where no linear layer gives the scores."""
        return None if self._last is None else self._last.in_features

    def __call__(self, images: Images) -> NDArray[np.float32]:
        """Return (n, classes) float32 scores of (n, H, W, C) uint8."""
        return np.asarray(self._scores(images))

    def features(self, images: Images) -> NDArray[np.float32]:
        """Return (n, `feature_size`) float32: what the last linear layer is fed for (n, H, W, C) uint8.

        Not for two threads at once. Raises `ValueError` where there is no such layer, or it is fed no row an image.
        """
        held: list[torch.Tensor] = []
        if self._last is None:
            raise ValueError("the network has no linear layer that gives its scores")
        hook = self._last.register_forward_pre_hook(
            lambda _, given, named: held.append(given[0] if given else named["input"]), with_kwargs=True
        )
        try:
            self._scores(images)
        finally:
            hook.remove()
        if len(held) != 1 or held[0].shape != (len(images), self.feature_size):
            raise ValueError("the network's last linear layer is not fed one row an image")
        return np.asarray(held[0].float().cpu().numpy())
