"""events.jsonl: what happened in a run, one line an event, append-only.

Does not live here: results. Events are for people and for tests that count what was asked.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from consilience.common.files import storage_error


class Events:
    """Appends events of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._cut_torn_line()

    def _cut_torn_line(self) -> None:
        """A crash may have left half a line: end it, so that the next event starts on its own."""
        if self.path.exists():
            with self.path.open("rb+") as file:
                if file.seek(0, 2) and file.seek(-1, 2) is not None and file.read(1) != b"\n":
                    file.write(b"\n")

    def add(self, event: str, **fields: Any) -> None:
        """Append one event. Raises `StorageError`."""
        line = json.dumps({"time": round(time.time(), 3), "event": event, **fields})
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise storage_error(error, self.path, "write") from error
