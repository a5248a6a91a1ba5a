"""Several taps of a teacher from one pass over a batch, where questions about them come one after another.

Lives here: what a pass gave for other taps of the job, kept until these are asked about, within a bound of memory. Does
not live here: one tap's values (taps), the order of questions, which is the server's (server/asking).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from consilience.client.features.taps import OpenTap
from consilience.common.errors import TeacherError
from consilience.common.preprocessing import Images

MOST_BYTES = 128 * 2**20
"""Of values that are kept: those of two or three taps for all samples of the largest question."""
MOST_PASS_BYTES = 256 * 2**20
"""Of the layers' own features in one pass, before they are reduced."""


class Together:
    """The values of a site's taps. For one thread at a time."""

    def __init__(self) -> None:
        self._expected: tuple[OpenTap, ...] = ()
        self._held: dict[tuple[bytes, str], NDArray[np.float32]] = {}
        self._bytes = self._refused = 0

    def expect(self, taps: Sequence[OpenTap]) -> None:
        """Compute these taps together from now on: a job will ask about all of them."""
        self._expected = tuple(taps)
        self._forget()

    def values(self, tap: OpenTap, images: Images) -> NDArray[np.float32]:
        """Return what `tap.values` returns for a batch, of the pass for another tap where that was kept.

        Raises `TeacherError` as it does; what is wrong with another tap is found when that is asked about.
        """
        batch = hashlib.blake2b(f"{images.shape}".encode() + images.tobytes()).digest()
        if (rows := self._held.pop((batch, tap.card.fingerprint), None)) is not None:
            self._bytes -= rows.nbytes
            self._refused = 0
            return rows
        others = self._beside(tap, batch, len(images))
        if not others:
            return tap.values(images)
        try:
            own, *found = tap.layers.features(images, [one.card.name for one in (tap, *others)])
        except TeacherError:  # it may be another's fault
            return tap.values(images)
        for other, features in zip(others, found, strict=True):
            with suppress(TeacherError):
                self._keep((batch, other.card.fingerprint), other.rows(features))
        return tap.rows(own)

    def _beside(self, tap: OpenTap, batch: bytes, samples: int) -> list[OpenTap]:
        """Return the taps to compute in one pass with `tap`, of those that are expected."""
        expected = {one.card.fingerprint for one in self._expected}
        if tap.card.fingerprint not in expected:
            return []
        left, beside = MOST_PASS_BYTES - 4 * samples * tap.computed, []
        for other in self._expected:
            size = 4 * samples * other.computed
            fingerprint = other.card.fingerprint
            if fingerprint != tap.card.fingerprint and (batch, fingerprint) not in self._held and size <= left:
                beside.append(other)
                left -= size
        return beside

    def _keep(self, key: tuple[bytes, str], rows: NDArray[np.float32]) -> None:
        """Keep values where there is room. Where none are used, and as many find no room, the old ones make it."""
        if self._bytes + rows.nbytes > MOST_BYTES:
            self._refused += 1
            if self._refused <= len(self._held):
                return
            self._forget()
        if rows.nbytes <= MOST_BYTES:
            self._held[key] = rows
            self._bytes += rows.nbytes

    def _forget(self) -> None:
        self._held.clear()
        self._bytes = self._refused = 0
