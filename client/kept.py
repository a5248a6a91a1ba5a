"""Records that a site keeps of what it trained: small JSON files in its state, read back or refused.

Does not live here: what they tell (client/teacher, client/coverage, client/privacy).
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from consilience.common.errors import ConsilienceError
from consilience.common.files import read_json

Kept = TypeVar("Kept", bound=BaseModel)


def read_kept(path: Path, kind: type[Kept], error: type[ConsilienceError], again: str) -> Kept | None:
    """Return the record in `path`, or None where there is none.

    Raises `error` when it is not as it must be, saying what to do once it is removed (`again`), and `StorageError` when
    it is no JSON or cannot be read.
    """
    if not path.exists():
        return None
    try:
        return kind.model_validate(read_json(path))
    except ValidationError as problem:
        raise error(f"{path}: is not as it must be", hint=f"Remove {path}, then: {again}") from problem
