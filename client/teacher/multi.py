"""A multi-label teacher: what it is, the check of its scores, and the teacher that wraps a scoring function.

Its labels do not exclude one another: it says of each by itself how likely it applies, as log-odds. Does not live here:
single-label teachers (protocol), training (multi_trained), calibration (multi_calibrated).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from consilience.client.teacher.protocol import Outputs, Scoring, finite, refuse_values
from consilience.common.encoding.odds import bounded, log_odds_of
from consilience.common.preprocessing import Images


class MultiTeacher(Protocol):
    """A site's private multi-label classifier, whatever it is made of."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the labels it knows, in the order of its answers."""
        ...

    @property
    def fingerprint(self) -> str:
        """As `Teacher.fingerprint`."""
        ...

    def log_odds(self, images: Images) -> NDArray[np.float32]:
        """Return (n, len(classes)) float32 log-odds within `MOST_ODDS` for (n, H, W, C) uint8.

        All n images are scored at once: the caller cuts the batches. Raises `TeacherError`.
        """
        ...


@dataclass(frozen=True)
class ScoringMultiTeacher(Scoring):
    """A multi-label teacher made of a function that preprocesses and scores."""

    def log_odds(self, images: Images) -> NDArray[np.float32]:
        """See `MultiTeacher.log_odds`."""
        scores = self.scored(images)
        if scores is None:
            return np.empty((0, len(self.classes)), np.float32)
        return checked_odds(scores, rows=len(images), classes=self.classes, outputs=self.outputs, where=self.where)


def checked_odds(
    scores: Any, *, rows: int, classes: Sequence[str], outputs: Outputs, where: str
) -> NDArray[np.float32]:
    """Return (rows, len(classes)) float32 log-odds, or raise `TeacherError` saying what is wrong, and where.

    Logits, which are log-odds, may be any finite floats, probabilities any from 0 to 1: whatever is beyond `MOST_ODDS`
    becomes that.
    """
    wide = finite(scores, rows=rows, classes=classes, where=where)
    if outputs == "probabilities":
        refuse_values((wide < 0) | (wide > 1), wide, where, "probabilities from 0 to 1")
        wide = log_odds_of(wide)
    narrow: NDArray[np.float32] = bounded(wide).astype(np.float32)
    return narrow
