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

from consilience.client.calibration import (
    LEAST_SAMPLES,
    CalibrationMap,
    CalibrationScores,
    Fitted,
    Method,
    fit_calibration,
)
from consilience.client.kept import read_kept
from consilience.client.teacher.protocol import Teacher
from consilience.client.teacher.trained import digest_of, held_out
from consilience.common.data import ImageData, open_data
from consilience.common.errors import SettingsError, TeacherError
from consilience.common.files import canonical_json, lock, make_private, sha256, write_json
from consilience.common.nets.seeding import derive
from consilience.common.preprocessing import Images
from consilience.common.settings import Settings, SiteSettings

MOST_CELLS = 2_000_000
"""Samples times classes that a map is fitted on: of more samples a part, drawn by the seed, is enough."""
_AGAIN = "run `consilience site train`"


MAYBE_SEEN = "not made surer: the teacher may have been trained on these images"
"""Of a teacher that was not trained here nobody knows what it has seen. On its own training images it is right so often
that it seems to be too unsure; on new ones it would then be far too sure."""


class CalibrationRecord(Settings):
    """calibration.json: what was fitted, for which teacher, on what, and how much it helps."""

    asked: Method
    """What the settings asked for."""
    teacher: str
    """Fingerprint of the teacher without the map."""
    data_digest: str
    method: Literal["identity", "temperature", "dirichlet"]
    """What is applied; identity: the answers stay as they are."""
    map: CalibrationMap | None
    samples: int
    before: CalibrationScores | None
    after: CalibrationScores | None
    note: str
    """Why the answers stay as they are, or why the method is another than the settings asked for."""

    @property
    def told(self) -> str:
        """The record in one line, for people."""
        note = f" ({self.note})" if self.note else ""
        if self.before is None or self.after is None:
            return f"none{note}"
        on = f"on {self.samples:,} held-out samples"
        if self.map is None:
            return f"none{note}; calibration error {self.before.ece:.3f} {on}"
        how = f"temperature {self.map.temperature:.3g}" if self.map.temperature is not None else self.method
        return f"{how}{note}; calibration error {self.before.ece:.3f} before, {self.after.ece:.3f} after, {on}"


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
    if settings.calibration == "off":
        return CalibratedTeacher(teacher, None, "none (off in the settings)")
    record = _read(settings, teacher)
    if record is not None and _fits(record, settings, teacher):
        return CalibratedTeacher(teacher, record, record.told)
    if settings.data is None:
        return CalibratedTeacher(teacher, None, "none (the settings name no private data)")
    why = "not looked at yet" if record is None else "it was for another teacher or by another method"
    return CalibratedTeacher(teacher, None, f"none ({why}: {_AGAIN})")


def fit(settings: SiteSettings, teacher: Teacher) -> CalibrationRecord:
    """Fit the map of `teacher`, given without one, and keep it; returns at once when that was done.

    A trained teacher's map is fitted on the samples that its training held out, a hosted one's on all private data of
    its classes. Raises `SettingsError` when the settings ask for none or name no data, `DataError`, `TeacherError`,
    `StorageError`, and `RunError` when another process is at it.
    """
    if settings.calibration == "off" or settings.data is None:
        field, value = ("calibration", "off") if settings.calibration == "off" else ("data", "not given")
        raise SettingsError(
            f"{settings.name}: field {field!r} is {value}, so there is nothing to calibrate",
            hint="Set calibration to temperature, and data to private images that the teacher was not trained on",
        )
    data = open_data(settings.data)
    digest = digest_of(data)
    make_private(settings.state)
    with lock(_folder(settings)):
        done = _read(settings, teacher)
        if done is not None and _fits(done, settings, teacher) and done.data_digest == digest:
            return done
        ids, labels, why = _held_out(settings, teacher, data, digest)
        if not why:
            fitted = fit_on(settings, teacher, settings.calibration, data, ids, labels)
            held: dict[str, Any] = dict(vars(fitted))
            temperature = None if fitted.map is None else fitted.map.temperature
            if settings.teacher.kind != "train" and temperature is not None and temperature < 1:
                held |= {"method": "identity", "map": None, "after": fitted.before, "note": MAYBE_SEEN}
        else:
            held = {"method": "identity", "map": None, "samples": 0, "before": None, "after": None, "note": why}
        record = CalibrationRecord(asked=settings.calibration, teacher=teacher.fingerprint, data_digest=digest, **held)
        write_json(_path(settings), record.model_dump(mode="json"))
        return record


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


def _folder(settings: SiteSettings) -> Path:
    return settings.state / "calibration"


def _path(settings: SiteSettings) -> Path:
    return _folder(settings) / "calibration.json"


def _read(settings: SiteSettings, teacher: Teacher) -> CalibrationRecord | None:
    """Return calibration.json, or None where there is none."""
    path = _path(settings)
    record = read_kept(path, CalibrationRecord, TeacherError, _AGAIN)
    size = len(record.map.intercept) if record is not None and record.map is not None else 0
    if record is not None and size and record.teacher == teacher.fingerprint and size != len(teacher.classes):
        raise TeacherError(
            f"{path}: its map is for {size} classes; the teacher knows {len(teacher.classes)}",
            hint=f"Remove {path}, then {_AGAIN}",
        )
    return record
