"""Which vertical and which specialist a pool sample is taught by, and what of the specialist's answer is kept.

Lives here: pure functions on a block's arrays. Does not live here: reading answers and writing targets
(server/concentration). No function takes true labels but by way of `vertical`, which a benchmark may know.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from consilience.server.student.verticals import Verticals

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]


def route_by_coverage(
    coverage: Sequence[Floats | None],
    answers: Sequence[Floats | None],
    class_sets: Sequence[Sequence[int]],
    verticals: Verticals,
) -> tuple[Ints, Ints]:
    """Return (b,) verticals and (b,) sites: of the specialists, the site with the highest coverage, ties to the first.

    `coverage[i]` (b,) and `answers[i]` (b, k_i) log-probabilities, None for a site that gave none and is not chosen. A
    specialist of several verticals is taken for the one that it gives most. Raises `ValueError` without any specialist.
    """
    useful = {site for sites in verticals.specialists for site in sites}
    chosen = [i for i, (c, a) in enumerate(zip(coverage, answers, strict=True)) if c is not None and a is not None]
    chosen = [i for i in chosen if i in useful]
    if not chosen:
        raise ValueError("no specialist gave coverage and an answer")
    told = np.stack([np.asarray(coverage[i], np.float64) for i in chosen], axis=1)
    sites = np.asarray(chosen)[told.argmax(axis=1)]
    found = np.empty(len(sites), np.int64)
    for i in chosen:
        rows = np.flatnonzero(sites == i)
        own = [v for v, able in enumerate(verticals.specialists) if i in able]
        probs = _probs(np.asarray(answers[i])[rows])
        masses = [probs[:, _columns(class_sets[i], verticals.classes[v])].sum(axis=1) for v in own]
        found[rows] = np.asarray(own)[np.stack(masses, axis=1).argmax(axis=1)]
    return found, sites


def route_by_labels(labels: Floats, verticals: Verticals, able: Sequence[bool] | None = None) -> Ints:
    """Return (b,) the verticals with most of (b, L) unified labels, ties to the first; of those that are `able`."""
    masses = np.stack([labels[:, list(held)].sum(axis=1, dtype=np.float64) for held in verticals.classes], axis=1)
    if able is not None:
        masses[:, ~np.asarray(able)] = -1.0
    found: Ints = masses.argmax(axis=1)
    return found


def specialists_for(
    vertical: Ints, verticals: Verticals, answered: Sequence[bool], coverage: Sequence[Floats | None]
) -> Ints:
    """Return (b,) sites for (b,) verticals: the one of a vertical's specialists with the highest coverage.

    Sites that did not answer are not chosen; one whose coverage is not known comes after those whose is; ties go to the
    first. Raises `ValueError` for a vertical none of whose specialists answered.
    """
    sites = np.empty(len(vertical), np.int64)
    for v in np.unique(vertical):
        rows = np.flatnonzero(vertical == v)
        able = [i for i in verticals.specialists[v] if answered[i]]
        if not able:
            raise ValueError(f"no specialist of vertical {verticals.names[v]} answered")
        told = [np.full(len(rows), -1.0) if (c := coverage[i]) is None else np.asarray(c)[rows] for i in able]
        sites[rows] = np.asarray(able)[np.stack(told, axis=1).argmax(axis=1)]
    return sites


def specialist_targets(
    answers: Sequence[Floats | None],
    class_sets: Sequence[Sequence[int]],
    verticals: Verticals,
    vertical: Ints,
    sites: Ints,
    keep: int,
    temperature: float = 1.0,
    wanted: NDArray[np.bool_] | None = None,
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Return (b, keep) classes and probabilities: the highest that (b,) `sites` give within (b,) `vertical`, in turn.

    `answers[i]` (b, k_i) log-probabilities of site i. Probabilities are softened by `temperature` and are those of a
    specialist that knows nothing but the vertical: they sum to 1 over it. Of `wanted` classes (L,) alone, where that is
    given, they are kept, as they are. A vertical with fewer of these than `keep` leaves zeros behind its own, at its
    first class, and at class 0 where it has none.
    """
    labels = np.zeros((len(vertical), keep), np.int32)
    values = np.zeros((len(vertical), keep), np.float32)
    for v in np.unique(vertical):
        classes = np.asarray(verticals.classes[v])
        picked = np.arange(len(classes)) if wanted is None else np.flatnonzero(wanted[classes])
        if not len(picked):
            continue
        most = min(keep, len(picked))
        for i in np.unique(sites[vertical == v]):
            rows = np.flatnonzero((vertical == v) & (sites == i))
            given = answers[i]
            assert given is not None
            own = np.asarray(given, np.float64)[np.ix_(rows, _columns(class_sets[i], classes))]
            at, top = highest(_probs(own / temperature)[:, picked], most)
            labels[rows] = classes[picked[0]]
            labels[rows, :most], values[rows, :most] = classes[picked[at]], top
    return labels, values


def highest(probs: Floats, keep: int) -> tuple[Ints, NDArray[np.float32]]:
    """Return (b, keep) columns and values of the highest of (b, k), highest first, ties to the first column."""
    at = np.argsort(-probs, axis=1, kind="stable")[:, :keep]
    return at, np.take_along_axis(probs, at, axis=1).astype(np.float32)


def _columns(own: Sequence[int], classes: Sequence[int] | Ints) -> Ints:
    """Return where `classes` stand in a site's own."""
    place = {label: at for at, label in enumerate(own)}
    return np.asarray([place[int(label)] for label in classes], np.int64)


def _probs(log_probs: Floats) -> NDArray[np.float64]:
    values = np.exp(np.asarray(log_probs, np.float64) - np.max(log_probs, axis=1, keepdims=True, initial=-np.inf))
    found: NDArray[np.float64] = values / values.sum(axis=1, keepdims=True)
    return found
