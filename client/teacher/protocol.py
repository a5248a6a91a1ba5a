"""What a teacher is, and the one check that every teacher's scores go through.

Lives here: the Teacher protocol, the check, and the teacher that wraps a scoring function. Does not live here: how a
scoring function comes out of a file (one module per kind) and training (trained).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from consilience.common.errors import TeacherError
from consilience.common.files import canonical_json, sha256
from consilience.common.installed import brief as brief
from consilience.common.preprocessing import Images

Outputs = Literal["logits", "probabilities"]

Scores = Callable[[Images], Any]
"""(n, H, W, C) uint8 images, n >= 1 -> (n, classes) floating scores, as an array or what becomes one."""

SMALLEST_LOG_PROB = float(np.log(np.finfo(np.float32).tiny))
"""What a probability of exactly 0 becomes: the log of the smallest normal float32, about -87.3."""

SUM_TOLERANCE = 1e-3
"""How far from 1 a row of probabilities may sum."""


class Teacher(Protocol):
    """A site's private classifier, whatever it is made of."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes it knows, in the order of its answers."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 in hexadecimal of all that decides an answer.

        That is the kind, the class names, the preprocessing, the other settings of the teacher except its path, and
        the bytes of the model file and of the files it refers to. For a callable it is its qualified name and the
        version of the package it comes from (or the module's source, where no package brings it) instead of bytes:
        raise the version when the callable answers differently.
        """
        ...

    def log_probs(self, images: Images) -> NDArray[np.float32]:
        """Return (n, len(classes)) float32 log-probabilities for (n, H, W, C) uint8; every row's logsumexp is 0.

        All n images are scored at once: the caller cuts the batches. Raises `TeacherError`.
        """
        ...


@dataclass(frozen=True)
class Scoring:
    """A function that preprocesses and scores, of any kind of teacher. `where` names file or callable in errors."""

    classes: tuple[str, ...]
    fingerprint: str
    outputs: Outputs
    where: str
    scores: Scores

    def scored(self, images: Images) -> Any:
        """Return what the function gives for (n, H, W, C) uint8, unchecked; None if n is 0. Raises `TeacherError`."""
        if images.ndim != 4 or images.dtype != np.uint8:
            raise TeacherError(
                f"{self.where}: asked about {images.dtype} images of shape {images.shape}; expected (n, H, W, C) uint8"
            )
        if len(images) == 0:
            return None
        try:
            return self.scores(images)
        except Exception as error:  # a stranger's model may raise anything
            raise TeacherError(
                f"{self.where}: failed on {len(images)} images of shape {images.shape[1:]}: {brief(error)}",
                hint="Compare preprocessing.size and preprocessing.channels with what the model expects",
            ) from error


@dataclass(frozen=True)
class ScoringTeacher(Scoring):
    """A teacher made of a function that preprocesses and scores."""

    def log_probs(self, images: Images) -> NDArray[np.float32]:
        """See `Teacher.log_probs`."""
        scores = self.scored(images)
        if scores is None:
            return np.empty((0, len(self.classes)), np.float32)
        return checked(scores, rows=len(images), classes=self.classes, outputs=self.outputs, where=self.where)


def checked(scores: Any, *, rows: int, classes: Sequence[str], outputs: Outputs, where: str) -> NDArray[np.float32]:
    """Return (rows, len(classes)) float32 log-probabilities, or raise `TeacherError` saying what is wrong, and where.

    Logits may be any finite floats. Probabilities must not be negative and must sum to 1 within `SUM_TOLERANCE`; they
    are normalised, and one of exactly 0 becomes `SMALLEST_LOG_PROB`, so that nothing here is ever -inf.
    """
    wide = finite(scores, rows=rows, classes=classes, where=where)
    if outputs == "probabilities":
        refuse_values(wide < 0, wide, where, "probabilities of at least 0")
        sums = wide.sum(axis=1, keepdims=True)
        wrong = np.flatnonzero(np.abs(sums - 1) > SUM_TOLERANCE)
        if len(wrong):
            raise TeacherError(
                f"{where}: probabilities in row {wrong[0]} of the batch sum to {sums[wrong[0], 0]:.6g}; "
                f"expected 1 within {SUM_TOLERANCE:g}",
                hint="Set teacher.outputs to logits if the model gives logits, or teacher.labels to multi if its "
                "labels do not exclude one another",
            )
        log_probs = np.log(np.maximum(wide / sums, np.finfo(np.float32).tiny))
    else:
        shifted = wide - wide.max(axis=1, keepdims=True)
        log_probs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        # float64 logits can lie further apart than float32 reaches: stay finite.
        log_probs = np.maximum(log_probs, np.finfo(np.float32).min)
    narrow: NDArray[np.float32] = log_probs.astype(np.float32)
    return narrow


def finite(scores: Any, *, rows: int, classes: Sequence[str], where: str) -> NDArray[np.float64]:
    """Return scores as (rows, len(classes)) finite float64, or raise `TeacherError` saying what is wrong, and where."""
    values = np.asarray(scores)
    expected = (rows, len(classes))
    if values.shape != expected:
        raise TeacherError(
            f"{where}: gave scores of shape {values.shape} for {rows} images; "
            f"expected {expected}, one column for each of: {_some(classes)}",
            hint="Let teacher.classes name every output of the model, in its order",
        )
    if values.dtype.kind != "f":
        raise TeacherError(f"{where}: gave scores of type {values.dtype}; expected floating point")
    wide = values.astype(np.float64)
    refuse_values(~np.isfinite(wide), wide, where, "finite scores")
    return wide


def refuse_values(wrong: NDArray[np.bool_], values: NDArray[np.float64], where: str, expected: str) -> None:
    """Raise `TeacherError` for the first value that is marked wrong."""
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise TeacherError(
            f"{where}: score {values[row, column]:g} in row {row} of the batch, column {column}; expected {expected}",
            hint="Try the model on a few images outside Consilience",
        )


def fingerprint_of(parts: dict[str, Any], model: str) -> str:
    """Return the fingerprint for settings as JSON values and the digest (or name) of the model itself."""
    return sha256(canonical_json({"settings": parts, "model": model}))


def read_model(path: Path) -> bytes:
    """Return the bytes of a model file. They are read once: what is hashed is what is loaded. Raises `TeacherError`."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise TeacherError(f"{path}: no such file", hint="Correct teacher.path in the site's settings") from None
    except OSError as error:
        raise TeacherError(
            f"{path}: cannot be read: {error.strerror}", hint="Correct teacher.path in the site's settings"
        ) from error


def refuse(where: str | Path, found: str, hint: str) -> NoReturn:
    """Raise the `TeacherError` for a file that would do more than be a model."""
    raise TeacherError(f"{where}: refused, because it holds {found}", hint=hint)


def _some(classes: Sequence[str]) -> str:
    return ", ".join(classes[:8]) + (f" and {len(classes) - 8} more" if len(classes) > 8 else "")
