"""Which samples of a range are meant, as a line of text: one bit a sample, in base64.

Lives here: writing and reading it. Does not live here: what it is part of (common/protocol), which samples a job asks
about (common/samples_asked). One subset has one text: its first and last samples are chosen, not all between them are,
and bits after the last are 0.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray


def subset_text(mask: NDArray[np.bool_]) -> str:
    """Return the text of a mask (n,)."""
    return base64.b64encode(np.packbits(mask).tobytes()).decode()


def subset_mask(text: str, size: int) -> NDArray[np.bool_]:
    """Return the mask (size,) that a text is. Raises `ValueError` where it is none over so many samples."""
    if len(text) != text_length(size):
        raise ValueError(f"it has {len(text):,} characters; of {size:,} samples {text_length(size):,} are needed")
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:
        raise ValueError("it is not base64") from None
    bits = np.unpackbits(np.frombuffer(data, np.uint8)).view(np.bool_)
    if len(data) != (size + 7) // 8 or bits[size:].any() or base64.b64encode(data).decode() != text:
        raise ValueError("it has bits after its last sample")
    return np.asarray(bits[:size])


def text_length(size: int) -> int:
    """Return how many characters the text of a mask over `size` samples has."""
    data = (size + 7) // 8
    return 4 * ((data + 2) // 3)


def runs(mask: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """Yield the ranges (start, stop) in which a mask is true."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    for low, high in list(pairwise(edges))[::2]:
        yield int(low), int(high)
