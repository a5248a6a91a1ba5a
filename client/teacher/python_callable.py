"""A teacher from a Python callable that the site itself installed.

Lives here: importing it, telling its version, and calling it. Nothing is sandboxed: the site names code of its own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from consilience.client.teacher.protocol import brief
from consilience.common.errors import TeacherError
from consilience.common.files import sha256_file
from consilience.common.preprocessing import Images, preprocess
from consilience.common.settings import CallableTeacher


class CallableScores:
    """Scores images with a callable, and gives the features that it tells beside: its attribute `features`, if any."""

    def __init__(self, scores: Callable[[NDArray[np.float32]], Any], settings: CallableTeacher) -> None:
        self._scores, self._features = scores, getattr(scores, "features", None)
        self.where, self.preprocessing = settings.callable, settings.preprocessing

    @property
    def tells_features(self) -> bool:
        """Whether the callable has features at all."""
        return callable(self._features)

    def __call__(self, images: Images) -> Any:
        """Return what the callable gives for (n, H, W, C) uint8."""
        return self._scores(preprocess(images, self.preprocessing))

    def features(self, images: Images) -> Any:
        """Return what the callable's `features` gives for (n, H, W, C) uint8; to be called where it has that."""
        assert self._features is not None
        return self._features(preprocess(images, self.preprocessing))


def scores_of(settings: CallableTeacher) -> tuple[CallableScores, str]:
    """Return the scoring function and what stands for its bytes in the fingerprint. Raises `TeacherError`."""
    module_name, _, name = settings.callable.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # importing runs the site's code, which may raise anything
        raise TeacherError(
            f"{settings.callable}: module {module_name} cannot be imported: {brief(error)}",
            hint="Install it into the same environment as Consilience",
        ) from error
    scores = getattr(module, name, None)
    if not callable(scores):
        found = "no such name" if scores is None else f"an object of type {type(scores).__name__}"
        raise TeacherError(
            f"{settings.callable}: {module_name} has {found}; expected a callable {name!r}",
            hint="Correct teacher.callable in the site's settings",
        )

    return CallableScores(scores, settings), f"{settings.callable} {version_of(module)}"


def version_of(module: ModuleType) -> str:
    """Return name and version of the package that brings `module`, or the digest of its source if none does."""
    top = module.__name__.partition(".")[0]
    for package in metadata.packages_distributions().get(top, ()):
        return f"{package} {metadata.version(package)}"
    return sha256_file(Path(module.__file__)) if module.__file__ else top
