"""What is said of each test image, by everybody who is judged: the student, the sites, and what combines these.

Lives here: from scores (m, L) to a few numbers an image, a block of images at a time, so that beside the scores nothing
of images x classes is held. Does not live here: any metric (server/judge).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from consilience.common.labels import LabelSpace
from consilience.server.judge_groups import Columns

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

ENSEMBLES = ("naive", "hard_vote", "max_confidence", "least_uncertain")
"""Ways to combine sites' answers without unifying them."""
BLOCK_VALUES = 2**18
"""Scores (images x classes) of a block."""


@dataclass(frozen=True)
class SiteTops:
    """Of each image (m,): the `column` that a site's answer is highest in, and how `sure` it is; None without one.

    `restricted`: the column that the student's scores of the site's classes alone are highest in.
    """

    column: Ints | None
    sure: Floats | None
    restricted: Ints


@dataclass(frozen=True)
class Tops:
    """Of each image (m,): the class that each contender takes it for, and how `sure` the student is; None: not asked.

    `ensembles`: those of `ENSEMBLES`.
    """

    student: Ints
    sure: Floats
    unified: Ints | None
    oracle: Ints | None
    ensembles: Mapping[str, Ints | None]
    sites: tuple[SiteTops, ...]


def tops_of(
    m: int,
    space: LabelSpace,
    columns: Sequence[Columns],
    answers: Sequence[ArrayLike | None],
    unified: ArrayLike | None,
    student: ArrayLike,
    oracle: ArrayLike | None,
) -> Tops:
    """Return what is said of m images; arguments as of `judge`, `columns` one a site. Raises `ValueError`."""
    width = len(space)
    named = [("student", student, width), ("unified", unified, width), ("oracle", oracle, width)]
    named += [
        (f"answers of {site}", rows, len(held.sole))
        for site, rows, held in zip(space.sites, answers, columns, strict=True)
    ]
    given = [None if rows is None else _checked(rows, (m, count), what) for what, rows, count in named]
    size = max(1, BLOCK_VALUES // width)
    parts = []
    for start in range(0, m, size):
        block = [
            None if rows is None else _numbers(rows[start : start + size], what)
            for (what, _, _), rows in zip(named, given, strict=True)
        ]
        parts.append(_block(space, columns, block))
    return _joined(parts)


def _block(space: LabelSpace, columns: Sequence[Columns], rows: Sequence[Floats | None]) -> Tops:
    student, unified, oracle, *answers = rows
    assert student is not None
    probs = [None if a is None else softmax(a) for a in answers]
    sites = []
    for held, p in zip(columns, probs, strict=True):
        among = student[:, held.classes]
        restricted = (among if held.plain else held.summed(softmax(among))).argmax(1)
        sites.append(SiteTops(None if p is None else p.argmax(1), None if p is None else p.max(1), restricted))
    return Tops(
        student.argmax(1),
        softmax(student).max(1),
        None if unified is None else unified.argmax(1),
        None if oracle is None else oracle.argmax(1),
        _ensembles(space, columns, probs, len(student)),
        tuple(sites),
    )


def _joined(parts: Sequence[Tops]) -> Tops:
    """Return the tops of blocks of images as those of all."""

    def all_of(values: Sequence[Any]) -> Any:
        return None if values[0] is None else np.concatenate(values)

    return Tops(
        all_of([part.student for part in parts]),
        all_of([part.sure for part in parts]),
        all_of([part.unified for part in parts]),
        all_of([part.oracle for part in parts]),
        {name: all_of([part.ensembles[name] for part in parts]) for name in ENSEMBLES},
        tuple(
            SiteTops(
                all_of([site.column for site in held]),
                all_of([site.sure for site in held]),
                all_of([site.restricted for site in held]),
            )
            for held in zip(*(part.sites for part in parts), strict=True)
        ),
    )


def uncertainty(probs: Floats) -> Floats:
    """Return (m,) the entropy of probabilities (m, k) relative to log k: 0 is certain, 1 is a guess.

    Shen et al., AAAI 2019, let the teacher answer for which it is least. A site of a single class always says
    that class: that tells nothing, and counts as 1.
    """
    k = probs.shape[1]
    if k == 1:
        return np.ones(len(probs))
    logs = np.log(probs, where=probs > 0, out=np.zeros_like(probs))
    return np.asarray(-(probs * logs).sum(1) / math.log(k))


def softmax(scores: Floats) -> Floats:
    """Return the probabilities (m, k) of log-probabilities or logits (m, k), row by row."""
    exp = np.exp(scores - scores.max(1, keepdims=True))
    return np.asarray(exp / exp.sum(1, keepdims=True))


def _checked(values: ArrayLike, shape: tuple[int, int], what: str) -> NDArray[Any]:
    array = np.asarray(values)
    if array.shape != shape:
        raise ValueError(f"{what}: shape {array.shape}; wanted {shape}")
    return array


def _numbers(rows: NDArray[Any], what: str) -> Floats:
    array = np.asarray(rows, np.float64)
    if np.isnan(array).any():
        raise ValueError(f"{what}: NaN")
    return array


def _ensembles(
    space: LabelSpace, columns: Sequence[Columns], probs: Sequence[Floats | None], m: int
) -> dict[str, Ints | None]:
    """Return the arg-max labels (m,) of the four ways to combine answers without unifying them."""
    if all(p is None for p in probs):
        return dict.fromkeys(ENSEMBLES)
    summed = np.zeros((m, len(space)))
    votes = np.zeros_like(summed)
    largest = np.zeros_like(summed)
    certain, least = np.zeros_like(summed), np.full(m, np.inf)
    for site in sorted(range(len(probs)), key=lambda i: space.sites[i]):
        p, held = probs[site], columns[site]
        if p is None:
            continue
        classes, told = held.classes, held.spread(p)
        picked, doubt = held.column == p.argmax(1)[:, None], uncertainty(told)
        summed[:, classes] += told
        votes[:, classes] += picked * held.share
        certain[doubt < least] = 0.0
        no_worse = (doubt <= least)[:, None]
        certain[:, classes] = np.maximum(certain[:, classes], picked & no_worse)
        least = np.minimum(least, doubt)
        largest[:, classes] = np.maximum(largest[:, classes], told)
    # The zero-padded mean differs from the sum by a factor only.
    chosen = (summed.argmax(1), *(_first(values, summed) for values in (votes, largest, certain)))
    return dict(zip(ENSEMBLES, chosen, strict=True))


def _first(values: Floats, ties: Floats) -> Ints:
    """Return the arg-max of `values` (m, L) by row; of equals the one with the largest entry of `ties`."""
    return np.asarray(np.where(values == values.max(1, keepdims=True), ties, -1.0).argmax(1))
