"""Networks that a user might have written, for `architecture: python:helpers.own_networks:NAME`, and ones that fail."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

NUMBER = 3


class Frozen(nn.Module):
    """A frozen backbone with batch normalisation, and a head that learns."""

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(channels, 6, 5, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten()
        ).requires_grad_(False)
        self.head = nn.Sequential(nn.Linear(54, 16), nn.ReLU(), nn.Linear(16, classes))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.backbone(images))
        return logits


class Kept(Frozen):
    """The same, whose frozen part keeps its statistics."""

    def train(self, mode: bool = True) -> Kept:
        super().train(mode)
        self.backbone.eval()
        return self


def convolutions(classes: int, channels: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, classes, 5, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def frozen(classes: int, channels: int) -> nn.Module:
    return Frozen(classes, channels)


def kept(classes: int, channels: int) -> nn.Module:
    return Kept(classes, channels)


def nothing(classes: int, channels: int) -> Any:
    return "no network"


def all_frozen(classes: int, channels: int) -> nn.Module:
    return Frozen(classes, channels).requires_grad_(False)


def ten(classes: int, channels: int) -> nn.Module:
    return Frozen(10, channels)


def colour(classes: int, channels: int) -> nn.Module:
    return Frozen(classes, 3)


def whole_numbers(classes: int, channels: int) -> nn.Module:
    class Rounded(Frozen):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images).round().to(torch.int64)

    return Rounded(classes, channels)


def several(classes: int, channels: int) -> nn.Module:
    class Several(Frozen):
        def forward(self, images: Tensor) -> Any:
            return super().forward(images), images

    return Several(classes, channels)


def failing(classes: int, channels: int) -> nn.Module:
    raise KeyError("no weights here")


def positional(a: int, b: int, /) -> nn.Module:
    raise AssertionError("a function of another purpose was called")
