"""HOME/service.json: how the server stands, for the commands that ask.

Does not live here: writing it, and all that needs Flower (server/service), which takes half a second to import.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from consilience.common.errors import StorageError
from consilience.common.files import read_json

OLD_SECONDS = 10.0
"""A state that was written longer ago is no longer how the server stands."""


class ServiceState(BaseModel):
    """HOME/service.json: how the server stands, written every second."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pid: int
    since: float
    now: float
    superlink: int | None
    """Process id; None while it is being started."""
    online: dict[str, bool]
    """Admitted site -> whether it is connected."""


def read_service(home: Path) -> ServiceState | None:
    """Return how the server stands, None when it does not run."""
    path = home / "service.json"
    if not path.exists():
        return None
    try:
        state = ServiceState.model_validate(read_json(path))
    except (StorageError, ValidationError):
        if not path.exists():  # it stopped just now
            return None
        raise
    try:  # the number may belong to another process by now
        command = Path(f"/proc/{state.pid}/cmdline").read_bytes()
    except OSError:
        return None
    return state if b"consilience" in command else None
