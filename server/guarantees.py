"""RUN/guarantees.json: what the sites say that their answers come to, by differential privacy.

Lives here: the file. Does not live here: the mechanisms and the accounting, which are the sites' own; the server
repeats what they say and cannot check it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from consilience.common.errors import NEW_RUN, RunError
from consilience.common.files import read_json, write_json
from consilience.common.protocol import Guarantee

FILE = "guarantees.json"
_ADAPTER: TypeAdapter[dict[str, Guarantee | None]] = TypeAdapter(dict[str, Guarantee | None])


def note_guarantees(run: Path, told: Mapping[str, Guarantee | None]) -> None:
    """Keep what sites said when they agreed, beside what others said before. Raises `RunError`, `StorageError`.

    None stands for a site that gives none, or no more.
    """
    held = read_guarantees(run)
    if told.items() - held.items():
        write_json(run / FILE, _ADAPTER.dump_python({**held, **told}, mode="json"))


def read_guarantees(run: Path) -> dict[str, Guarantee | None]:
    """Return site -> its guarantee, of the sites that agreed. Raises `RunError` when damaged, `StorageError`."""
    path = run / FILE
    if not path.exists():
        return {}
    try:
        return _ADAPTER.validate_python(read_json(path))
    except ValidationError as error:
        raise RunError(f"{path}: is not as it must be", hint=NEW_RUN) from error
