"""A teacher from a Python callable that the site itself installed.

Lives here: calling it. Does not live here: finding it, and its version (common/installed). Nothing is sandboxed: the
site names code of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from consilience.common.errors import TeacherError
from consilience.common.installed import find_installed, version_of
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
    scores, module = find_installed(settings.callable, TeacherError, "teacher.callable in the site's settings")
    return CallableScores(scores, settings), f"{settings.callable} {version_of(module)}"
