"""RUN/audits.json: what the sites of a simulation found out when they attacked their own answers.

Lives here: the file, and what the report says of it. Does not live here: the attacks, which are the sites' own
(client/audit); over a network no site tells the server anything of them, and there is no such file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from consilience.common.errors import NEW_RUN, RunError
from consilience.common.files import read_json, write_json
from consilience.common.settings import Settings

FILE = "audits.json"


class SiteAudit(Settings):
    """One site's audit: the strongest attack on membership as area with its interval, None where there was none."""

    verdict: str
    auc: float | None
    low: float | None
    high: float | None
    page: str | None
    """Path of the whole audit in the run's folder; None where it could not be made."""

    @property
    def sentence(self) -> str:
        """The verdict with its figure."""
        if self.auc is None or self.low is None or self.high is None:
            return f"{self.verdict}."
        return (
            f"{self.verdict} ({self.auc:.1%} of pairs told apart, {self.low:.1%} to {self.high:.1%}; guessing: 50 %)."
        )


_ADAPTER: TypeAdapter[dict[str, SiteAudit]] = TypeAdapter(dict[str, SiteAudit])


def write_audits(run: Path, audits: Mapping[str, SiteAudit]) -> None:
    """Keep the audits of a simulation's sites. Raises `StorageError`."""
    write_json(run / FILE, _ADAPTER.dump_python(dict(audits), mode="json"))


def read_audits(run: Path) -> dict[str, SiteAudit]:
    """Return site -> its audit; empty where there are none. Raises `RunError` when damaged, `StorageError`."""
    path = run / FILE
    if not path.exists():
        return {}
    try:
        return _ADAPTER.validate_python(read_json(path))
    except ValidationError as error:
        raise RunError(f"{path}: is not as it must be", hint=NEW_RUN) from error
