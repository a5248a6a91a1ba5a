"""A multi-label teacher whose log-odds are divided by one temperature a label, and where these come from.

Lives here: state/calibration/labels.json, fitting on held-out private images, and the teacher that applies it. Does not
live here: the fitting of one label (client/calibration): a label is there two classes, "applies" and "does not".
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy.special import log_expit

from consilience.client.calibration import SHARPEST, SOFTEST, CalibrationScores, Fitted, fit_calibration
from consilience.client.kept import read_kept
from consilience.client.teacher.kept_calibration import AGAIN, MAYBE_SEEN, KeptCalibration, fit_once, why_none
from consilience.client.teacher.multi import MultiTeacher
from consilience.client.teacher.private_samples import held_out_multi
from consilience.common.data import ImageData
from consilience.common.encoding.odds import bounded
from consilience.common.errors import TeacherError
from consilience.common.files import canonical_json, sha256
from consilience.common.preprocessing import Images
from consilience.common.seeds import derive
from consilience.common.settings import SiteSettings

LEAST_OF_A_KIND = 5
"""Held-out images that a label must apply to, and as many that it must not, for a temperature of its own."""


class MultiCalibrationRecord(KeptCalibration):
    """labels.json. Scores are means over the labels that were looked at."""

    temperatures: tuple[Annotated[float, Field(ge=SHARPEST, le=SOFTEST, allow_inf_nan=False)], ...] | None
    """One a label, 1 where its answers stay as they are; None where all do."""

    @property
    def method(self) -> Literal["identity", "temperature"]:
        """What is applied."""
        return "identity" if self.temperatures is None else "temperature"

    @property
    def how(self) -> str | None:
        """See `KeptCalibration.how`."""
        if self.temperatures is None:
            return None
        return f"temperatures of {min(self.temperatures):.3g} to {max(self.temperatures):.3g}, one a label"


@dataclass(frozen=True)
class CalibratedMulti:
    """A multi-label teacher behind the temperatures of `record`; without any, its answers as they are.

    `told` says in one line how it is calibrated, or why it is not.
    """

    teacher: MultiTeacher
    record: MultiCalibrationRecord | None
    told: str

    @property
    def classes(self) -> tuple[str, ...]:
        """See `MultiTeacher.classes`."""
        return self.teacher.classes

    @property
    def fingerprint(self) -> str:
        """See `MultiTeacher.fingerprint`. With other temperatures it is another teacher."""
        if self.record is None or self.record.temperatures is None:
            return self.teacher.fingerprint
        return sha256(canonical_json({"teacher": self.teacher.fingerprint, "temperatures": self.record.temperatures}))

    def log_odds(self, images: Images) -> NDArray[np.float32]:
        """See `MultiTeacher.log_odds`."""
        rows = self.teacher.log_odds(images)
        if self.record is None or self.record.temperatures is None:
            return rows
        return bounded(rows / np.array(self.record.temperatures)).astype(np.float32)


def behind_temperatures(settings: SiteSettings, teacher: MultiTeacher) -> CalibratedMulti:
    """Put `teacher` behind the temperatures that were fitted for it, if there are any and the settings want them.

    Raises `TeacherError` when labels.json is damaged.
    """
    record = None if settings.calibration == "off" else _read(settings, teacher)
    if record is not None and record.teacher == teacher.fingerprint:
        return CalibratedMulti(teacher, record, record.told)
    return CalibratedMulti(teacher, None, why_none(settings, record))


def fit_temperatures(settings: SiteSettings, teacher: MultiTeacher) -> MultiCalibrationRecord:
    """Fit a temperature for each label of `teacher`, given without any, and keep them; returns at once when done.

    Raises as `fit_once`.
    """

    def done() -> MultiCalibrationRecord | None:
        record = _read(settings, teacher)
        return record if record is not None and record.teacher == teacher.fingerprint else None

    def make(data: ImageData, digest: str) -> MultiCalibrationRecord:
        trained = settings.teacher.kind == "train"
        ids, labels = held_out_multi(settings, data, digest) if trained else _of_teacher(data, teacher)
        rows = [teacher.log_odds(data.read(part)) for part in _batches(ids, settings.batch_size)]
        odds = np.concatenate([np.empty((0, len(teacher.classes)), np.float32), *rows])
        fits = [
            fit_label(odds[:, k], labels[:, k], derive(settings.seed, f"calibration folds {name}"))
            for k, name in enumerate(teacher.classes)
        ]
        held = _together(fits, len(ids), keep=not trained)
        return MultiCalibrationRecord(teacher=teacher.fingerprint, data_digest=digest, **held)

    return fit_once(settings, _path(settings), done, make)


def fit_label(odds: NDArray[np.floating[Any]], truth: NDArray[np.int8], seed: int) -> Fitted:
    """Fit one label's temperature to log-odds (n,) by `truth` (n,): 1 applies, 0 does not, -1 not known."""
    known = truth >= 0
    having = int((truth > 0).sum())
    if min(having, int(known.sum()) - having) < LEAST_OF_A_KIND:
        return Fitted("identity", None, int(known.sum()), None, None, "too few held-out images with, or without, it")
    wide = np.asarray(odds, np.float64)[known]
    rows = np.stack([log_expit(-wide), log_expit(wide)], axis=1)
    return fit_calibration(rows, truth[known].astype(np.int64), "temperature", seed)


def _together(fits: list[Fitted], samples: int, *, keep: bool) -> dict[str, Any]:
    """Return the record's fields of the labels' fits. `keep`: nothing is made surer."""
    temperatures, before, after, kept = [], [], [], False
    for fitted in fits:
        temperature = None if fitted.map is None else fitted.map.temperature
        if keep and temperature is not None and temperature < 1:
            temperature, kept = None, True
        temperatures.append(1.0 if temperature is None else temperature)
        if fitted.before is not None and fitted.after is not None:
            before.append(fitted.before)
            after.append(fitted.before if temperature is None else fitted.after)
    changed = any(temperature != 1 for temperature in temperatures)
    note = MAYBE_SEEN if kept else "" if changed else "no label's answers become better by one"
    return {
        "temperatures": tuple(temperatures) if changed else None,
        "samples": samples if before else 0,
        "before": _mean(before),
        "after": _mean(after),
        "note": note if before else "too few held-out images with and without each label",
    }


def _mean(scores: list[CalibrationScores]) -> CalibrationScores | None:
    if not scores:
        return None
    return CalibrationScores(
        nll=float(np.mean([score.nll for score in scores])), ece=float(np.mean([score.ece for score in scores]))
    )


def _of_teacher(data: ImageData, teacher: MultiTeacher) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
    """Return all ids (n,) of the data, and labels (n, k) in the teacher's order, -1 where the data have no such."""
    many = data.need_many("The private data of a multi-label teacher")
    column = {name: k for k, name in enumerate(data.class_names)}
    labels = np.full((len(data), len(teacher.classes)), -1, np.int8)
    for k, name in enumerate(teacher.classes):
        if name in column:
            labels[:, k] = many[:, column[name]]
    return np.arange(len(data)), labels


def _batches(ids: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    return [ids[first : first + size] for first in range(0, len(ids), size)]


def _path(settings: SiteSettings) -> Path:
    return settings.state / "calibration" / "labels.json"


def _read(settings: SiteSettings, teacher: MultiTeacher) -> MultiCalibrationRecord | None:
    """Return labels.json, or None where there is none."""
    path = _path(settings)
    record = read_kept(path, MultiCalibrationRecord, TeacherError, AGAIN)
    held = None if record is None else record.temperatures
    own = record is not None and record.teacher == teacher.fingerprint
    if own and held is not None and len(held) != len(teacher.classes):
        raise TeacherError(
            f"{path}: it has {len(held)} temperatures; the teacher knows {len(teacher.classes)} labels",
            hint=f"Remove {path}, then {AGAIN}",
        )
    return record
