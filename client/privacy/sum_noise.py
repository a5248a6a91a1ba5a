"""A site's share of the noise that a secure sum carries.

Lives here: the numbers that are added to its rows before masks. Does not live here: how large they are
(common/sums/noise), their distribution (rounded), what they are worth (accounting).

Noise is a function of the site's secret, of the teacher and the mechanism, of what is summed, of the image and of the
answer (client/privacy/noise, outputs): asked again, in another attempt by the same sites, it is the same. Over other
sites, by other weights or at another temperature it is other noise; the site's record of its sums sees to it that a
sample is summed once (client/sums).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from consilience.client.privacy.noise import Secret
from consilience.client.privacy.outputs import beside
from consilience.client.privacy.rounded import rounded
from consilience.client.teacher.protocol import Teacher
from consilience.common.preprocessing import Images
from consilience.common.settings import SumNoise
from consilience.common.sums.messages import Terms
from consilience.common.sums.ring import NoisyRing


@dataclass(frozen=True)
class HiddenTeacher:
    """`teacher` as it is, but for the fingerprint: a digest of the model would let a guess be tried."""

    teacher: Teacher
    settings: SumNoise
    secret: Secret

    @property
    def classes(self) -> tuple[str, ...]:
        """See `Teacher.classes`."""
        return self.teacher.classes

    @property
    def fingerprint(self) -> str:
        """See `Teacher.fingerprint`, under the site's secret."""
        return self.secret.digest(purpose(self.settings, self.teacher.fingerprint))

    def log_probs(self, images: Images) -> NDArray[np.float32]:
        """See `Teacher.log_probs`; noise is added when they are summed."""
        return self.teacher.log_probs(images)


def purpose(settings: SumNoise, teacher: str) -> list[object]:
    """Return what noise, and a fingerprint, of this mechanism and teacher follows from."""
    return [settings.model_dump(mode="json", exclude={"delta"}), teacher]


def share_of_noise(
    settings: SumNoise, secret: Secret, terms: Terms, site: str, images: Images, rows: NDArray[np.float32]
) -> NDArray[np.int64]:
    """Return (n, k) int64: what `site` adds to `rows`, its answers to n images; `terms` name its noise."""
    ring, noise = terms.ring(), terms.noise
    assert isinstance(ring, NoisyRing)
    assert noise is not None
    own = terms.by_name[site]
    words = secret.words([*purpose(settings, own.teacher), terms.ground], beside(images, rows), 2 * len(own.classes))
    pairs = words.reshape(len(images), len(own.classes), 2)
    out = np.empty(pairs.shape[:2], np.int64)
    widths = noise.shares(site) * ring.unit
    for width in np.unique(widths):  # one for each number of sites that share out the noise of a class
        columns = np.flatnonzero(widths == width)
        out[:, columns] = rounded(float(width)).draw(pairs[:, columns])
    return out
