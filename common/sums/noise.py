"""Who adds how much noise to which class of a secure sum, and whether that is enough for a site.

Lives here: shares of noise, from the terms alone, so that every site works out the same of every other. Does not live
here: drawing it (client/privacy/rounded, client/privacy/sum_noise), what it is worth (client/privacy/accounting).

Of m sites that add noise, a site trusts that `honest` of them, itself among them, stay to the end, add their shares
and keep them to themselves. At most m - honest fail, so of the o of them that know a class, o - (m - honest) do not,
and the site itself never does. It adds sigma / sqrt(max(1, o - (m - honest))) there: sites of one sigma and honest
together carry sigma in every class, also where fewer know it, and all of its noise where it is alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from consilience.common.cards import SumNoiseCard

_ROUNDING = 1e-9


class SharedNoise:
    """The noise of one sum, in units of a probability. `class_sets` are all sites', `noises` those of some."""

    def __init__(
        self, class_sets: Mapping[str, Sequence[int]], noises: Mapping[str, SumNoiseCard], labels: int
    ) -> None:
        self._sets = {site: np.asarray(classes, np.int64) for site, classes in class_sets.items()}
        self._noises = noises
        self._owners = np.zeros(labels, np.int64)
        for site in noises:
            self._owners[self._sets[site]] += 1

    def shares(self, site: str) -> NDArray[np.float64]:
        """Return (k,) the standard deviation of what a site adds to each of its classes, in its order."""
        noise = self._noises.get(site)
        if noise is None:
            return np.zeros(len(self._sets[site]))
        return np.asarray(noise.sigma / np.sqrt(self._sharing(site)))

    def _sharing(self, site: str) -> NDArray[np.int64]:
        """Among how many sites it shares out the noise of each of its classes."""
        failing = len(self._noises) - self._noises[site].honest
        return np.maximum(1, self._owners[self._sets[site]] - failing)

    def bounds(self) -> tuple[float, float]:
        """Return the least and the largest share of any site in any class; there must be one."""
        shares = [self.shares(site) for site in self._noises]
        return min(float(own.min()) for own in shares), max(float(own.max()) for own in shares)

    def variances(self, sites: Sequence[str]) -> NDArray[np.float64]:
        """Return (L,) the variance of what these sites add to each class."""
        total = np.zeros(len(self._owners))
        for site in sites:
            total[self._sets[site]] += self.shares(site) ** 2
        return total

    def shortage(self, site: str, threshold: int) -> str:
        """Say why the sum may carry less noise than a site needs if only `threshold` sites stay; empty if not."""
        noise = self._noises.get(site)
        if noise is None:
            return ""
        left = threshold - (len(self._sets) - len(self._noises))
        if left < noise.honest:
            return (
                f"site {site} trusts that {noise.honest} sites add their noise; {len(self._noises)} of "
                f"{len(self._sets)} add any, and {max(left, 0)} of these need to stay"
            )
        least = self._carried(site)
        short = least < noise.sigma * (1 - _ROUNDING)
        if not short.any():
            return ""
        worst = int(least.argmin())
        return (
            f"site {site} needs noise {noise.sigma:g}; class {int(self._sets[site][worst])} is sure to carry "
            f"{least[worst]:.4g}, as other sites add less"
        )

    def _carried(self, site: str) -> NDArray[np.float64]:
        """Return (k,) the least noise that each of a site's classes carries, whoever of the others fails."""
        own, place = self._sets[site], np.full(len(self._owners), -1)
        place[own] = np.arange(len(own))
        others = np.full((len(self._noises) - 1, len(own)), np.inf)
        for row, other in enumerate(name for name in self._noises if name != site):
            columns = place[self._sets[other]]
            others[row, columns[columns >= 0]] = self.shares(other)[columns >= 0] ** 2
        others.sort(axis=0)
        needed = self._sharing(site) - 1  # of the other owners, those with the smallest shares
        counted = np.arange(len(others))[:, None] < needed
        return np.asarray(np.sqrt(self.shares(site) ** 2 + np.where(counted, others, 0).sum(axis=0)))
