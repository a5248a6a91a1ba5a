"""What a site keeps of a calibration, whether its teacher's classes exclude each other or not.

Lives here: the record's common part, how it is told, and fitting once for a teacher and data. Does not live here: what
is fitted and applied (calibrated, multi_calibrated).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from consilience.client.calibration import CalibrationScores
from consilience.client.teacher.private_samples import digest_of
from consilience.common.data import ImageData, open_data
from consilience.common.errors import SettingsError
from consilience.common.files import lock, make_private, write_json
from consilience.common.settings import Settings, SiteSettings

AGAIN = "run `consilience site train`"
MAYBE_SEEN = "not made surer: the teacher may have been trained on these images"
"""Of a teacher that was not trained here nobody knows what it has seen. On its own training images it is right so often
that it seems to be too unsure; on new ones it would then be far too sure."""


class KeptCalibration(Settings, ABC):
    """What was fitted, for which teacher, on what, and how much it helps."""

    teacher: str
    """Fingerprint of the teacher without what was fitted."""
    data_digest: str
    samples: int
    before: CalibrationScores | None
    after: CalibrationScores | None
    note: str
    """Why the answers stay as they are, or why the method is another than the settings asked for."""

    @property
    @abstractmethod
    def how(self) -> str | None:
        """What is applied, in words; None where the answers stay as they are."""

    @property
    def told(self) -> str:
        """The record in one line, for people."""
        note = f" ({self.note})" if self.note else ""
        if self.before is None or self.after is None:
            return f"none{note}"
        on = f"on {self.samples:,} held-out samples"
        if self.how is None:
            return f"none{note}; calibration error {self.before.ece:.3f} {on}"
        return f"{self.how}{note}; calibration error {self.before.ece:.3f} before, {self.after.ece:.3f} after, {on}"


Kept = TypeVar("Kept", bound=KeptCalibration)


def why_none(settings: SiteSettings, found: KeptCalibration | None) -> str:
    """Say in one line why a teacher's answers stay as they are; `found` is a record that is not of this teacher."""
    if settings.calibration == "off":
        return "none (off in the settings)"
    if settings.data is None:
        return "none (the settings name no private data)"
    why = "not looked at yet" if found is None else "it was for another teacher or by another method"
    return f"none ({why}: {AGAIN})"


def fit_once(
    settings: SiteSettings, path: Path, done: Callable[[], Kept | None], make: Callable[[ImageData, str], Kept]
) -> Kept:
    """Return what `make` fits on the private data with this digest, kept at `path`, or `done` if that is of these data.

    Raises `SettingsError` when the settings ask for no calibration or name no data, `DataError`, `TeacherError`,
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
    with lock(path.parent):
        record = done()
        if record is None or record.data_digest != digest:
            record = make(data, digest)
            write_json(path, record.model_dump(mode="json"))
        return record
