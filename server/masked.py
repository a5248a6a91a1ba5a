"""What one site sent for one secure sum: its masked rows, on disk, and which of them are there.

A folder with two files. `rows.bin`: (n, k) words of 32 bits, its space taken at once. `index.jsonl`: one line a part,
appended when the part is durable: first row, last row + 1, SHA-256. Lives here: keeping. Does not live here: masks.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from consilience.common.errors import ProtocolError, StorageError
from consilience.common.files import make_folder, sha256, storage_error
from consilience.common.sums.ring import WORD, Words


class MaskedStore:
    """(n, k) masked rows of one site. Written by one thread of one process."""

    def __init__(self, folder: Path, rows: int, width: int) -> None:
        """Open or create the store in `folder`. Raises `StorageError`."""
        self._index, self._path = folder / "index.jsonl", folder / "rows.bin"
        self._there = np.zeros(rows, dtype=np.bool_)
        size = rows * width * WORD.itemsize
        try:
            make_folder(folder)
            with self._path.open("ab+") as file:
                os.posix_fallocate(file.fileno(), 0, size)
            self._rows = np.memmap(self._path, WORD, "r", shape=(rows, width))
            self._recover()
        except OSError as error:
            raise storage_error(error, folder, "write") from error

    def _recover(self) -> None:
        """Read the index up to its last complete line; cut off a torn one. Raises `StorageError` for changed rows."""
        raw = self._index.read_bytes() if self._index.exists() else b""
        end = raw.rfind(b"\n") + 1
        if end < len(raw):
            os.truncate(self._index, end)
        for number, line in enumerate(raw[:end].splitlines(), 1):
            try:
                part = json.loads(line)
                start, stop = int(part["start"]), int(part["stop"])
                intact = sha256(self._rows[start:stop].tobytes()) == part["sha256"]
            except (ValueError, KeyError, TypeError):
                intact = False
            if not intact:
                raise StorageError(
                    f"{self._index}: line {number} does not fit the rows beside it",
                    hint=f"Remove {self._index.parent} and run the same command again: only this site is asked again",
                )
            self._there[start:stop] = True

    @property
    def complete(self) -> bool:
        """Whether every row is there."""
        return bool(self._there.all())

    def missing(self) -> list[tuple[int, int]]:
        """Return the ranges start..stop-1 of rows that are not there, in order."""
        edges = np.flatnonzero(np.diff(np.concatenate([[True], self._there, [True]]).astype(np.int8)))
        return [(int(low), int(high)) for low, high in edges.reshape(-1, 2)]

    def put(self, start: int, rows: Words) -> None:
        """Store rows start..; the same again changes nothing. Raises `ProtocolError` for others, `StorageError`."""
        stop = start + len(rows)
        old = self._there[start:stop]
        if not np.array_equal(self._rows[start:stop][old], rows[old]):
            raise ProtocolError("A site sent other masked rows of samples that it had sent before")
        if old.all():
            return
        data = rows.astype(WORD, copy=False).tobytes()
        line = {"start": start, "stop": stop, "sha256": sha256(data)}
        try:
            with self._path.open("rb+") as file:
                file.seek(start * self._rows.strides[0])
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            with self._index.open("ab") as file:
                file.write(json.dumps(line).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise storage_error(error, self._path, "write") from error
        self._there[start:stop] = True

    def read(self, start: int, stop: int) -> Words:
        """Return rows start..stop-1, (stop - start, k) uint32."""
        return np.asarray(self._rows[start:stop]).astype(np.uint32, copy=False)
