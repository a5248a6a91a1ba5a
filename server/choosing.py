"""Which samples of the pool to ask about next, by a student that learnt from the answers so far.

Lives here: scores of samples and the choice by them, one pass over the pool at a time. Does not live here: the rounds
(server/job), which samples are kept as chosen (server/asked_pool), the student (server/learning).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import rel_entr, softmax, xlogy
from torch import Tensor, nn

from consilience.common.errors import SettingsError
from consilience.common.files import create_array
from consilience.common.labels import LabelSpace
from consilience.common.nets import scores
from consilience.common.nets.tapped import PENULTIMATE, Tapped, tap_names
from consilience.common.pool import Pool
from consilience.common.preprocessing import Images
from consilience.common.progress import Task
from consilience.common.settings import Ask, Student
from consilience.server.answered import blocks
from consilience.server.answers import AnswerStore
from consilience.server.judge_groups import meeting
from consilience.server.learning import StudentModel, build_student

BLOCK = 1024
"""Samples of the pool that are looked at together."""
_LEAST = -700.0
"""Log-probability of an event of which nothing is left."""
NEIGHBOURS = 10
"""Asked samples, nearest in the student's features, from which a sample's disagreement is expected."""


@dataclass(frozen=True)
class Round:
    """What is known when samples are chosen: `pool` is the whole pool, of whose samples `asked` (a,) int64 are chosen.

    `stores` are the sites' of `space`, in its order; place j of them is sample asked[j]. Files go into `folder`.
    """

    folder: Path
    pool: Pool
    asked: NDArray[np.int64]
    student: StudentModel
    space: LabelSpace
    stores: Sequence[AnswerStore]


def next_samples(choose: str, known: Round, count: int, task: Task) -> NDArray[np.int64]:
    """Return `count` samples of the pool, ascending, none of which is asked about yet.

    `choose` is a `settings.Choose` but for `random`; `task` counts the samples looked at and chosen. Of samples that
    are alike the first are taken. Raises `StorageError`, `PoolError`.
    """
    if choose == "uncertainty":
        return _largest(_uncertainty(known, task), known.asked, count)
    values = _features(known, task)
    if choose == "disagreement":
        return _largest(_expected_disagreement(known, values), known.asked, count)
    return _farthest(values, known.asked, count, task)


def check_choice(ask: Ask, student: Student, shape: tuple[int, int, int]) -> None:
    """Raise `SettingsError` where samples are to be chosen by features that the student has not.

    `shape`: the images', (H, W, C).
    """
    if ask.choose not in ("disagreement", "k-centre"):
        return
    network = build_student(student.architecture, 2, shape, student.preprocessing, seed=0)
    if PENULTIMATE not in tap_names(network):
        raise SettingsError(
            f"job.yaml: field 'ask.choose' is {ask.choose!r}, which looks at what the student's last linear layer is "
            f"fed; {student.architecture!r} has none",
            hint="Set ask.choose to uncertainty, or choose another architecture",
        )


def check_pairs(ask: Ask, space: LabelSpace) -> None:
    """Raise `SettingsError` where sites are to differ and no two of them can: none share two classes."""
    if ask.choose == "disagreement" and not _pairs(space):
        raise SettingsError(
            "job.yaml: field 'ask.choose' is 'disagreement', and no two sites share two classes, or groups that "
            "can be compared, about which they could differ",
            hint="Set ask.choose to uncertainty or k-centre",
        )


def disagreement(space: LabelSpace, answers: Sequence[NDArray[Any] | None]) -> NDArray[np.float64]:
    """Return how much sites differ on each sample, (b,) in nats, NaN where no pair of them answered.

    `answers[i]` (b, k_i) log-probabilities of site i, None where it did not answer. Of each two sites that share two
    classes or more, or events by groups: the Jensen-Shannon divergence between their answers restricted to these and
    renormalised, times the root of what both sites' mass on them is together, since of an image of other classes they
    only guess. The mean over these pairs.
    """
    found = []
    for i, j, left, right in _pairs(space):
        one, two = answers[i], answers[j]
        if one is None or two is None:
            continue
        logits = [_of_events(np.asarray(rows, np.float64), by) for rows, by in ((one, left), (two, right))]
        p, q = (softmax(part, axis=1) for part in logits)
        mean = (p + q) / 2
        divergence = (rel_entr(p, mean) + rel_entr(q, mean)).sum(axis=1) / 2
        weight = np.sqrt(np.prod([np.exp(part).sum(axis=1) for part in logits], axis=0))
        found.append(weight * divergence)
    rows = next((len(held) for held in answers if held is not None), 0)
    return np.mean(found, axis=0) if found else np.full(rows, np.nan)


def _pairs(space: LabelSpace) -> list[tuple[int, int, NDArray[Any], NDArray[Any]]]:
    """Return each two sites that both tell of two events or more, and these in either's answers, as `_of_events` takes.

    An event is a class, or where a site answers on groups the least set of classes that both know as a whole.
    """
    found: list[tuple[int, int, NDArray[Any], NDArray[Any]]] = []
    for i, j in combinations(range(len(space.sites)), 2):
        if space.grouped and (space.grouped[i] is not None or space.grouped[j] is not None):
            sums = meeting(space, i, j)
            if sums is not None:
                found.append((i, j, *sums))
        elif len(shared := space.shared(i, j)) > 1:
            one, two = ({c: k for k, c in enumerate(space.class_sets[site])} for site in (i, j))
            found.append((i, j, np.array([one[c] for c in shared]), np.array([two[c] for c in shared])))
    return found


def _of_events(rows: NDArray[np.float64], by: NDArray[Any]) -> NDArray[np.float64]:
    """Return the log-probabilities of events from those of answers: by columns (e,), or by 0 and 1 (k, e) that add."""
    if by.ndim == 1:
        return rows[:, by]
    with np.errstate(divide="ignore"):  # an event of which nothing is left
        found: NDArray[np.float64] = np.maximum(np.log(np.exp(rows) @ by), _LEAST)
    return found


def _scored(
    known: Round, task: Task, score: Callable[[Images], NDArray[np.float32]]
) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    for start, images in known.pool.blocks(BLOCK):
        yield slice(start, start + len(images)), score(images)
        task.advance(len(images))


def _uncertainty(known: Round, task: Task) -> NDArray[np.float64]:
    """Return the entropy of the student's prediction for each sample of the pool, (n,) in nats."""
    found = np.empty(len(known.pool))
    for at, rows in _scored(known, task, known.student.log_probs):
        told = np.exp(rows.astype(np.float64))
        found[at] = -xlogy(told, told).sum(axis=1)
    return found


def _features(known: Round, task: Task) -> NDArray[np.float32]:
    """Return what the student's last linear layer is fed for each sample of the pool, (n, d) float32, memory-mapped."""
    student, values = known.student, None
    network = _Penultimate(student.model)
    for at, rows in _scored(known, task, lambda images: scores(network, images, student.preprocessing)):
        if values is None:
            values = create_array(known.folder / "features.npy", np.float32, (len(known.pool), rows.shape[1]))
        values[at] = rows
    assert values is not None  # a pool of which a part is asked about has samples
    return values


class _Penultimate(nn.Module):
    """What the last linear layer of `network` is fed, in place of its scores."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.tapped = Tapped(network, [PENULTIMATE])

    def forward(self, images: Tensor) -> Tensor:
        """Return (n, d) of normalised `images`."""
        fed: Tensor = self.tapped(images)[1][0]
        return fed


def _expected_disagreement(known: Round, values: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return how much sites can be expected to differ on each sample of the pool, (n,): as on those nearest to it that
    two of them answered."""
    from sklearn.neighbors import NearestNeighbors  # a second, which jobs that choose otherwise do without

    told = np.full(len(known.asked), np.nan)
    for block in blocks(known.stores, BLOCK, None, np.arange(len(known.asked))):
        told[block.ids] = disagreement(known.space, block.answers)
    judged = np.flatnonzero(~np.isnan(told))
    if not len(judged):
        return np.zeros(len(known.pool))
    near = NearestNeighbors(n_neighbors=min(NEIGHBOURS, len(judged))).fit(values[known.asked[judged]])
    found = np.empty(len(known.pool))
    for start in range(0, len(values), BLOCK):
        places = near.kneighbors(values[start : start + BLOCK], return_distance=False)
        found[start : start + BLOCK] = told[judged][places].mean(axis=1)
    return found


def _farthest(values: NDArray[np.float32], asked: NDArray[np.int64], count: int, task: Task) -> NDArray[np.int64]:
    """Return the samples that are chosen one after another, each the farthest from all before and from those `asked`.

    The greedy k-centre of Sener & Savarese (ICLR 2018), in Euclidean distance.
    """
    from sklearn.metrics import pairwise_distances_argmin_min  # late, as above

    distance = np.empty(len(values))
    for start in range(0, len(values), BLOCK):
        _, distance[start : start + BLOCK] = pairwise_distances_argmin_min(values[start : start + BLOCK], values[asked])
    distance[asked] = -1
    found = np.empty(count, np.int64)
    for k in range(count):
        found[k] = centre = int(distance.argmax())
        for start in range(0, len(values), 64 * BLOCK):
            part = slice(start, start + 64 * BLOCK)
            np.minimum(distance[part], np.linalg.norm(values[part] - values[centre], axis=1), out=distance[part])
        distance[centre] = -1
        task.advance(1)
    return np.sort(found)


def _largest(values: NDArray[np.float64], asked: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Return the `count` samples with the largest `values` (n,) that are not `asked`, ascending; of equal ones the
    first."""
    free = np.ones(len(values), np.bool_)
    free[asked] = False
    left = np.flatnonzero(free)
    return np.sort(left[np.argsort(-values[left], kind="stable")[:count]])
