"""The bundle that Flower sends with every run, and what may be in it: names, and no code.

Lives here: looking into it. Does not live here: getting it (client/fleet) and what follows from a bad one
(client/agent). Nothing of a bundle is ever written to the disk or imported.
"""

from __future__ import annotations

import io
import tomllib
import zipfile
from typing import Any

APP = "consilience.client.app:app"
ALLOWED = ("pyproject.toml", ".info/CONTENT")
MOST_BYTES = 65_536
"""Bytes of a bundle's one file, unpacked."""


def bundle_problem(content: bytes) -> str | None:
    """Return why a run with this bundle is refused, in words of ours alone; None when it may be answered."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
            if any(entry.filename not in ALLOWED for entry in entries):
                return "the run's bundle carries more than its description: this site runs installed code only"
            if len({entry.filename for entry in entries}) != len(entries):
                return "the run's bundle names a file twice"
            if any(entry.file_size > MOST_BYTES for entry in entries):
                return "the run's bundle is too large"
            with archive.open("pyproject.toml") as file:
                held = file.read(MOST_BYTES + 1)
            described = tomllib.loads(held.decode())
    except Exception:  # a stranger's bytes: whatever zipfile or tomllib make of them, it is no bundle
        return "the run's bundle cannot be read"
    named: Any = described
    for part in ("tool", "flwr", "app", "components", "clientapp"):
        named = named.get(part) if isinstance(named, dict) else None
    return None if named == APP else "the run's bundle names another app than the installed one"
