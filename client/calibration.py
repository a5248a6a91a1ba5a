"""Maps that make a teacher's probabilities as good as they claim to be: temperature scaling and Dirichlet calibration.

Lives here: fitting a map on samples that the teacher was not trained on, applying it, and the scores that tell whether
it helps. Does not live here: which samples these are and where the map is kept (client/teacher/calibrated).

A map is log p' = log_softmax(A log p + b). Temperature scaling (Guo et al., ICML 2017) has A = I / T and b = 0, one
number, and changes no order of classes. Dirichlet calibration (Kull et al., NeurIPS 2019) has a whole A and b, drawn
towards a diagonal and towards 0 (ODIR).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, FiniteFloat, model_validator

from consilience.common.settings import Settings

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Method = Literal["temperature", "dirichlet"]

BINS = 15
"""Equal-width bins of the expected calibration error."""
FOLDS = 5
LEAST_LOG_PROB = float(np.log(np.finfo(np.float32).tiny))
"""What a smaller log-probability is taken for, about -87.3: where a teacher says 0 there is nothing to scale."""
LEAST_SAMPLES = 20
"""One number is fitted on 16 of them at least, and 4 score it. It is shared by all classes, so none needs its own."""
LEAST_OF_A_CLASS = 20
"""Dirichlet calibration fits a row of A for each class: 16 samples of it are left for a fit beside a fold."""
MOST_CLASSES = 200
"""Dirichlet calibration keeps a number for each pair of classes."""
SHARPEST, SOFTEST = 1 / 20, 20.0
"""Temperatures in between are looked at."""


class CalibrationMap(Settings):
    """log p' = log_softmax(A max(log p, `LEAST_LOG_PROB`) + b): `temperature` is A = I / T, else `matrix` is A."""

    temperature: float | None = Field(default=None, ge=SHARPEST, le=SOFTEST, allow_inf_nan=False)
    matrix: tuple[tuple[FiniteFloat, ...], ...] = ()
    intercept: tuple[FiniteFloat, ...] = ()

    @model_validator(mode="after")
    def _one_of_them(self) -> CalibrationMap:
        shape = {len(self.intercept), *map(len, self.matrix), len(self.matrix)}
        if shape != {0} if self.temperature is not None else len(shape) != 1 or shape == {0}:
            raise ValueError("a map is a temperature, or a square matrix and an intercept of its size")
        return self

    def apply(self, log_probs: NDArray[np.floating[Any]]) -> Floats:
        """Return (n, K) float64 log-probabilities for (n, K) log-probabilities, each row by itself."""
        clipped = np.maximum(np.asarray(log_probs, np.float64), LEAST_LOG_PROB)
        if self.temperature is not None:
            return log_softmax(clipped / self.temperature)
        # Not a matrix product of BLAS: its rounding depends on how many rows there are.
        scores: Floats = np.einsum("nk,jk->nj", clipped, np.array(self.matrix, np.float64))
        return log_softmax(scores + np.array(self.intercept))


class CalibrationScores(Settings):
    """How good probabilities are: mean negative log-likelihood in nats, expected calibration error in [0, 1]."""

    nll: float
    ece: float


@dataclass(frozen=True)
class Fitted:
    """What came of fitting. `map` is None where the answers stay as they are; `note` says why, or why another method.

    `before` and `after` score the same samples; `after` by maps fitted without the sample that they score, and equal
    to `before` where the answers stay as they are. Both are None where nothing was fitted.
    """

    method: Literal["identity", "temperature", "dirichlet"]
    map: CalibrationMap | None
    samples: int
    before: CalibrationScores | None
    after: CalibrationScores | None
    note: str


def fit_calibration(log_probs: NDArray[np.floating[Any]], labels: Ints, method: Method, seed: int) -> Fitted:
    """Fit a map to (n, K) finite log-probabilities of samples with the true labels (n,) in [0, K).

    The map is fitted on all samples. Whether it helps is measured by cross-fitting: in each of `FOLDS` parts, every
    class in all of them as evenly as may be, by a map fitted on the others. Where `method` is dirichlet and does no
    better than a temperature, it is a temperature. Where the negative log-likelihood does not become
    smaller, where the samples are too few, and where no temperature above `SHARPEST` fits them best, nothing changes.
    """
    n, classes = log_probs.shape
    if classes == 1:
        return Fitted("identity", None, n, None, None, "the teacher knows one class only")
    if n < LEAST_SAMPLES:
        return Fitted("identity", None, n, None, None, f"too few held-out samples: {n}; {LEAST_SAMPLES} are needed")
    rows, before = np.asarray(log_probs, np.float64), scores_of(log_probs, labels)
    if best_temperature(np.maximum(rows, LEAST_LOG_PROB), labels) <= SHARPEST:
        # The teacher is right on all of them, or nearly: the likelihood has no best temperature.
        why = f"the teacher makes too few mistakes on the samples: no temperature above {SHARPEST:g} fits them best"
        return Fitted("identity", None, n, before, before, why)
    note = _no_dirichlet(labels, classes) if method == "dirichlet" else ""
    candidates: tuple[Method, ...] = ("temperature",) if note else tuple(dict.fromkeys(("temperature", method)))
    folds = _folds(labels, seed)
    afters = {name: scores_of(_crossed(name, rows, labels, folds), labels) for name in candidates}
    best = min(afters, key=lambda name: afters[name].nll)
    if not afters[best].nll < before.nll:
        why = f"no {' or '.join(candidates)} map gives a better likelihood"
        return Fitted("identity", None, n, before, before, why)
    if best != method and not note:
        note = "temperature instead of dirichlet, which gives no better likelihood"
    return Fitted(best, _fit(best, rows, labels), n, before, afters[best], note)


def scores_of(log_probs: NDArray[np.floating[Any]], labels: Ints) -> CalibrationScores:
    """Score (n, K) log-probabilities, those below `LEAST_LOG_PROB` as that, against labels (n,), n >= 1.

    With B_b the samples whose largest probability lies in ((b - 1) / 15, b / 15], b = 1..15, the expected calibration
    error is the sum over b of |B_b| / n · | share of B_b that is right - mean largest probability in B_b |.
    """
    rows = np.maximum(np.asarray(log_probs, np.float64), LEAST_LOG_PROB)
    top = np.minimum(np.exp(rows.max(axis=1)), 1.0)
    right = rows.argmax(axis=1) == labels
    at = np.clip(np.ceil(top * BINS).astype(np.int64) - 1, 0, BINS - 1)
    gaps = np.bincount(at, weights=right - top, minlength=BINS)
    nll = -rows[np.arange(len(rows)), labels].mean()
    return CalibrationScores(nll=float(max(nll, 0.0)), ece=float(np.abs(gaps).sum() / len(rows)))


def log_softmax(scores: Floats) -> Floats:
    """Return the log of the softmax of each row of (n, K) finite scores."""
    shifted = scores - scores.max(axis=1, keepdims=True)
    log_probs: Floats = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return log_probs


def best_temperature(log_probs: Floats, labels: Ints) -> float:
    """Return the temperature in [`SHARPEST`, `SOFTEST`] with the smallest negative log-likelihood.

    That is convex in s = 1 / T: its slope has one root at most, found by Newton steps that never leave the bracket.
    """
    true = log_probs[np.arange(len(labels)), labels]

    def slope(s: float) -> tuple[float, float]:
        probs = np.exp(log_softmax(s * log_probs))
        mean = (probs * log_probs).sum(axis=1)
        curvature = (probs * (log_probs - mean[:, None]) ** 2).sum(axis=1)
        return float((mean - true).mean()), float(curvature.mean())

    low, high = 1 / SOFTEST, 1 / SHARPEST
    if slope(low)[0] >= 0:
        return SOFTEST
    if slope(high)[0] <= 0:
        return SHARPEST
    s = 1.0
    for _ in range(100):
        first, second = slope(s)
        low, high = (s, high) if first < 0 else (low, s)
        step = s - first / second if second > 0 else low
        new = step if low < step < high else (low + high) / 2
        if abs(new - s) <= 1e-12 * s:
            break
        s = new
    return 1 / s


def best_dirichlet(log_probs: Floats, labels: Ints) -> CalibrationMap:
    """Return the map with the smallest negative log-likelihood and ODIR penalty: convex, by L-BFGS from a temperature.

    The penalty is that of normal priors, so that it loses weight as samples are added: around 0 for A beside its
    diagonal, with standard deviation 1 / (3 sqrt(K)), so that a row's K - 1 weights together sway a score about as much
    whatever K is; around 0 for b and around 1 / T for the diagonal, with standard deviation 1.
    """
    import torch  # two seconds, which those who apply a map or fit a temperature do without
    import torch.nn.functional as F

    from consilience.common.nets.optimizers import plain

    n, classes = log_probs.shape
    x, y = torch.from_numpy(log_probs), torch.from_numpy(labels)
    eye = torch.eye(classes, dtype=torch.float64)
    start = eye / best_temperature(log_probs, labels)
    precision = eye + (1 - eye) * 9 * classes
    matrix = start.clone().requires_grad_()
    intercept = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimizer = plain(torch.optim.LBFGS)(
        [matrix, intercept],
        max_iter=500,
        tolerance_grad=1e-7,
        tolerance_change=1e-11,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        optimizer.zero_grad()
        fit = F.cross_entropy(x @ matrix.T + intercept, y)
        penalty = (precision * (matrix - start) ** 2).sum() + (intercept**2).sum()
        value = fit + penalty / (2 * n)
        torch.autograd.backward(value)
        return float(value.detach())

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return CalibrationMap(
        matrix=tuple(tuple(row) for row in matrix.detach().tolist()), intercept=tuple(intercept.detach().tolist())
    )


def _fit(method: Method, rows: Floats, labels: Ints) -> CalibrationMap:
    clipped = np.maximum(rows, LEAST_LOG_PROB)
    if method == "temperature":
        return CalibrationMap(temperature=best_temperature(clipped, labels))
    return best_dirichlet(clipped, labels)


def _crossed(method: Method, rows: Floats, labels: Ints, folds: Ints) -> Floats:
    """Return each sample's row through a map that was fitted on the other folds."""
    out = np.empty_like(rows)
    for fold in range(FOLDS):
        scored = folds == fold
        out[scored] = _fit(method, rows[~scored], labels[~scored]).apply(rows[scored])
    return out


def _no_dirichlet(labels: Ints, classes: int) -> str:
    """Say why there is no Dirichlet calibration; empty where there is."""
    fewest = int(np.bincount(labels, minlength=classes).min())
    if classes > MOST_CLASSES:
        return f"temperature instead of dirichlet, which takes {MOST_CLASSES} classes at most, not {classes:,}"
    if fewest < LEAST_OF_A_CLASS:
        return (
            f"temperature instead of dirichlet, which needs {LEAST_OF_A_CLASS} held-out samples of every class; "
            f"of one there are {fewest}"
        )
    return ""


def _folds(labels: Ints, seed: int) -> Ints:
    """Return (n,) the part in which each sample is scored."""
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    order = shuffled[np.argsort(labels[shuffled], kind="stable")]
    folds = np.empty(len(labels), np.int64)
    folds[order] = np.arange(len(labels)) % FOLDS
    return folds
