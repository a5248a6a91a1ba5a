"""What a family of coverage gives for calibration: scores, the prior, and how well scores rank.

Lives here: the record that by_network and by_heads return. Does not live here: what is made of it (learning).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Found:
    """A model that was learned, and what it says of n private images that it has not learned from and m of the pool."""

    model: nn.Module
    held: Floats
    """Scores (n,) of the private images."""
    of_pool: Floats
    """Scores (m,) of the pool's."""
    weights: Floats | None
    """How much each private image counts (n,); None: all the same."""
    prior: float
    """Share of the pool that is of the site's classes, in (0, 1], as given or estimated."""
    private_over_pool: float
    """Chance that a private image has a higher score than one of the pool, where both are new to what scores them; of
    a network with a given prior, where only the private one is."""
