"""Whole numbers as a Gaussian gives them when it is rounded, from uniform words.

Lives here: the distribution, as tables. Does not live here: where words come from (noise), and who adds such numbers to
what (sum_noise).

Why rounded, and not the discrete Gaussian of Kairouz, Liu and Steinke (arXiv 2102.06387): a site's rounded answer plus
a rounded Gaussian is the rounded sum of both, so what is known of the Gaussian mechanism holds for it, distributions of
its privacy loss included. Of several sites' noise it holds nearly: the chance of k under the sum of rounded Gaussians
is that of rounding G + V to k, where G is the Gaussian of all their variances together and V other noise, but for about
exp(-pi^2 s^2) with s the smallest standard deviation in steps (Poisson's summation formula, as in their section 3). At
2^8 steps, the fewest that are allowed, that is 10^-280000.

Tables have 64 bits: whether a number is beyond 4 standard deviations is one draw, how far is another. Up to 2^17 steps,
a number's chance is a rounded Gaussian's to a share of 2^-32, but for 2^-58 in all.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

NEAR, END = 4.0, 9.0
"""In standard deviations: where the second draw begins, and beyond which there is nothing (2^-61 is lost)."""
_NODES = np.array([-0.5, 0.0, 0.5]) * np.sqrt(3 / 5)
_WEIGHTS = np.array([5.0, 8.0, 5.0]) / 18
_WHOLE = 2.0**63


class RoundedGaussian:
    """rint(`sigma` N), N standard normal, as whole numbers; `sigma` is at least 2^8."""

    def __init__(self, sigma: float) -> None:
        count = int(np.ceil(END * sigma))
        # Gauss and Legendre's rule of three points: at these widths right to a share of 2^-49 up to `END`
        points = (np.arange(count)[:, None] + _NODES) / sigma
        chances = np.exp(-(points**2) / 2) @ _WEIGHTS
        chances[1:] *= 2  # of magnitudes: two numbers have each but 0
        chances /= chances.sum()
        near = int(NEAR * sigma)
        self._near, self._far = _table(chances[:near]), _table(chances[near:] / chances[near:].sum())

    def draw(self, words: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Return (...) int64 from (..., 2) uniform words of 64 bits."""
        first, second = words[..., 0], words[..., 1]
        size = np.searchsorted(self._near, first >> np.uint64(1), side="right")
        beyond = size == len(self._near)
        far = np.searchsorted(self._far, second[beyond] >> np.uint64(1), side="right")
        size[beyond] += np.minimum(far, len(self._far) - 1)  # the last step ends a little before 1
        return np.where(first & np.uint64(1), -size, size).astype(np.int64)


@lru_cache(maxsize=4)
def rounded(sigma: float) -> RoundedGaussian:
    """Return the distribution, whose tables take 9 `sigma` words; the last few are kept."""
    return RoundedGaussian(sigma)


def _table(chances: NDArray[np.float64]) -> NDArray[np.uint64]:
    """Return (k,) cumulated chances in units of 2^-63."""
    return np.cumsum(np.rint(chances * _WHOLE).astype(np.uint64), dtype=np.uint64)
