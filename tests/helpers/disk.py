"""A disk on which the power may go."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest


class Disk:
    """Knows which folders, of those made since, a power cut would take: whose names no folder above has on the disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.unsure: set[Path] = set()
        mkdir, fsync = os.mkdir, os.fsync

        def making(path: Any, *given: Any, **named: Any) -> None:
            mkdir(path, *given, **named)
            self.unsure.add(Path(path).resolve())

        def syncing(descriptor: int) -> None:
            fsync(descriptor)
            synced = Path(f"/proc/self/fd/{descriptor}").resolve()
            self.unsure = {path for path in self.unsure if path.parent != synced}

        monkeypatch.setattr(os, "mkdir", making)
        monkeypatch.setattr(os, "fsync", syncing)
