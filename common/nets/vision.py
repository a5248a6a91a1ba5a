"""The only module that imports torchvision: its classifiers and its data set classes by name.

Does not live here: when they are wanted (architectures, common/data). Nothing is ever downloaded.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from consilience.common.errors import DataError, SettingsError

_SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_library: torch.library.Library | None = None
"""Kept for the life of the process: torch withdraws the operators when the library goes."""


def _stand_in_for_extension() -> None:
    """Declare the operators that torchvision expects of its C++ extension, where that extension cannot be loaded.

    The wheels on PyPI are built for CUDA; next to a CPU-only torch the extension lacks its libraries. torchvision
    copes with that, except that its import describes these two operators to torch without asking whether they are
    there. Only detection uses them.
    """
    global _library
    package = importlib.util.find_spec("torchvision")
    if package is None or package.origin is None:
        return  # the import below says so
    try:
        for extension in Path(package.origin).parent.glob("_C*.so"):
            torch.ops.load_library(extension)  # type: ignore[no-untyped-call]
    except OSError:
        missing = [name for name in _SCHEMAS if not hasattr(torch.ops.torchvision, name)]
        if missing:
            library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
            for name in missing:
                library.define(name + _SCHEMAS[name])  # type: ignore[no-untyped-call]
            _library = library


_stand_in_for_extension()

import torchvision  # noqa: E402  (it fails without the stand-in)


def model_names() -> list[str]:
    """Return the names of torchvision's image classifiers."""
    return sorted(torchvision.models.list_models(module=torchvision.models))


def build_model(name: str, classes: int) -> nn.Module:
    """Return torchvision's classifier `name`, one of `model_names()`, untrained, with `classes` outputs.

    It maps (n, 3, H, W) float32 to (n, classes); how small H and W may be is the model's own affair.
    """
    options: dict[str, Any] = {"weights": None, "num_classes": classes}
    if name in ("googlenet", "inception_v3"):
        # Without these they give three outputs in training, and warn that their initialisation will change.
        options |= {"aux_logits": False, "init_weights": True}
    model: nn.Module = torchvision.models.get_model(name, **options)
    return model


def open_dataset(name: str, root: Path, options: Mapping[str, str | int | bool]) -> Any:
    """Open the class `name` of torchvision.datasets at `root`: `data[i]` is (PIL image, label), `len(data)` works.

    `options` are the class's own arguments; `download` is always off. Raises `SettingsError` for an unknown class or
    argument, `DataError` when the files are missing or damaged, and `ModuleNotFoundError` when the class needs a
    module that is not installed.
    """
    kind = getattr(torchvision.datasets, name, None) if name in torchvision.datasets.__all__ else None
    if kind is None:
        raise SettingsError(
            f"Data set {name!r} is unknown; allowed: {', '.join(sorted(torchvision.datasets.__all__))}",
            hint="Correct the field dataset",
        )
    parameters = inspect.signature(kind).parameters
    arguments: dict[str, Any] = {**options}
    if "root" in parameters:
        arguments["root"] = str(root)
    if "download" in parameters:
        arguments["download"] = False
    for option in options:
        if option not in parameters:
            raise SettingsError(
                f"Data set {name!r} has no option {option!r}; allowed: {', '.join(parameters)}",
                hint="Correct the field options",
            )
    try:
        return kind(**arguments)
    except ModuleNotFoundError:
        raise
    except (ValueError, TypeError) as error:
        raise SettingsError(
            f"Data set {name!r} refuses its options {dict(options)}: {error}", hint="Correct the field options"
        ) from error
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{root}: torchvision's {name} is not there, or is damaged: {error}",
            hint="Put the data set there beforehand, or correct root: nothing is downloaded",
        ) from error
