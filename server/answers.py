"""The durable answer store: what one site answered about one pool.

A store is about a pool, or about the part of it that a job asks about (server/asked_pool): its samples are then those
of the part. Each kind of answer (`protocol.Kind`) has a store of its own, a folder with three files.
`about.json`: what the answers are about (pool, teacher, policy, kind, encoding, classes).
`answers.bin`: encoded rows, one record after another, append-only. `index.jsonl`: one line a record, append-only:
range of samples, offset, length, SHA-256, the teacher's seconds, of a part of the pool what was asked about (`Range`),
and where the site signed it salt and signature (common/vouching). A record is stored when its index line is complete;
whatever a crash left behind it is cut off on opening. Rows are read by memory map, checked against the SHA-256 when
first touched.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from consilience.common.encoding import (
    Sent,
    unpack_sent,
)
from consilience.common.errors import NEW_RUN, ProtocolError, RunError, StorageError
from consilience.common.files import Resident, read_json, sha256, storage_error, write_json
from consilience.common.protocol import Answer, Question
from consilience.common.vouching import SALT_BYTES, KnownSigner, salted
from consilience.server.answer_files import Entry, Range, append_at, whole
from consilience.server.answers_about import About
from consilience.server.asked_pool import reach, span


@dataclass(frozen=True)
class Shard:
    """What a site vouched for in one record: about which `samples` of the pool, the salted digest of their rows, its
    signature."""

    range: Range
    samples: int
    digest: str
    signature: str


class AnswerStore:
    """One site's answers about one pool, on disk. Written by one thread of one process (the run's lock sees to it)."""

    def __init__(
        self,
        folder: Path,
        about: About,
        signer: KnownSigner | None = None,
        ids: NDArray[np.int64] | None = None,
    ) -> None:
        """Open or create the store in `folder`. Raises `RunError` when it is about something else, `StorageError`.

        `signer`: who must have signed what is stored from now on; None: signatures are neither asked for nor kept.
        `ids` (size,): the pool's samples that the store's are, -1 for those that are not chosen yet, at the end; None:
        all of them.
        """
        self.folder, self.about, self._signer, self.ids = folder, about, signer, ids
        self._entries: list[Entry] = []  # sorted by start
        self._starts: list[int] = []
        self._checked: set[int] = set()  # offsets of records whose bytes were compared with their SHA-256
        self._end = 0  # bytes of answers.bin that count
        self._index_end = 0  # bytes of index.jsonl that count
        self._map: NDArray[np.uint8] = np.empty(0, np.uint8)
        self._resident = Resident()
        if (folder / "about.json").exists():
            held = read_json(folder / "about.json")
            if held != about.model_dump(mode="json"):
                differing = [name for name, value in about.model_dump(mode="json").items() if held.get(name) != value]
                raise RunError(
                    f"{folder} holds answers of site {about.site} for another {', '.join(differing)}",
                    hint=f"Start {NEW_RUN}",
                )
        else:
            write_json(folder / "about.json", about.model_dump(mode="json"))
        self._recover()

    def _recover(self) -> None:
        """Read the index up to its last complete line and cut off what a crash left after it."""
        index, data = self.folder / "index.jsonl", self.folder / "answers.bin"
        try:
            raw = index.read_bytes() if index.exists() else b""
            held = data.stat().st_size if data.exists() else 0
            for entry, length in whole(index, raw, held, self.about.row_bytes):
                place = self._place(entry)
                if entry.stop > self.known or entry.range != self.range(entry.start, entry.stop):
                    raise StorageError(
                        f"{index}: holds answers about other samples of the pool than this run asks about",
                        hint=f"Restore the run's folder from a copy, or start {NEW_RUN}",
                    )
                self._insert(entry, place)
                self._index_end += length
            for path, size in ((index, self._index_end), (data, self._end)):
                if path.exists() and path.stat().st_size > size:
                    os.truncate(path, size)
        except OSError as error:
            raise storage_error(error, self.folder, "recover") from error

    def _place(self, entry: Entry) -> int:
        """Return where `entry` belongs. Raises `ProtocolError` when its samples overlap stored ones or do not exist."""
        place = bisect_right(self._starts, entry.start)
        before = self._entries[place - 1].stop if place else 0
        after = self._starts[place] if place < len(self._starts) else self.about.size
        if not before <= entry.start < entry.stop <= after:
            raise ProtocolError(
                f"Site {self.about.site}: samples {entry.start} to {entry.stop} were answered already or do not exist"
            )
        return place

    def range(self, low: int, high: int) -> Range:
        """Return what of the pool the store's samples low..high-1 are."""
        return Range(*span(self.ids, low, high))

    def reach(self, low: int, high: int) -> int:
        """Return how far one question can go from the store's sample `low`, at most to `high`."""
        return reach(self.ids, low, high)

    @cached_property
    def known(self) -> int:
        """How many of its samples are chosen, and can be asked about."""
        return self.about.size if self.ids is None else int((self.ids >= 0).sum())

    @cached_property
    def _order(self) -> NDArray[np.int64]:
        return np.argsort(np.empty(0, np.int64) if self.ids is None else self.ids)

    def _asked(self, question: Question) -> tuple[int, int]:
        """Return which of the store's samples a question is about. Raises `ProtocolError` where they are none of it."""
        asked = Range(question.start, question.stop, question.subset)
        if self.ids is None:
            return question.start, question.stop
        place = int(np.searchsorted(self.ids, question.start, sorter=self._order))
        low = int(self._order[min(place, len(self.ids) - 1)])
        high = low + len(question)
        if high > self.known or self.range(low, high) != asked:
            raise ProtocolError(f"Site {self.about.site}: other samples were answered than the run asks about")
        return low, high

    def _insert(self, entry: Entry, place: int) -> None:
        self._entries.insert(place, entry)
        self._starts.insert(place, entry.start)
        self._end = entry.offset + entry.bytes

    def append(self, answer: Answer) -> None:
        """Store an answer durably: when this returns, a crash no longer loses it.

        Raises `ProtocolError` when its rows are not what the store holds, its samples were answered already, or the
        signer has not signed it, `StorageError` when the disk refuses (what was stored before stays).
        """
        question = answer.question
        self.about.need_rows(answer.data, len(question))
        digest = sha256(answer.data)
        low, high = self._asked(question)
        asked = Range(question.start, question.stop, question.subset)
        entry = Entry(
            start=low,
            stop=high,
            asked=None if asked == Range(low, high) else asked,
            offset=self._end,
            bytes=len(answer.data),
            sha256=digest,
            seconds=answer.seconds,
            **self._signed(answer, digest),
        )
        place = self._place(entry)
        line = (json.dumps(entry.model_dump(exclude_none=True)) + "\n").encode()
        try:
            append_at(self.folder / "answers.bin", answer.data, self._end)
            append_at(self.folder / "index.jsonl", line, self._index_end)
        except OSError as error:
            raise storage_error(error, self.folder, "write") from error
        self._insert(entry, place)
        self._index_end += len(line)

    def _signed(self, answer: Answer, digest: str) -> dict[str, str]:
        """Return salt and signature of an answer. Raises `ProtocolError` when they are not the signer's."""
        if self._signer is None:
            return {}
        salt, signature = answer.vouch[:SALT_BYTES], answer.vouch[SALT_BYTES:]
        self._signer.check(answer.question, salted(salt, digest), signature)
        return {"salt": salt.hex(), "signature": signature.hex()}

    def shards(self) -> Iterator[Shard]:
        """Yield what the site vouched for, in order; records without a signature are left out."""
        for entry in self._entries:
            if entry.salt is not None and entry.signature is not None:
                digest = salted(bytes.fromhex(entry.salt), entry.sha256)
                yield Shard(entry.range, entry.stop - entry.start, digest, entry.signature)

    def __len__(self) -> int:
        """Samples answered."""
        return sum(entry.stop - entry.start for entry in self._entries)

    @property
    def complete(self) -> bool:
        """Whether every sample of the pool is answered."""
        return len(self) == self.about.size

    @property
    def done(self) -> bool:
        """Whether all that is chosen so far is answered."""
        return len(self) == self.known

    @property
    def bytes(self) -> int:
        """Bytes of the encoded rows."""
        return self._end

    @property
    def seconds(self) -> float:
        """Seconds the site's teacher took, summed over answers."""
        return sum(entry.seconds for entry in self._entries)

    def missing(self) -> Iterator[tuple[int, int]]:
        """Yield the ranges (start, stop) that are not answered, in order."""
        at = 0
        for entry in self._entries:
            if at < entry.start:
                yield at, entry.start
            at = entry.stop
        if at < self.about.size:
            yield at, self.about.size

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return the answers for samples start..stop-1, (stop - start, classes) float32.

        Raises `StorageError` when one is missing or its bytes have changed since they were stored.
        """
        return self._read(start, stop, np.dtype(np.float32))

    def read_numbers(self, start: int, stop: int) -> NDArray[np.floating[Any]]:
        """Return what `read` does, in float16 where answers are stored so: half as much to carry."""
        return self._read(start, stop, np.dtype("<f2") if self._halves else np.dtype(np.float32))

    @property
    def _halves(self) -> bool:
        return self.about.encoding == "f16" and self.about.kind in ("log-probs", "log-odds")

    def read_sent(self, start: int, stop: int) -> Sent:
        """Return what was sent about samples start..stop-1, of a store of log-probabilities in `top-K`.

        Raises as `read` does.
        """
        parts = [unpack_sent(raw, self.about.classes, self.about.encoding) for raw in self._raw(start, stop)]
        columns = zip(*((part.ids, part.values, part.other) for part in parts), strict=True)
        return Sent(*(np.concatenate(column) for column in columns))

    def _read(self, start: int, stop: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        out, at = np.empty((stop - start, self.about.classes), dtype), 0
        for raw in self._raw(start, stop):
            rows = out[at : at + len(raw) // self.about.row_bytes]
            if dtype.itemsize == 2:
                rows[:] = raw.view(dtype).reshape(rows.shape)
            else:
                self.about.decode(raw, rows)
            at += len(rows)
        return out

    def _raw(self, start: int, stop: int) -> Iterator[NDArray[np.uint8]]:
        """Yield the bytes of samples start..stop-1, record by record."""
        width = self.about.row_bytes
        at, place = start, bisect_right(self._starts, start) - 1
        while at < stop:
            if not 0 <= place < len(self._entries) or not self._entries[place].start <= at < self._entries[place].stop:
                raise self._lacks(at)
            entry = self._entries[place]
            self._check(entry)
            until = min(stop, entry.stop)
            low = entry.offset + (at - entry.start) * width
            yield self._bytes(low, low + (until - at) * width)
            at, place = until, place + 1

    def _lacks(self, sample: int) -> StorageError:
        return StorageError(
            f"{self.folder}: no answer for sample {sample}", hint="Run the same command again to ask for it"
        )

    def take(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the answers for the samples `ids` (b,), in any order, (b, classes) float32. Raises as `read` does."""
        width, rows = self.about.row_bytes, np.empty(len(ids), np.int64)
        for at, (sample, place) in enumerate(zip(ids, np.searchsorted(self._starts, ids, side="right"), strict=True)):
            entry = self._entries[place - 1] if place else None
            if entry is None or sample >= entry.stop:
                raise self._lacks(int(sample))
            self._check(entry)
            rows[at] = entry.offset // width + sample - entry.start  # each record is whole rows of one width
        raw = self._bytes(0, self._end).reshape(-1, width)[rows]
        self._resident.note(len(ids), [self._map])
        out = np.empty((len(ids), self.about.classes), np.float32)
        self.about.decode(raw.reshape(-1), out)
        return out

    def answered(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Return (stop - start,) bool: which of the samples start..stop-1 are answered."""
        out = np.zeros(stop - start, np.bool_)
        for low, high in self._ranges(start, stop):
            out[low - start : high - start] = True
        return out

    def read_answered(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return what `read` does, with zeros in the rows of samples that are not answered. Raises `StorageError`."""
        return self._answered(self.read, start, stop)

    def answered_numbers(self, start: int, stop: int) -> NDArray[np.floating[Any]]:
        """Return what `read_answered` does, in the type of `read_numbers`."""
        return self._answered(self.read_numbers, start, stop)

    def _answered(self, read: Callable[[int, int], NDArray[Any]], start: int, stop: int) -> NDArray[Any]:
        ranges = list(self._ranges(start, stop))
        if ranges == [(start, stop)]:
            return read(start, stop)
        out = np.zeros((stop - start, self.about.classes), read(start, start).dtype)
        for low, high in ranges:
            out[low - start : high - start] = read(low, high)
        return out

    def _ranges(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield the stored ranges within start..stop-1, in order."""
        for entry in self._entries[max(0, bisect_right(self._starts, start) - 1) :]:
            if entry.start >= stop:
                break
            if entry.stop > start:
                yield max(entry.start, start), min(entry.stop, stop)

    def _bytes(self, low: int, high: int) -> NDArray[np.uint8]:
        if high > len(self._map):
            self._map = np.memmap(self.folder / "answers.bin", np.uint8, "r")
        return self._map[low:high]

    def _check(self, entry: Entry) -> None:
        if entry.offset in self._checked:
            return
        if sha256(self._bytes(entry.offset, entry.offset + entry.bytes).data) != entry.sha256:
            raise StorageError(
                f"{self.folder / 'answers.bin'}: the answer for samples {entry.start} to {entry.stop} has changed",
                hint=f"Remove {self.folder} and run the same command again: only this site is asked again",
            )
        self._checked.add(entry.offset)
        self._resident.note(0, [self._map], long=entry.bytes)
