"""A teacher whose answers go through a calibration map, and where the map comes from.

Lives here: the held-out private samples that a map is fitted on, state/calibration/calibration.json, and the teacher
that applies it. Does not live here: the fitting (client/calibration).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from consilience.client.calibration import LEAST_SAMPLES, CalibrationMap, Fitted, Method, fit_calibration
from consilience.client.kept import read_kept
from consilience.client.teacher.kept_calibration import AGAIN, MAYBE_SEEN, KeptCalibration, fit_once, why_none
from consilience.client.teacher.private_samples import held_out
from consilience.client.teacher.protocol import Teacher
from consilience.common.data import ImageData
from consilience.common.errors import TeacherError
from consilience.common.files import canonical_json, sha256
from consilience.common.preprocessing import Images
from consilience.common.seeds import derive
from consilience.common.settings import SiteSettings

MOST_CELLS = 2_000_000
"""Samples times classes that a map is fitted on: of more samples a part, drawn by the seed, is enough."""


class CalibrationRecord(KeptCalibration):
    """calibration.json. `asked` is what the settings asked for, `method` what is applied; identity: nothing."""

    asked: Method
    method: Literal["identity", "temperature", "dirichlet"]
    map: CalibrationMap | None

    @property
    def how(self) -> str | None:
        """See `KeptCalibration.how`."""
        if self.map is None:
            return None
        return f"temperature {self.map.temperature:.3g}" if self.map.temperature is not None else self.method


@dataclass(frozen=True)
class CalibratedTeacher:
    """A teacher behind the map of `record`; without a record, or with one that has no map, its answers as they are.

    `told` says in one line how it is calibrated, or why it is not.
    """

    teacher: Teacher
    record: CalibrationRecord | None
    told: str

    @property
    def classes(self) -> tuple[str, ...]:
        """See `Teacher.classes`."""
        return self.teacher.classes

    @property
    def fingerprint(self) -> str:
        """See `Teacher.fingerprint`. With another map it is another teacher; without one, the teacher's own."""
        if self.record is None or self.record.map is None:
            return self.teacher.fingerprint
        held = {"teacher": self.teacher.fingerprint, "calibration": self.record.map.model_dump(mode="json")}
        return sha256(canonical_json(held))

    def log_probs(self, images: Images) -> NDArray[np.float32]:
        """See `Teacher.log_probs`."""
        rows = self.teacher.log_probs(images)
        if self.record is None or self.record.map is None or not len(rows):
            return rows
        narrow: NDArray[np.float32] = self.record.map.apply(rows).astype(np.float32)
        return narrow


def behind_map(settings: SiteSettings, teacher: Teacher) -> CalibratedTeacher:
    """Put `teacher` behind the map that was fitted for it, if there is one and the settings want it.

    Raises `TeacherError` when calibration.json is damaged.
    """
    record = None if settings.calibration == "off" else _read(settings, teacher)
    if record is not None and _fits(record, settings, teacher):
        return CalibratedTeacher(teacher, record, record.told)
    return CalibratedTeacher(teacher, None, why_none(settings, record))


def fit(settings: SiteSettings, teacher: Teacher) -> CalibrationRecord:
    """Fit the map of `teacher`, given without one, and keep it; returns at once when that was done.

    A trained teacher's map is fitted on the samples that its training held out, a hosted one's on all private data of
    its classes. Raises as `fit_once`.
    """

    def done() -> CalibrationRecord | None:
        record = _read(settings, teacher)
        return record if record is not None and _fits(record, settings, teacher) else None

    def make(data: ImageData, digest: str) -> CalibrationRecord:
        method: Method = "dirichlet" if settings.calibration == "dirichlet" else "temperature"
        ids, labels, why = _held_out(settings, teacher, data, digest)
        if not why:
            fitted = fit_on(settings, teacher, method, data, ids, labels)
            held: dict[str, Any] = dict(vars(fitted))
            temperature = None if fitted.map is None else fitted.map.temperature
            if settings.teacher.kind != "train" and temperature is not None and temperature < 1:
                held |= {"method": "identity", "map": None, "after": fitted.before, "note": MAYBE_SEEN}
        else:
            held = {"method": "identity", "map": None, "samples": 0, "before": None, "after": None, "note": why}
        return CalibrationRecord(asked=method, teacher=teacher.fingerprint, data_digest=digest, **held)

    return fit_once(settings, _path(settings), done, make)


def fit_on(
    settings: SiteSettings,
    teacher: Teacher,
    method: Method,
    data: ImageData,
    ids: NDArray[np.int64],
    labels: NDArray[np.int64],
) -> Fitted:
    """Fit a map of `teacher`, given without one, on the samples `ids` (n,) of the data with these labels (n,).

    Of more samples than `MOST_CELLS` allows on a part. Keeps nothing.
    """
    ids, labels = _some(ids, labels, len(teacher.classes), derive(settings.seed, "calibration samples"))
    rows = _score(teacher, data, ids, settings.batch_size)
    return fit_calibration(rows, labels, method, derive(settings.seed, "calibration folds"))


def _held_out(
    settings: SiteSettings, teacher: Teacher, data: ImageData, digest: str
) -> tuple[NDArray[np.int64], NDArray[np.int64], str]:
    """Return ids (n,) of samples that the teacher was not trained on, their labels (n,) in its order, or why not."""
    none = np.empty(0, np.int64)
    if settings.teacher.kind == "train":
        return *held_out(settings, data, digest), ""
    if data.labels is None:
        return none, none, "the private data have no labels"
    missing = [name for name in teacher.classes if name not in data.class_names]
    if missing:
        return none, none, f"the private data have no class {missing[0]!r}, which the teacher knows"
    number = {name: k for k, name in enumerate(teacher.classes)}
    numbered = np.array([number.get(name, -1) for name in data.class_names], np.int64)[data.labels]
    known = np.flatnonzero(numbered >= 0)
    return known, numbered[known], ""


def _some(
    ids: NDArray[np.int64], labels: NDArray[np.int64], classes: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return as many of the samples as `MOST_CELLS` allows."""
    most = max(LEAST_SAMPLES, MOST_CELLS // classes)
    if len(ids) <= most:
        return ids, labels
    chosen = np.sort(np.random.default_rng(seed).permutation(len(ids))[:most])
    return ids[chosen], labels[chosen]


def _score(teacher: Teacher, data: ImageData, ids: NDArray[np.int64], batch: int) -> NDArray[np.float32]:
    """Return (len(ids), K) log-probabilities."""
    rows = np.empty((len(ids), len(teacher.classes)), np.float32)
    for first in range(0, len(ids), batch):
        part = slice(first, first + batch)
        rows[part] = teacher.log_probs(data.read(ids[part]))
    return rows


def _fits(record: CalibrationRecord, settings: SiteSettings, teacher: Teacher) -> bool:
    return (record.asked, record.teacher) == (settings.calibration, teacher.fingerprint)


def _path(settings: SiteSettings) -> Path:
    return settings.state / "calibration" / "calibration.json"


def _read(settings: SiteSettings, teacher: Teacher) -> CalibrationRecord | None:
    """Return calibration.json, or None where there is none."""
    path = _path(settings)
    record = read_kept(path, CalibrationRecord, TeacherError, AGAIN)
    size = len(record.map.intercept) if record is not None and record.map is not None else 0
    if record is not None and size and record.teacher == teacher.fingerprint and size != len(teacher.classes):
        raise TeacherError(
            f"{path}: its map is for {size} classes; the teacher knows {len(teacher.classes)}",
            hint=f"Remove {path}, then {AGAIN}",
        )
    return record
