"""The files of an answer store (server/answers): what a line of the index says, and what a crash left.

Lives here: `answers.bin` and `index.jsonl` as they lie on the disk. Does not live here: which samples they are about,
and reading rows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from consilience.common.errors import StorageError
from consilience.common.files import sha256, storage_error, sync_folder
from consilience.common.records import Digest
from consilience.common.vouching import salted


class Range(NamedTuple):
    """What of a pool a question was about: `start`, `stop` and `subset` of `protocol.Question`."""

    start: int
    stop: int
    subset: str | None = None


class Entry(BaseModel):
    """One line of the index."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    start: int = Field(ge=0)
    stop: int = Field(ge=1)
    offset: int = Field(ge=0)
    bytes: int = Field(ge=0)
    sha256: Digest
    seconds: float = Field(ge=0)
    salt: str | None = Field(default=None, pattern=r"^[0-9a-f]{32}$")
    """None, as `signature`, in a record that no site signed."""
    signature: str | None = Field(default=None, pattern=r"^[0-9a-f]+$")
    asked: Range | None = None
    """What of the pool the question was about; None where that is start..stop-1."""

    @property
    def range(self) -> Range:
        """What of the pool the question was about."""
        return self.asked or Range(self.start, self.stop)


def digests_in(folder: Path) -> dict[Range, tuple[int, str | None]]:
    """Return, by what of the pool each record is about, how many samples that are, and the salted digest of the bytes
    that lie in the store; None for a record without a signature.

    Changes nothing there, and needs no store to be opened. What a crash left behind the last record does not count.
    Raises `StorageError`.
    """
    found: dict[Range, tuple[int, str | None]] = {}
    index = folder / "index.jsonl"
    if not index.exists():  # nothing was answered yet
        return found
    try:
        with (folder / "answers.bin").open("rb") as data:
            for entry, _ in whole(index, index.read_bytes(), os.fstat(data.fileno()).st_size):
                held = sha256(data.read(entry.bytes))
                salt = None if entry.salt is None or entry.signature is None else bytes.fromhex(entry.salt)
                found[entry.range] = entry.stop - entry.start, None if salt is None else salted(salt, held)
    except OSError as error:
        raise storage_error(error, folder, "read") from error
    return found


def whole(index: Path, raw: bytes, held: int, row_bytes: int | None = None) -> Iterator[tuple[Entry, int]]:
    """Yield the records of the index `raw` that are whole, one after another, and the length of their lines.

    `held`: bytes of answers.bin; `row_bytes`: those of a sample, where they are known. What a crash left after them is
    at most one line. Raises `StorageError` when more follow.
    """
    good = end = 0
    for line in raw.splitlines(keepends=True):
        entry = _parse(line, row_bytes)
        if entry is None or entry.offset != end or end + entry.bytes > held:
            break
        yield entry, len(line)
        good, end = good + len(line), end + entry.bytes
    if good < len(raw) and raw.count(b"\n", good) > 1:
        line_number = raw.count(b"\n", 0, good) + 1
        raise StorageError(
            f"{index}: line {line_number} is damaged, and more lines follow",
            hint=f"Remove {index.parent} and run the same command again: only this site is asked again",
        )


def _parse(line: bytes, row_bytes: int | None) -> Entry | None:
    if not line.endswith(b"\n"):
        return None
    try:
        entry = Entry.model_validate_json(line)
    except ValidationError:
        return None
    expected = entry.bytes if row_bytes is None else (entry.stop - entry.start) * row_bytes
    return entry if entry.stop > entry.start and entry.bytes == expected else None


def append_at(path: Path, data: bytes, at: int) -> None:
    """Append durably at position `at`; what a failed attempt left behind it is cut off first. Raises `OSError`."""
    fresh = not path.exists()
    with path.open("ab") as file:
        if file.tell() != at:
            file.truncate(at)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    if fresh:
        sync_folder(path.parent)
