"""How good the student is, and how good what it was made from was: pure functions on arrays.

Lives here: the metrics and the baselines of a run. Does not live here: where the arrays come from (server/job), how
results are told (server/report). Test labels come in here and nowhere else; nothing here feeds a choice.

Ties never depend on the order of the sites: sites are added up in the order of their names, votes that tie are decided
by the summed probability, and what still ties by the first class of the label space.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from consilience.common.labels import LabelSpace
from consilience.server.judge_groups import Columns, meeting
from consilience.server.judge_tops import SiteTops, softmax, tops_of

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

BASELINES = ("naive", "best_site", "hard_vote", "max_confidence", "least_uncertain", "unified_ensemble", "oracle")
"""Names of the baselines, in the order in which they are told."""
BINS = 15
"""Equal-width bins of the expected calibration error."""
MOST_CONFUSION = 200
"""Classes up to which there is a confusion matrix: it grows with their square."""
MOST_MISTAKES = 10


@dataclass(frozen=True)
class Score:
    """Accuracy = correct / count, with the bounds of its 95 % Wilson interval."""

    accuracy: float
    correct: int
    count: int
    low: float
    high: float


@dataclass(frozen=True)
class ClassScore:
    """One class: None where it is undefined (no test image of the class, or none predicted as it)."""

    name: str
    support: int
    recall: float | None
    precision: float | None
    unified_recall: float | None


@dataclass(frozen=True)
class Bin:
    """One bin (low, high] of the reliability diagram; None in an empty bin."""

    low: float
    high: float
    count: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True)
class SiteScore:
    """One site. `count` is the number of test images of its classes; None where nothing can be said.

    `teacher_accuracy`: its own arg-max on those images. `student_accuracy`: the student's on the same images, over
    all classes. `student_accuracy_restricted`: the student's with only the site's classes to choose from.
    `accuracy`: the site's own arg-max on all test images, those of other sites' classes included.
    `confidence_auroc`: AUROC of the site's top probability as a score for "this image is of one of my classes", over
    all test images: what its coverage has to beat. 0.5 says nothing. In all of these a site that answers on groups, and
    the student beside it, is right where it names the true class or another of its group.
    """

    name: str
    count: int
    teacher_accuracy: float | None
    student_accuracy: float | None
    student_accuracy_restricted: float | None
    accuracy: float | None
    confidence_auroc: float | None


@dataclass(frozen=True)
class Judgement:
    """Everything the test set tells about a run.

    `outside` of the `count` test images are of a class that no site knows: they count as wrong. `confusion[t][p]` is
    the number of images of class t that the student takes for p, None for more than `MOST_CONFUSION` classes;
    `confusion_outside[p]` the same for those outside. `mistakes` are the classes that are taken for others most often,
    as (t, p, number), most first. `unwanted` more are of classes that the student was not to learn: nobody is judged
    by them.
    """

    count: int
    outside: int
    student: Score
    baselines: dict[str, Score | None]
    best_site: str | None
    classes: tuple[ClassScore, ...]
    calibration_error: float
    reliability: tuple[Bin, ...]
    confusion: tuple[tuple[int, ...], ...] | None
    confusion_outside: tuple[int, ...] | None
    mistakes: tuple[tuple[int, int, int], ...]
    sites: tuple[SiteScore, ...]
    unwanted: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings, sequences and None, fit for JSON: no NaN."""
        return asdict(self)


def judge(
    truth: ArrayLike,
    space: LabelSpace,
    answers: Sequence[ArrayLike | None],
    unified: ArrayLike | None,
    student: ArrayLike,
    oracle: ArrayLike | None,
    mine: Sequence[NDArray[np.bool_]] | None = None,
) -> Judgement:
    """Judge the student and the baselines on one test set of m images and a label space of L classes.

    `truth` (m,) integer: indices into the label space, -1 where no site knows the class (always wrong).
    `answers[i]` (m, k_i) floating: site i's log-probabilities in the order of `space.entries(i)`; None where the site
    did not answer. Baselines share out what is on a group evenly; the best site is wrong where it names one.
    `unified` (m, L): unified soft labels, as probabilities or log-probabilities.
    `student`, `oracle` (m, L): log-probabilities. `mine[i]` (m,): which images are of site i's classes; by default
    those of `space.class_sets[i]`, which does not say it where one class stands for several.

    Raises `ValueError`: an empty test set, a shape that does not fit, a label out of range, or NaN.
    """
    labels = np.asarray(truth)
    if labels.ndim != 1 or not len(labels) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"truth has shape {labels.shape} and type {labels.dtype}; wanted (m,) integers, m >= 1")
    if labels.min() < -1 or labels.max() >= len(space):
        raise ValueError(f"truth holds labels outside -1..{len(space) - 1}")
    m, width = len(labels), len(space)
    if len(answers) != len(space.sites):
        raise ValueError(f"{len(answers)} sites' answers for {len(space.sites)} sites")
    columns = [Columns.of(space, site) for site in range(len(space.sites))]
    told = tops_of(m, space, columns, answers, unified, student, oracle)
    tops = [
        None if site.column is None else held.sole[site.column] for held, site in zip(columns, told.sites, strict=True)
    ]
    best = _best_site(labels, space, tops)
    contenders = {
        **told.ensembles,
        "best_site": None if best is None else tops[best],
        "unified_ensemble": told.unified,
        "oracle": told.oracle,
    }
    confusion = _confusion(labels, told.student, width) if width <= MOST_CONFUSION else None
    own = mine if mine is not None else [np.isin(labels, classes) for classes in space.class_sets]
    error, bins = reliability(told.sure, told.student == labels)
    return Judgement(
        count=m,
        outside=int((labels < 0).sum()),
        student=score(told.student, labels),
        baselines={name: None if (top := contenders[name]) is None else score(top, labels) for name in BASELINES},
        best_site=None if best is None else space.sites[best],
        classes=_class_scores(space, labels, told.student, told.unified),
        calibration_error=error,
        reliability=bins,
        confusion=None if confusion is None else tuple(tuple(map(int, row)) for row in confusion[:width]),
        confusion_outside=None if confusion is None else tuple(map(int, confusion[width])),
        mistakes=_mistakes(labels, told.student, width),
        sites=tuple(
            _site_score(site, held, labels, of_site, told.student, known)
            for site, held, of_site, known in zip(space.sites, columns, told.sites, own, strict=True)
        ),
    )


def score(predicted: ArrayLike, truth: ArrayLike) -> Score:
    """Score predictions (m,) against labels (m,), m >= 1."""
    hits = np.asarray(predicted) == np.asarray(truth)
    correct, count = int(hits.sum()), len(hits)
    low, high = wilson(correct, count)
    return Score(correct / count, correct, count, low, high)


def wilson(correct: int, count: int, level: float = 0.95) -> tuple[float, float]:
    """Return the Wilson score interval of a share: with p = correct / count and z the normal quantile of `level`,

    (p + z² / 2n ± z sqrt(p (1 - p) / n + z² / 4n²)) / (1 + z² / n).
    """
    z = NormalDist().inv_cdf(0.5 + level / 2)
    p, scale = correct / count, 1 + z * z / count
    centre = (p + z * z / (2 * count)) / scale
    half = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count)) / scale
    # At the ends the bound is exactly 0 or 1; rounding must not put it on the wrong side of the share.
    return (0.0 if correct == 0 else centre - half), (1.0 if correct == count else centre + half)


def calibration(probs: Floats, truth: Ints) -> tuple[float, tuple[Bin, ...]]:
    """Return the expected calibration error of top probabilities, and its bins.

    `probs` (m, L), `truth` (m,). With B_b the images whose top probability lies in ((b - 1) / 15, b / 15],

    ECE = sum over b of |B_b| / m · | accuracy(B_b) - mean top probability(B_b) |.
    """
    return reliability(probs.max(1), probs.argmax(1) == truth)


def reliability(told: Floats, hit: NDArray[np.bool_]) -> tuple[float, tuple[Bin, ...]]:
    """Return the expected calibration error of probabilities `told` (m,) of what was so or not, `hit` (m,); m >= 1.

    With it the bins, as in `calibration`: a bin's `confidence` is the mean of `told`, its `accuracy` that of `hit`.
    """
    edges, at = np.linspace(0, 1, BINS + 1), bin_of(told)
    count = np.bincount(at, minlength=BINS)
    confidence = np.bincount(at, weights=told, minlength=BINS)
    hits = np.bincount(at, weights=hit, minlength=BINS)
    bins = tuple(
        Bin(float(low), float(high), int(n), float(c / n) if n else None, float(h / n) if n else None)
        for low, high, n, c, h in zip(edges[:-1], edges[1:], count, confidence, hits, strict=True)
    )
    return float(np.abs(confidence - hits).sum() / len(told)), bins


def bin_of(told: Floats) -> Ints:
    """Return (m,) the bins ((b - 1) / 15, b / 15] that probabilities (m,) lie in, counted from 0; 0 is in the first."""
    return np.clip(np.searchsorted(np.linspace(0, 1, BINS + 1), told, side="left") - 1, 0, BINS - 1)


def agreement(blocks: Iterable[Sequence[ArrayLike | None]], space: LabelSpace) -> Floats:
    """Return how often sites agree about the pool: (N, N) float64, symmetric.

    Entry (i, j) is the share of samples for which sites i and j have the same arg-max among the classes both know, or,
    where one answers on groups, among the least sets of classes that both tell of as a whole; NaN on the diagonal, for
    pairs with fewer than two of these, and where there was no sample to compare.
    `blocks` yields, in turn, one (b, k_i) array of scores a site (None where it has none); one pass, nothing kept.
    """
    n = len(space.sites)
    columns: dict[tuple[int, int], tuple[list[int], list[int]]] = {}
    sums: dict[tuple[int, int], tuple[Floats, Floats]] = {}
    for i in range(n):
        for j in range(i + 1, n):
            if space.grouped and (space.grouped[i] or space.grouped[j]):
                if (events := meeting(space, i, j)) is not None:
                    sums[i, j] = events
                continue
            shared = space.shared(i, j)
            if len(shared) >= 2:
                own, other = space.class_sets[i], space.class_sets[j]
                columns[i, j] = [own.index(c) for c in shared], [other.index(c) for c in shared]
    same, seen = np.zeros((n, n)), np.zeros((n, n))
    for block in blocks:
        arrays = [None if a is None else np.asarray(a) for a in block]
        for i, j in (*columns, *sums):
            a, b = arrays[i], arrays[j]
            if a is None or b is None:
                continue
            if (i, j) in sums:
                first, second = (
                    softmax(np.asarray(x, np.float64)) @ s for x, s in zip((a, b), sums[i, j], strict=True)
                )
            else:
                left, right = columns[i, j]
                first, second = a[:, left], b[:, right]
            same[i, j] += np.count_nonzero(first.argmax(1) == second.argmax(1))
            seen[i, j] += len(a)
    same, seen = same + same.T, seen + seen.T
    return np.asarray(np.divide(same, seen, out=np.full((n, n), np.nan), where=seen > 0))


def auroc(scores: ArrayLike, truth: ArrayLike, classes: ArrayLike) -> float | None:
    """Return the AUROC of scores (m,) for "of one of `classes`" against labels (m,), -1 for a class of no site.

    None where there are no samples of `classes`, or no others.
    """
    return _auroc(scores, np.isin(np.asarray(truth), np.asarray(classes)))


def _best_site(truth: Ints, space: LabelSpace, tops: Sequence[Ints | None]) -> int | None:
    """Return the site with the most correct arg-maxes on all test images; of equals, the first by name."""
    correct = {site: int((top == truth).sum()) for site, top in enumerate(tops) if top is not None}
    return min(correct, key=lambda site: (-correct[site], space.sites[site]), default=None)


def _confusion(truth: Ints, predicted: Ints, width: int) -> Ints:
    """Return counts (L + 1, L): rows are true classes, the last row is for images outside the label space."""
    rows = np.where(truth < 0, width, truth)
    return np.bincount(rows * width + predicted, minlength=(width + 1) * width).reshape(width + 1, width)


def _mistakes(truth: Ints, predicted: Ints, width: int) -> tuple[tuple[int, int, int], ...]:
    """Return the most common mistakes about images inside the label space; of equals the first classes'."""
    wrong = (truth >= 0) & (truth != predicted)
    pairs, counts = np.unique(truth[wrong] * width + predicted[wrong], return_counts=True)
    first = np.argsort(-counts, kind="stable")[:MOST_MISTAKES]
    return tuple((int(pairs[at] // width), int(pairs[at] % width), int(counts[at])) for at in first)


def _class_scores(space: LabelSpace, truth: Ints, predicted: Ints, unified: Ints | None) -> tuple[ClassScore, ...]:
    def counted(classes: Ints) -> list[int]:
        return [int(count) for count in np.bincount(classes, minlength=len(space))]

    support, taken = counted(truth[truth >= 0]), counted(predicted)
    hits = counted(truth[truth == predicted])
    told = [None] * len(space) if unified is None else counted(truth[truth == unified])
    return tuple(
        ClassScore(
            name=name,
            support=held,
            recall=_share(hit, held),
            precision=_share(hit, times),
            unified_recall=None if other is None else _share(other, held),
        )
        for name, held, hit, times, other in zip(space.names, support, hits, taken, told, strict=True)
    )


def _share(part: Any, whole: Any) -> float | None:
    return float(part / whole) if whole else None


def _auroc(scores: ArrayLike, mine: NDArray[np.bool_]) -> float | None:
    from sklearn.metrics import roc_auc_score  # a second, which processes that judge nothing do without

    return float(roc_auc_score(mine, np.asarray(scores))) if 0 < mine.sum() < len(mine) else None


def _site_score(
    name: str, held: Columns, truth: Ints, told: SiteTops, student: Ints, mine: NDArray[np.bool_]
) -> SiteScore:
    count, own = int(mine.sum()), held.place[truth]
    known = own >= 0
    said = None if told.column is None else (told.column == own) & known
    whole = (held.place[student] == own) & known
    restricted = (told.restricted == own) & known
    return SiteScore(
        name=name,
        count=count,
        teacher_accuracy=None if said is None else _share(said[mine].sum(), count),
        student_accuracy=_share(whole[mine].sum(), count),
        student_accuracy_restricted=_share(restricted[mine].sum(), count),
        accuracy=None if said is None else _share(said.sum(), len(truth)),
        confidence_auroc=None if told.sure is None else _auroc(told.sure, mine),
    )
