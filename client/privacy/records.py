"""Which part of the private data a record belongs to.

Lives here: parts and the held-out share, by the record's own image. Does not live here: what is learned from them.

A record's place depends on its image and the seed alone, never on the other records: were it drawn by a permutation, or
class by class, one record more or less would move others, and what is claimed for one record would not hold. Equal
images are in one part, so that a record that is there twice is protected as if it were there once.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from consilience.common.data import ImageData
from consilience.common.files import canonical_json, sha256

_CHUNK = 256
"""Images read at once."""


@dataclass(frozen=True)
class Places:
    """`part` (n,) int64 in [0, parts), or -1 for a record that is held out; `digest` of all images and labels."""

    part: NDArray[np.int64]
    digest: str

    def ids(self, part: int) -> NDArray[np.int64]:
        """Return the sorted ids of a part's records; of the held-out ones for -1."""
        return np.flatnonzero(self.part == part)


def places(data: ImageData, parts: int, holdout: float, seed: int) -> Places:
    """Give every record its part; a record is held out with chance `holdout`. Raises `DataError`."""
    start = hashlib.sha256(canonical_json(["part", seed]))
    words = np.empty((len(data), 2), np.uint64)
    whole = hashlib.sha256(b"" if data.labels is None else data.labels.tobytes())
    for first in range(0, len(data), _CHUNK):
        for row, image in enumerate(data.read(np.arange(first, min(first + _CHUNK, len(data)))), first):
            own = start.copy()
            own.update(np.ascontiguousarray(image).data)
            whole.update(own.digest())
            words[row] = np.frombuffer(own.digest()[:16], "<u8")
    part = (words[:, 0] % np.uint64(parts)).astype(np.int64)
    # The held-out records are chosen apart from the parts: another share moves no record from part to part.
    part[words[:, 1].astype(np.float64) < holdout * 2.0**64] = -1
    return Places(part, sha256(canonical_json([data.shape, data.class_names, whole.hexdigest()])))
