"""RUN/asking.json: when asking began, and how it ended, so that a server that is killed does not begin it anew.

Does not live here: asking (server/asking), what was answered (server/answers).
"""

from __future__ import annotations

import time
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from consilience.common.files import read_json, write_json


class AskingRecord(BaseModel):
    """How asking stands for one submission of a run; another submission asks again for what is missing."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    submission: float
    """When the run was submitted; 0 when nobody submitted it: every doing of it then counts as a submission."""
    began: float
    """When its first question could be sent, in seconds since 1970: `ask.deadline` counts from here."""
    reasons: dict[str, str] | None = None
    """Site -> why it left samples unanswered; None while it is being asked."""

    @classmethod
    def load(cls, path: Path, submission: float) -> AskingRecord | None:
        """Return what is held about this submission, None when nothing is. Raises `StorageError`."""
        if not (submission and path.exists()):
            return None
        held = cls.model_validate(read_json(path))
        return held if held.submission == submission else None

    @classmethod
    def begin(cls, path: Path, submission: float) -> AskingRecord:
        """Note that asking begins, unless it already has; returns what is held. Raises `StorageError`."""
        held = cls.load(path, submission)
        if held is None:
            held = cls(submission=submission, began=time.time())
            write_json(path, held.model_dump(mode="json"))
        return held

    def end(self, path: Path, reasons: dict[str, str]) -> None:
        """Note that asking has ended. Raises `StorageError`."""
        write_json(path, self.model_copy(update={"reasons": reasons}).model_dump(mode="json"))

    @property
    def passed(self) -> float:
        """Seconds since asking began."""
        return max(0.0, time.time() - self.began)
