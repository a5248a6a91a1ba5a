"""A site's coverage with its level mended, read as any other.

Lives here: the store that moves what it reads. Does not live here: how far, and whether (server/coverage_check).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from consilience.server.answers import AnswerStore
from consilience.server.unify.recalibrate import moved


class MovedCoverage(AnswerStore):
    """What a store of coverage holds, to be read only, each logit moved by an offset. The files stay as they are."""

    def __init__(self, store: AnswerStore, offset: float) -> None:
        """`store` is not to be written to while this is in use."""
        self.__dict__.update(store.__dict__)
        self._offset = offset

    def _read(self, start: int, stop: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        return moved(super()._read(start, stop, np.dtype(np.float32)), self._offset).astype(np.float32)
