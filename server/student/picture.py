"""A picture of vectors of several owners in two dimensions.

Lives here: the projection. Does not live here: drawing it (server/plots_amalgamation).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

_DIGITS = 4


def picture(vectors: Mapping[str, NDArray[np.floating]]) -> dict[str, Any] | None:
    """Return `points`, owner -> [[x, y], ...], and `shown`, the shares of variance that x and y have; None for nothing.

    `vectors[owner]` (n_i, d) floating, finite: x and y are the first two principal components of all of them together.
    Of each axis the largest coordinate is positive, so that the picture is one.
    """
    held = [np.asarray(rows, np.float64) for rows in vectors.values() if len(rows)]
    if not held:
        return None
    rows = np.concatenate(held)
    rows -= rows.mean(axis=0)
    # The smaller of rows x rows and d x d has the same eigenvalues but for zeros.
    if len(rows) <= rows.shape[1]:
        values, left = np.linalg.eigh(rows @ rows.T)
        values = np.maximum(values[::-1], 0)
        points = left[:, ::-1][:, :2] * np.sqrt(values[:2])
    else:
        values, right = np.linalg.eigh(rows.T @ rows)
        values = np.maximum(values[::-1], 0)
        points = rows @ right[:, ::-1][:, :2]
    points = np.pad(points, ((0, 0), (0, 2 - points.shape[1])))
    points *= np.where(points[np.abs(points).argmax(axis=0), [0, 1]] < 0, -1.0, 1.0)
    total = float(values.sum())
    shown = [float(value / total) if total else 0.0 for value in [*values[:2], 0.0][:2]]
    cuts = np.cumsum([len(each) for each in held])[:-1]
    owners = [who for who, each in vectors.items() if len(each)]
    return {
        "points": {who: part.round(_DIGITS).tolist() for who, part in zip(owners, np.split(points, cuts), strict=True)},
        "shown": shown,
    }
