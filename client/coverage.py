"""What coverage is at a site: an estimate of how likely an image is of one of the site's classes.

Lives here: the protocol, and where a site's coverage comes from. Does not live here: what may leave
(common/settings.Policy) and how questions about it are answered (client/site).
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from consilience.common.preprocessing import Images
from consilience.common.settings import SiteSettings


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


def load_coverage(settings: SiteSettings) -> Coverage | None:
    """Return the coverage that the site has learned, None when it has none."""
    return None
