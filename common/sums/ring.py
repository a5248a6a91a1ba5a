"""Probabilities as whole numbers modulo 2^32, so that masks are uniform and sums never wrap.

Lives here: the scale, encoding and decoding. Does not live here: masks.

A site of weight w writes p as rint(scale w p), with scale = (2^32 - 1 - n) / sum of w over the n sites. As p is at
most 1, a site's number is at most scale w + 1/2, and the sum over any of the sites at most 2^32 - 1 - n + n/2 <
2^32: it never wraps. A sum W is off by at most n / (2 scale), 1.2e-8 for ten sites of weight 1.

Where sites add noise, numbers are signed and steps wider: the largest share of noise is `NOISE_STEPS` steps wide, which
leaves room for what the noise of all sites may add up to, and rounding is far below it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from consilience.common.errors import SettingsError

WORD = np.dtype("<u4")
"""How a number travels: 32 bits, little-endian."""
MOST_SITES = 255
LEAST_STEPS = 2**20
"""The fewest steps between 0 and 1 that a site's probabilities must have."""

NOISE_STEPS = 2.0**17
"""The standard deviation, in steps, of the largest share of noise."""
LEAST_NOISE_STEPS = 2.0**8
"""That of the smallest: below, sums of rounded noise would not be as good as rounded sums."""
_NOISY_RANGE = 2.0**31 - MOST_SITES * 10 * NOISE_STEPS
"""What answers may take up of the range, when no noise is beyond ten of its standard deviations."""

Words = NDArray[np.uint32]


class Ring:
    """Fixed-point numbers for the sites of one sum."""

    def __init__(self, weights: Sequence[float]) -> None:
        """Choose the scale. Raises `SettingsError` for weights that are not positive and finite, or too uneven."""
        total = sum(weights)
        if not weights or not math.isfinite(total) or min(weights) <= 0:
            raise SettingsError(f"weights {list(weights)[:5]} of a secure sum are not all positive and finite")
        if len(weights) > MOST_SITES:
            raise SettingsError(f"a secure sum has {len(weights)} sites; allowed: at most {MOST_SITES}")
        self.scale = (2**32 - 1 - len(weights)) / total
        if self.scale * min(weights) < LEAST_STEPS:
            raise SettingsError(
                f"weight {min(weights):.4g} beside {total:.4g} in all leaves a site {self.scale * min(weights):,.0f} "
                f"steps from 0 to 1; allowed: at least {LEAST_STEPS:,}",
                hint="Make unify.weights more even",
            )

    def encode(self, log_probs: NDArray[np.floating[Any]], weight: float) -> Words:
        """Write the probabilities of (n, k) log-probabilities or logits: (n, k) uint32."""
        scores = log_probs.astype(np.float64)
        scores -= scores.max(axis=1, keepdims=True)
        np.exp(scores, out=scores)
        scores *= self.scale * weight / scores.sum(axis=1, keepdims=True)
        return np.rint(scores, out=scores).astype(np.uint32)

    def decode(self, words: Words) -> NDArray[np.float64]:
        """Read sums (n, L) back: W, float64."""
        return words / self.scale


class NoisyRing(Ring):
    """Fixed-point numbers for a sum that carries noise: signed, the answers' sums in the middle of the range."""

    def __init__(self, weights: Sequence[float], widths: Sequence[int], shares: tuple[float, float]) -> None:
        """Choose the scale for sites of these numbers of classes, whose shares of noise lie between `shares`.

        Raises `SettingsError` for weights as `Ring` does, and for noise that is too large or too uneven.
        """
        super().__init__(weights)
        least, largest = shares
        # Two answers of k rounded numbers lie scale w sqrt(2) + sqrt(k) apart at most, which is `unit` sqrt(2) or less.
        rounding = math.sqrt(max(widths) / 2)
        scale = (NOISE_STEPS / largest - rounding) / max(weights)
        self.scale = min(scale, _NOISY_RANGE / sum(weights))
        self.unit = self.scale * max(weights) + rounding
        """Steps for which a share of 1 stands: what one probability may count, with what rounding adds."""
        if self.scale * min(weights) < 1 or self.unit * least < LEAST_NOISE_STEPS:
            raise SettingsError(
                f"shares of noise between {least:.4g} and {largest:.4g} with up to {max(widths):,} classes a site do "
                f"not fit {NOISE_STEPS:,.0f} steps; allowed: the largest up to {NOISE_STEPS / LEAST_NOISE_STEPS:,.0f} "
                "times the smallest, and noise that leaves an answer a step",
                hint="Let sites choose privacy.sigma and privacy.honest more alike, or less noise",
            )

    def decode(self, words: Words) -> NDArray[np.float64]:
        """Read noisy sums (n, L) back: W and its noise, float64."""
        return words.view(np.int32) / self.scale
