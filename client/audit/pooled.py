"""The likelihood ratio with every shadow as a target in turn, its scores pooled (Carlini et al., IEEE S&P 2022).

Lives here: scores of shadows by the other shadows, and what low false rates they resolve. Does not live here: training
shadows (shadows), the ratio (lira), what is told of the teacher itself (membership).

Of a teacher only the few held-out images are known not to have been learned from, and a false rate of 1 in 1,000 takes
1,000 of them. Of every shadow half of all images are, and it costs no further training to attack it too.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from consilience.client.audit.lira import likelihood_ratio
from consilience.client.audit.membership import CONFIDENCE, FALSE_RATES, Found
from consilience.common.seeds import derive
from consilience.common.settings import Settings

LEAST_TARGETS = 6
"""Shadows of which, one left out, two learned from every image and two did not."""
RESAMPLED = 200
"""Times that images and shadows are drawn anew for an interval."""


class Pooled(Settings):
    """What the likelihood ratio reached against `targets` shadows together, over so many `images`.

    `found` maps a false rate to the share of (image, shadow) pairs found in which the shadow learned from the image;
    None where fewer others than one over the rate were pooled.
    """

    targets: int
    images: int
    auc: float
    found: dict[float, Found | None]


def pool_shadows(scores: NDArray[np.float64], inside: NDArray[np.bool_], seed: int) -> Pooled | None:
    """Return what attacking each shadow by the others comes to; None for fewer than `LEAST_TARGETS`.

    `scores` (S, n) and `inside` (S, n) are those of `Shadows`. The pooled scores are not independent: an image is in
    all shadows, and a shadow's images share its training. So intervals come from drawing images and shadows anew, both
    with replacement (Owen, 2007, which is too wide rather than too narrow), and none is narrower than that of as many
    independent members as there are images (Clopper-Pearson).
    """
    targets, images = scores.shape
    if targets < LEAST_TARGETS:
        return None
    ratios = np.stack(
        [
            likelihood_ratio(scores[one], np.delete(scores, one, axis=0), np.delete(inside, one, axis=0))
            for one in range(targets)
        ]
    ).ravel()
    order = np.argsort(-ratios, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(ratios[order])), len(order) - 1)  # equal scores fall together
    members = inside.ravel()[order]
    random = np.random.default_rng(derive(seed, "pooled shadows"))

    def reached(weights: NDArray[np.float64]) -> tuple[float, list[float]]:
        true, false = (np.append(0.0, np.cumsum(weights * side)[ends]) for side in (members, ~members))
        if not (true[-1] and false[-1]):
            return 0.5, [0.0 for _ in FALSE_RATES]
        true, false = true / true[-1], false / false[-1]
        area = float(np.sum(np.diff(false) * (true[1:] + true[:-1]) / 2))
        return area, [float(true[false <= rate * (1 + 1e-9)].max()) for rate in FALSE_RATES]

    auc, shares = reached(np.ones(len(order)))
    drawn = np.empty((RESAMPLED, len(FALSE_RATES)))
    for row in drawn:
        of_targets = random.multinomial(targets, np.full(targets, 1 / targets)).astype(np.float64)
        of_images = random.multinomial(images, np.full(images, 1 / images)).astype(np.float64)
        row[:] = reached(np.multiply.outer(of_targets, of_images).ravel()[order])[1]
    others = int(np.sum(~members))
    found = {
        rate: None if others * rate < 1 else _found(share, column, images)
        for rate, share, column in zip(FALSE_RATES, shares, drawn.T, strict=True)
    }
    return Pooled(targets=targets, images=images, auc=auc, found=found)


def _found(share: float, drawn: NDArray[np.float64], images: int) -> Found:
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    ends = binomtest(round(share * images), images).proportion_ci(CONFIDENCE, "exact")
    return Found(
        share=share, low=min(float(low), float(ends.low), share), high=max(float(high), float(ends.high), share)
    )
