"""How good a multi-label student is, and how good what it was made from was: pure functions on arrays.

Lives here: average precision label by label and on average, for the student and the baselines. Does not live here:
where the arrays come from (server/publishing_multi), how results are told (server/report_multi), students of one label
an image (server/judge). Test labels come in here and nowhere else; nothing here feeds a choice.

A contender that says nothing of a label scores all images alike there: its average precision is then the share of
images to which the label applies, which is what chance comes to.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit

from consilience.common.label_scores import average_precisions, mean_ap
from consilience.common.labels import LabelSpace
from consilience.server.judge import Bin, reliability

Floats = NDArray[np.float64]
Truth = NDArray[np.int8]
Precisions = list[float | None]

MULTI_BASELINES = ("naive", "best_site", "unified_ensemble", "oracle")
"""Names of the baselines, in the order in which they are told."""


@dataclass(frozen=True)
class LabelScore:
    """One label: `known` test images say whether it applies, to `support` of them it does. None where it is unknown."""

    name: str
    known: int
    support: int
    student: float | None
    unified_ensemble: float | None
    naive: float | None
    oracle: float | None


@dataclass(frozen=True)
class LabelSite:
    """One site on the labels that it knows: mean average precision of its own answers, and of the student.

    `accuracy`: the share of its labels and images that its answers are on the right side of. None where nothing can be
    said, as where the site did not answer.
    """

    name: str
    teacher: float | None
    student: float | None
    accuracy: float | None


@dataclass(frozen=True)
class LabelJudgement:
    """Everything the test set tells about a multi-label run; scores are means of average precision over labels.

    Labels of the test data that no site knows are not judged. `calibration_error` and `reliability` compare the
    student's probabilities, of all labels together, with how often they apply.
    """

    count: int
    student: float | None
    baselines: dict[str, float | None]
    best_site: str | None
    labels: tuple[LabelScore, ...]
    calibration_error: float | None
    reliability: tuple[Bin, ...]
    sites: tuple[LabelSite, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings, sequences and None, fit for JSON: no NaN."""
        return asdict(self)


def judge_labels(
    truth: Truth,
    space: LabelSpace,
    answers: Sequence[ArrayLike | None],
    unified: ArrayLike | None,
    student: ArrayLike,
    oracle: ArrayLike | None,
) -> LabelJudgement:
    """Judge the student and the baselines on one test set of m images and L labels.

    `truth` (m, L) int8: 1 applies, 0 does not, -1 not known. `answers[i]` (m, k_i): site i's log-odds in the order of
    `space.class_sets[i]`; None where the site did not answer. `unified` (m, L): probabilities, NaN for labels that
    nobody told. `student`, `oracle` (m, L): log-probabilities of each label by itself.

    Raises `ValueError`: an empty test set, a shape that does not fit, a value that is no label, or NaN.
    """
    m, width = len(truth), len(space)
    if truth.shape != (m, width) or not m or not np.isin(truth, (-1, 0, 1)).all():
        raise ValueError(f"truth has shape {truth.shape}; wanted (m, {width}) of 1, 0 and -1, m >= 1")
    if len(answers) != len(space.sites):
        raise ValueError(f"{len(answers)} sites' answers for {len(space.sites)} sites")
    odds = [
        None if a is None else _matrix(a, m, len(classes), f"answers of {site}")
        for a, classes, site in zip(answers, space.class_sets, space.sites, strict=True)
    ]
    probs = np.exp(_matrix(student, m, width, "student"))
    told: dict[str, Precisions] = {"student": average_precisions(truth, probs)}
    told["naive"] = _none(width) if all(a is None for a in odds) else average_precisions(truth, _naive(space, odds, m))
    told["unified_ensemble"] = _none(width)
    if unified is not None:
        held = np.asarray(unified, np.float64)
        told["unified_ensemble"] = average_precisions(truth, _matrix(np.nan_to_num(held), m, width, "unified"))
    told["oracle"] = _none(width) if oracle is None else average_precisions(truth, _matrix(oracle, m, width, "oracle"))
    alone = {i: mean_ap(average_precisions(truth, _alone(space, i, a))) for i, a in enumerate(odds) if a is not None}
    best = min(
        (i for i, value in alone.items() if value is not None),
        key=lambda i: (-(alone[i] or 0.0), space.sites[i]),
        default=None,
    )
    known = truth >= 0
    error, bins = reliability(probs[known], truth[known] > 0) if known.any() else (None, ())
    return LabelJudgement(
        count=m,
        student=mean_ap(told["student"]),
        baselines={
            name: (None if best is None else alone[best]) if name == "best_site" else mean_ap(told[name])
            for name in MULTI_BASELINES
        },
        best_site=None if best is None else space.sites[best],
        labels=tuple(
            LabelScore(
                name=name,
                known=int(known[:, k].sum()),
                support=int((truth[:, k] > 0).sum()),
                **{who: told[who][k] for who in ("student", "unified_ensemble", "naive", "oracle")},
            )
            for k, name in enumerate(space.names)
        ),
        calibration_error=error,
        reliability=bins,
        sites=tuple(
            _site(site, truth[:, list(classes)], a, [told["student"][k] for k in classes])
            for site, classes, a in zip(space.sites, space.class_sets, odds, strict=True)
        ),
    )


def label_agreement(blocks: Iterable[Sequence[ArrayLike | None]], space: LabelSpace) -> Floats:
    """Return how often sites agree about the pool: (N, N) float64, symmetric.

    Entry (i, j) is the share of samples and labels that both know for which both take the label for likelier than not,
    or both do not; NaN on the diagonal, for pairs that share no label, and where there was no sample to compare.
    `blocks` yields, in turn, one (b, k_i) array of log-odds a site (None where it has none); one pass, nothing kept.
    """
    n = len(space.sites)
    columns = {}
    for i in range(n):
        for j in range(i + 1, n):
            if shared := space.shared(i, j):
                own, other = space.class_sets[i], space.class_sets[j]
                columns[i, j] = [own.index(c) for c in shared], [other.index(c) for c in shared]
    same, seen = np.zeros((n, n)), np.zeros((n, n))
    for block in blocks:
        yes = [None if a is None else np.asarray(a) > 0 for a in block]
        for (i, j), (left, right) in columns.items():
            a, b = yes[i], yes[j]
            if a is not None and b is not None:
                same[i, j] += np.count_nonzero(a[:, left] == b[:, right])
                seen[i, j] += len(a) * len(left)
    same, seen = same + same.T, seen + seen.T
    return np.asarray(np.divide(same, seen, out=np.full((n, n), np.nan), where=seen > 0))


def _none(width: int) -> Precisions:
    return [None] * width


def _matrix(values: ArrayLike, rows: int, columns: int, what: str) -> Floats:
    array = np.asarray(values, np.float64)
    if array.shape != (rows, columns):
        raise ValueError(f"{what}: shape {array.shape}; wanted {(rows, columns)}")
    if np.isnan(array).any():
        raise ValueError(f"{what}: NaN")
    return array


def _naive(space: LabelSpace, odds: Sequence[Floats | None], m: int) -> Floats:
    """Return (m, L): the mean of the probabilities that a label's owners give it, 0 where nobody answered.

    Sites are added up in the order of their names, so that theirs here makes no difference.
    """
    summed, owners = np.zeros((m, len(space))), np.zeros(len(space))
    for site in sorted(range(len(odds)), key=lambda i: space.sites[i]):
        if (rows := odds[site]) is not None:
            classes = list(space.class_sets[site])
            summed[:, classes] += expit(rows)
            owners[classes] += 1
    return summed / np.maximum(owners, 1)


def _alone(space: LabelSpace, site: int, odds: Floats) -> Floats:
    """Return (m, L): what one site says of all labels, 0 for those that it does not know."""
    out = np.zeros((len(odds), len(space)))
    out[:, list(space.class_sets[site])] = expit(odds)
    return out


def _site(name: str, truth: Truth, odds: Floats | None, student: Precisions) -> LabelSite:
    own = None if odds is None else mean_ap(average_precisions(truth, odds))
    known = truth >= 0
    right = None if odds is None or not known.any() else float(((odds > 0) == (truth > 0))[known].mean())
    return LabelSite(name, own, mean_ap(student), right)
