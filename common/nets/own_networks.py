"""Architectures that whoever runs this wrote: `python:package.module:function`.

Lives here: what the function is asked, and what the network that it returns must be. Does not live here: importing it
(common/installed), ours and torchvision's networks (architectures).

The function is called as `function(classes=..., channels=...)`, for any number of classes, and returns a network from
(n, channels, H, W) float32 to (n, classes) logits. By keyword, so that a name cannot stand for a function of another
purpose that happens to take two numbers: the name may come from a student's folder, which may be a stranger's. What is
frozen (`requires_grad` False) stays as the function made it. Batch normalisation is another matter: where it is to keep
to the statistics that it came with, the network's own `train` must leave it in evaluation mode.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from consilience.common.errors import SettingsError
from consilience.common.installed import brief, find_installed, version_of
from consilience.common.settings.base import CALLABLE_PATTERN

PYTHON = "python:"
"""Prefix that says a name is that of an installed function."""
_TRIED = 2


def build_own(name: str, classes: int, channels: int) -> nn.Module:
    """Return the network of `name`, with the prefix. Draws from the global generator where the function does.

    Raises `SettingsError` for a name that is none, a function that cannot be found or fails, and for what is no network
    with a parameter to learn.
    """
    function, _ = find_installed(_spelled(name), SettingsError, "the field architecture")
    try:
        network = function(classes=classes, channels=channels)
    except Exception as error:  # a stranger's code may raise anything
        raise SettingsError(
            f"Architecture {name!r} failed for {classes} classes and {channels} channels: {brief(error)}",
            hint="Call it outside Consilience, as function(classes=..., channels=...)",
        ) from error
    if not isinstance(network, nn.Module):
        raise SettingsError(
            f"Architecture {name!r} gives an object of type {type(network).__name__}; expected a torch.nn.Module",
            hint="Let the function return the network",
        )
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise SettingsError(
            f"Architecture {name!r} gives a network that nothing can be taught: no parameter has requires_grad",
            hint="Leave at least the last layer unfrozen",
        )
    return network


def check_own(name: str, network: nn.Module, shape: tuple[int, int, int], classes: int) -> None:
    """Raise `SettingsError` unless `network` gives (n, classes) floating scores for images of `shape` (C, H, W).

    It is tried where `name` is that of an installed function, other networks are known; in evaluation mode, afterwards
    it is in training mode, as one that was just built.
    """
    if not name.startswith(PYTHON):
        return
    images = torch.zeros(_TRIED, *shape)
    try:
        with torch.no_grad():
            scores = network.eval()(images)
        network.train()
    except Exception as error:  # a stranger's code may raise anything
        raise SettingsError(
            f"Architecture {name!r} does not take images of shape {shape}, channels first: {brief(error)}",
            hint="Set preprocessing.size or channels, or correct the network",
        ) from error
    found = f"{tuple(scores.shape)} {scores.dtype}" if isinstance(scores, Tensor) else type(scores).__name__
    expected = (_TRIED, classes)
    fits = isinstance(scores, Tensor) and scores.shape == expected and scores.is_floating_point()
    if not fits:
        raise SettingsError(
            f"Architecture {name!r} gives {found} for {_TRIED} images of shape {shape}; expected {expected} floating",
            hint="Let the network give one score a class and image, for any number of classes",
        )


def code_of(architecture: str) -> dict[str, str]:
    """Return {"code": version} for an architecture of this kind, {} for others: what a fingerprint needs beside names.

    Raises `SettingsError` as `build_own`.
    """
    if not architecture.startswith(PYTHON):
        return {}
    _, module = find_installed(_spelled(architecture), SettingsError, "the field architecture")
    return {"code": version_of(module)}


def _spelled(name: str) -> str:
    bare = name.removeprefix(PYTHON)
    if not re.fullmatch(CALLABLE_PATTERN, bare):
        raise SettingsError(
            f"Architecture {name!r} names no function; allowed after {PYTHON} are package.module:function",
            hint="Correct the field architecture, for example python:hospital.networks:small",
        )
    return bare
