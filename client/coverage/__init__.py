"""What coverage is at a site: a calibrated estimate of how likely an image is of one of the site's classes.

Lives here: the protocol, and what the rest of the client needs of the modules below. Does not live here: learning
(learning), which brings torch, what may leave (common/settings.Policy) and how questions about it are answered
(client/encoder).
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from consilience.client.coverage.learned import CoverageRecord, load_coverage, read_record
from consilience.client.coverage.showing import learn_and_show, tell_coverage
from consilience.common.preprocessing import Images

__all__ = [
    "Coverage",
    "CoverageRecord",
    "learn_and_show",
    "load_coverage",
    "read_record",
    "tell_coverage",
]


class Coverage(Protocol):
    """A site's calibrated estimate of P(class of x is one of the site's classes)."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 in hexadecimal of all that decides a score."""
        ...

    @property
    def description(self) -> str:
        """The estimate in words, one line: it goes into the site card."""
        ...

    def scores(self, images: Images) -> NDArray[np.float32]:
        """Return (n,) float32 in [0, 1] for (n, H, W, C) uint8. Raises `TeacherError`."""
        ...
