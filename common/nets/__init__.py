"""Networks for both sides: one set of architectures and one training loop, for teachers and students alike.

The only part of common that imports torch. What a network learns from is its caller's: a loss is a function of
logits and sample ids.
"""

from __future__ import annotations

from consilience.common.nets.architectures import build
from consilience.common.nets.batches import default_device
from consilience.common.nets.inference import load_model, save_model, scores
from consilience.common.nets.loop import train
from consilience.common.nets.losses import Loss, Parted, Supervised

__all__ = [
    "Loss",
    "Parted",
    "Supervised",
    "build",
    "default_device",
    "load_model",
    "save_model",
    "scores",
    "train",
]
