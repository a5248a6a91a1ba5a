"""HOME/strangers.jsonl: which keys the SuperLink turned away, one line each, written by its process.

Lives here: writing it within bounds, whoever knocks and however often, and reading it back. Does not live here: whose
key it is (server/admission), noticing that one is turned away (server/superlink_process).
"""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path
from typing import Annotated, Literal

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from consilience.common.identity import key_fingerprint

QUIET_SECONDS = 60.0
"""A key is written down once in that time."""
MOST_KEYS = 30
"""So many keys are written down in that time: anybody can make more."""
MOST_BYTES = 64 * 1024
"""A file that is larger is begun anew."""
Reason = Literal["unknown", "connected", "clock"]
REASONS: dict[Reason, str] = {
    "unknown": "its key is not admitted",
    "connected": "an agent with its key is connected already, or was until just now",
    "clock": "its clock differs from the server's",
}


class Refusal(BaseModel):
    """One key that was turned away."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    time: float
    fingerprint: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    reason: Reason


class Strangers:
    """The file of one server folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "strangers.jsonl"
        self._lock = threading.Lock()
        self._written: dict[str, float] = {}

    def turned_away(self, key: bytes, reason: Reason) -> None:
        """Write down that a key (PEM) was turned away, unless that was done just now. Never raises."""
        with self._lock, contextlib.suppress(OSError, ValueError, UnsupportedAlgorithm):
            public = serialization.load_pem_public_key(key)
            if not isinstance(public, ec.EllipticCurvePublicKey):
                return
            now, fingerprint = time.monotonic(), key_fingerprint(public)
            self._written = {held: then for held, then in self._written.items() if now - then < QUIET_SECONDS}
            if fingerprint in self._written or len(self._written) >= MOST_KEYS:
                return
            self._written[fingerprint] = now
            full = self.path.exists() and self.path.stat().st_size > MOST_BYTES
            line = Refusal(time=time.time(), fingerprint=fingerprint, reason=reason).model_dump_json()
            with self.path.open("w" if full else "a", encoding="ascii") as file:
                file.write(line + "\n")

    def since(self, when: float) -> list[Refusal]:
        """Return what was written after a time, the last at the end; what cannot be read is left out."""
        found = []
        with contextlib.suppress(OSError):
            for line in self.path.read_bytes().splitlines():
                with contextlib.suppress(ValidationError):
                    found.append(Refusal.model_validate_json(line))
        return [refusal for refusal in found if refusal.time > when]
