"""The canaries of an audit that may be interrupted: what they showed stays until the whole audit is written.

Lives here: the record in the audit's folder, and what it is a record of. Does not live here: the canaries (canaries).

Another audit plants other canaries: what is kept is thrown away once it is told in audit.json.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import consilience
from consilience.client.audit.canaries import CanaryAudit, audit_canaries
from consilience.client.kept import read_kept
from consilience.client.teacher.private_samples import digest_of, private_data
from consilience.common.epochs import EpochRecord
from consilience.common.errors import RunError
from consilience.common.files import canonical_json, sha256, write_json
from consilience.common.settings import Settings, SiteSettings


class Kept(Settings):
    """state/audit/canaries.json: what was found, and the digest of all that it depends on."""

    key: str
    found: CanaryAudit


def planted_canaries(
    settings: SiteSettings, canaries: int, on_epoch: Callable[[EpochRecord], None] | None = None
) -> CanaryAudit:
    """Return what so many canaries show, or have shown to an audit of the same settings and data that was interrupted.

    Raises what `audit_canaries` raises, and `RunError` when what was kept is damaged.
    """
    path, key = _path(settings), _key(settings, canaries)
    kept = read_kept(path, Kept, RunError, "run the same command again")
    if kept is not None and kept.key == key:
        return kept.found
    found = audit_canaries(settings, canaries=canaries, on_epoch=on_epoch)
    write_json(path, Kept(key=key, found=found).model_dump(mode="json"), mode=0o600)
    return found


def forget_planted(settings: SiteSettings) -> None:
    """Throw away what was kept, if anything was."""
    _path(settings).unlink(missing_ok=True)


def _path(settings: SiteSettings) -> Path:
    return settings.state / "audit" / "canaries.json"


def _key(settings: SiteSettings, canaries: int) -> str:
    held = [consilience.__version__, settings.model_dump(mode="json"), digest_of(private_data(settings)), canaries]
    return sha256(canonical_json(held))
