"""The answers that left, kept so that whoever asks again gets the same bytes, at no cost.

Lives here: one file a pool, teacher, policy version, kind and encoding, with room for a row a sample, and the order in
which an answer is kept, counted and given. Which samples a file holds is told by the ledger alone. Does not live here:
the ledger (client/ledger), the decision (client/policy). In memory is one number a sample, never a row.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from consilience.client.ledger import Ledger
from consilience.client.ledger_head import RESTORE
from consilience.client.ledger_rows import Entry, Row, behind
from consilience.common.errors import LedgerError
from consilience.common.files import make_folder, storage_error, sync_folder
from consilience.common.protocol import Question
from consilience.common.subsets import runs

BLOCK_BYTES = 2**20
MOST_SHELVES = 16
"""Kinds of answers of which it is kept in memory which samples were released."""

Score = Callable[[NDArray[np.bool_]], bytes]
"""Encodes the samples that a mask over the question's range chooses, row after row."""
Permit = Callable[[int], None]
"""Raises `RefusedError` when an answer with so many samples more may not leave."""
Costs = Callable[[int], Sequence[Entry]]
"""What the ledger is to tell, beside the answer, of so many samples more: the mechanisms behind which they leave."""


@dataclass
class _Shelf:
    """The released answers of one kind about one pool: `rows` (pool size,) int64 are the ledger's, 0 where none is."""

    rows: NDArray[np.int64]
    seen: int = 0
    """The last row of the ledger that was looked at."""


class Released:
    """The answers that a site released, in the folder `folder`. To be used by one thread at a time.

    `use`: what they were released into, when that is not the server's hands (`sums`): kept and counted by themselves.
    """

    def __init__(self, folder: Path, ledger: Ledger, use: str = "") -> None:
        self.folder, self.ledger, self.use = folder, ledger, use
        self._shelves: dict[str, _Shelf] = {}
        self._subjects: dict[str, str] = {}
        self._intact: set[int] = set()
        self._named = set[str]()
        """Files whose names, with those of their folders, are on the disk for sure."""

    def missing(self, question: Question, size: int) -> NDArray[np.bool_]:
        """Return a mask over the question's range: what it asks about and was not released yet. `size`: the pool's.

        Raises `LedgerError`, `StorageError`.
        """
        self.ledger.refresh()
        return self._new(question, size)

    def give(self, question: Question, *, size: int, width: int, score: Score, permit: Permit, costs: Costs) -> bytes:
        """Return the encoded rows of a question, `width` bytes a sample, of a pool of `size` samples.

        What was not released yet is scored, and kept, counted with its costs and secured on the disk before it is
        returned. Raises `LedgerError`, `StorageError`, and what `score` and `permit` raise: nothing leaves then.
        """
        subject = self._subject(question)
        new = self.missing(question, size)
        permit(int(new.sum()))  # before the work
        data = score(new) if new.any() else b""
        with self.ledger.alone():
            # another process may have released some meanwhile: theirs are given, ours dropped
            still = self._new(question, size)
            permit(int(still.sum()))
            if still.any():
                rows = np.frombuffer(data, np.uint8).reshape(-1, width)[still[new]]
                self._release(question, subject, width, still, rows, costs(int(still.sum())))
                self._new(question, size)
        return self._read(question, subject, width)

    def _release(
        self,
        question: Question,
        subject: str,
        width: int,
        still: NDArray[np.bool_],
        rows: NDArray[np.uint8],
        costs: Sequence[Entry],
    ) -> None:
        """Keep the bytes first and the row of the ledger then: a crash in between leaves bytes that count as none."""
        ranges = [(question.start + low, question.start + high) for low, high in runs(still)]
        path, at = self.folder / subject, 0
        try:
            make_folder(path.parent)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                for start, stop in ranges:
                    _write(descriptor, rows[at : at + stop - start].tobytes(), start * width)
                    at += stop - start
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if subject not in self._named:  # a process that was killed may have made it, or its folders
                for folder in (path.parent, self.folder, self.folder.parent):
                    sync_folder(folder)
                self._named.add(subject)
        except OSError as error:
            raise storage_error(error, path, "write") from error
        about = question.model_dump(mode="json", include={"pool", "kind", "encoding", "teacher", "policy"})
        about |= {"use": self.use} if self.use else {}
        body = {
            **about,
            **behind(costs),
            "ranges": ranges,
            "width": width,
            "sha256": hashlib.sha256(rows.tobytes()).hexdigest(),
        }
        seq = self.ledger.append(Entry("answer", question.job, subject, len(rows), body), *costs)
        self._intact.add(seq)

    def _new(self, question: Question, size: int) -> NDArray[np.bool_]:
        free = np.asarray(self._owners(question, size)[question.start : question.stop] == 0)
        return free if question.subset is None else free & question.mask

    def _subject(self, question: Question) -> str:
        """Return the name of the file that a question's answer is kept in: the short one where it was begun with that.

        Short names hold the beginnings of digests; such a file is that of the pool and teacher it was begun for.
        """
        subject, short = subject_of(question, self.use), subject_of(question, self.use, digits=16)
        if subject not in self._subjects:
            first = next(self.ledger.rows(0, short), None)
            self._subjects[subject] = short if first is not None and _is_of(first, question) else subject
        return self._subjects[subject]

    def _owners(self, question: Question, size: int) -> NDArray[np.int64]:
        """Return (size,) int64: the row of the ledger by which each sample was released, 0 for none yet."""
        subject = self._subject(question)
        shelf = self._shelves.get(subject)
        if shelf is None:
            while len(self._shelves) >= MOST_SHELVES:  # the ledger tells again what was on it
                self._shelves.pop(next(iter(self._shelves)))
            shelf = self._shelves[subject] = _Shelf(np.zeros(size, np.int64))
        if shelf.seen < self.ledger.count:
            for row in (row for row in self.ledger.rows(shelf.seen, subject) if _is_of(row, question)):
                for start, stop in row.entry.body["ranges"]:
                    shelf.rows[start:stop] = row.seq
            shelf.seen = self.ledger.count
        return shelf.rows

    def _read(self, question: Question, subject: str, width: int) -> bytes:
        """Return what was released, after a look whether it is what the ledger tells of."""
        path = self.folder / subject
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise _lost(path) from error
        try:
            mask = question.mask
            rows = np.unique(self._shelves[subject].rows[question.start : question.stop][mask])
            for seq in (int(row) for row in rows if int(row) not in self._intact):
                self._check(self.ledger.row(seq), descriptor, path)
            ranges = [(question.start + low, question.start + high) for low, high in runs(mask)]
            data = b"".join(block for low, high in ranges for block in _blocks(descriptor, low * width, high * width))
        except OSError as error:
            raise storage_error(error, path, "read") from error
        finally:
            os.close(descriptor)
        if len(data) != len(question) * width:
            raise _lost(path)
        return data

    def _check(self, row: Row, descriptor: int, path: Path) -> None:
        """Compare what the file holds with the digest in a row of the ledger, once per process."""
        body, digest = row.entry.body, hashlib.sha256()
        for start, stop in body["ranges"]:
            for block in _blocks(descriptor, start * body["width"], stop * body["width"]):
                digest.update(block)
        if digest.hexdigest() != body["sha256"]:
            raise _lost(path, f" of row {row.seq:,}")
        self._intact.add(row.seq)


def subject_of(question: Question, use: str = "", digits: int = 64) -> str:
    """Return the name of the file, in the folder of released answers, that a question's answer is kept in.

    `digits`: how many of the pool's and teacher's digests are in it; 16 in names that earlier versions gave.
    """
    kind = f"{use}-{question.kind}" if use else question.kind
    return f"{question.pool[:digits]}/{kind}-{question.encoding}-{question.teacher[:digits]}-{question.policy}.bin"


def _is_of(row: Row, question: Question) -> bool:
    """Whether a row tells of answers about the question's pool by its teacher."""
    return bool(row.entry.body["pool"] == question.pool and row.entry.body["teacher"] == question.teacher)


def _lost(path: Path, which: str = "") -> LedgerError:
    return LedgerError(f"{path}: answers{which} that were released are lost or changed", hint=RESTORE)


def _write(descriptor: int, data: bytes, at: int) -> None:
    """Write all of `data` at an offset. Raises `OSError`."""
    left = memoryview(data)
    while left:
        written = os.pwrite(descriptor, left, at)
        left, at = left[written:], at + written


def _blocks(descriptor: int, start: int, stop: int) -> Iterator[bytes]:
    """Yield the bytes start..stop-1 of a file in pieces, fewer where it ends before."""
    while start < stop and (block := os.pread(descriptor, min(BLOCK_BYTES, stop - start), start)):
        yield block
        start += len(block)
