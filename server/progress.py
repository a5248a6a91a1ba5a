"""RUN/progress.json: where a run stands now, for whoever looks while it runs.

Lives here: what is shown and how often it is written. Does not live here: results (server/report) and what happened
(server/events). The file is replaced whole, so that a reader never sees half of it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from consilience.common.files import write_json
from consilience.server.answers import AnswerStore

WRITE_EVERY = 1.0
"""Seconds between two writes."""
RATE_OVER = 30.0
"""Seconds over which a site's rate is measured."""


class SiteProgress:
    """How one site gets on. Sample counts are over all its stores, earlier runs of the job included."""

    def __init__(self, name: str, stores: Sequence[AnswerStore]) -> None:
        self.name, self.online, self.failures = name, False, 0
        self.reason: str | None = None
        self.asked = sum(store.about.size for store in stores)
        self.answered = sum(len(store) for store in stores)
        self.bytes = sum(store.bytes for store in stores)
        self._began = time.monotonic()
        self._recent: deque[tuple[float, int]] = deque()

    def add(self, samples: int, size: int) -> None:
        """Count an answer of `size` bytes about `samples` samples."""
        self.answered += samples
        self.bytes += size
        self._recent.append((time.monotonic(), samples))

    def fail(self, reason: str) -> None:
        """Count a failure."""
        self.failures += 1
        self.reason = reason

    def view(self) -> dict[str, Any]:
        """Return what is shown of the site; `rate` in samples a second, null for what is not known."""
        now = time.monotonic()
        while self._recent and self._recent[0][0] < now - RATE_OVER:
            self._recent.popleft()
        rate = sum(samples for _, samples in self._recent) / max(min(RATE_OVER, now - self._began), 1e-3)
        left = self.asked - self.answered
        return {
            "name": self.name,
            "online": self.online,
            "answered": self.answered,
            "asked": self.asked,
            "bytes": self.bytes,
            "rate": round(rate, 3),
            "failures": self.failures,
            "reason": self.reason,
            "seconds_left": 0.0 if not left else round(left / rate, 1) if rate else None,
        }


class Progress:
    """Writes one run's progress.json: {"job", "stage", "time", "sites": [...]}; `sites` is empty before asking."""

    def __init__(self, path: Path, job: str) -> None:
        self._path, self._job, self._stage = path, job, "begin"
        self._written = float("-inf")
        self.sites: dict[str, SiteProgress] = {}

    def stage(self, name: str) -> None:
        """Say that a stage begins. Raises `StorageError`."""
        self._stage = name
        self.write()

    def watch(self, stores: Mapping[str, Sequence[AnswerStore]]) -> None:
        """Show these sites, with all their stores by name."""
        self.sites = {name: SiteProgress(name, held) for name, held in stores.items()}

    def tick(self) -> None:
        """Write, if the last write is long enough ago. Raises `StorageError`."""
        if time.monotonic() - self._written >= WRITE_EVERY:
            self.write()

    def write(self) -> None:
        """Write now. Raises `StorageError`."""
        self._written = time.monotonic()
        sites = [site.view() for site in self.sites.values()]
        write_json(self._path, {"job": self._job, "stage": self._stage, "time": round(time.time(), 3), "sites": sites})
