"""The site's ledger: what left, row by row, each bound to the one before by a hash. It only ever grows.

Lives here: the database (STATE/ledger.db), its verification, and the comparison with the head (client/ledger_head), by
which an older copy that was put back is noticed. Does not live here: what a row tells (client/ledger_rows), what may
leave (client/policy), the bytes that left (client/released).

A row is committed, and then the head written, before the bytes of which it speaks leave: whatever is interrupted, what
is counted as spent is never less than what left.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Self, get_args

from consilience.client.ledger_head import RESTORE, former_path, head_path, missing_head, read_head, trace_of
from consilience.client.ledger_rows import UNKNOWN, Approval, Asked, Entry, Row, Spent, SumState, approved_by, chain_of
from consilience.common.errors import ConsilienceError, LedgerError, StorageError
from consilience.common.files import canonical_json, make_private, storage_error, sync_folder, write_json
from consilience.common.settings import SiteSettings

COLUMNS = ("seq", "time", "kind", "job", "samples", "subject", "body", "chain")
CHANGED = "is not as it was written"
FIRST = "0" * 64
"""What the first row is bound to."""
PATIENCE = 60.0
"""Seconds that a process waits for others that write."""
SCHEMA = """
CREATE TABLE IF NOT EXISTS rows (
    seq INTEGER PRIMARY KEY, time TEXT NOT NULL, kind TEXT NOT NULL, job TEXT NOT NULL, samples INTEGER NOT NULL,
    subject TEXT NOT NULL, body TEXT NOT NULL, chain TEXT NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS rows_by_subject ON rows (subject, seq);
CREATE TRIGGER IF NOT EXISTS rows_stay BEFORE DELETE ON rows BEGIN SELECT RAISE(ABORT, 'rows stay'); END;
CREATE TRIGGER IF NOT EXISTS rows_stay_so BEFORE UPDATE ON rows BEGIN SELECT RAISE(ABORT, 'rows stay so'); END;
"""


def utc_now() -> datetime:
    """Return what this machine takes for the time."""
    return datetime.now(UTC)


class Ledger:
    """A ledger that was verified, row by row, when it was opened. Safe to use from several threads and processes."""

    def __init__(self, path: Path, head: Path, *, former: Path | None = None, trace: Path | None = None) -> None:
        """Open the ledger, or begin one. Raises `LedgerError` naming the first bad row, `StorageError`.

        `former`: where the head may still lie; it is moved. `trace`: what tells that there was a ledger, so that none
        begins where it is lost.
        """
        self.path, self.head = path, head
        self._former, self._trace = former, trace
        self.spent = Spent()
        self.count, self.chain, self.last = 0, FIRST, ""
        self._approved: dict[tuple[str, str], Approval | None] = {}
        self._lock = threading.Lock()
        make_private(path.parent)
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # what SQLite adds takes its rights over
            self._file = path.stat().st_ino
        except OSError as error:
            raise storage_error(error, path, "write") from error
        with self._asking_sqlite():
            self._db = sqlite3.connect(path, timeout=PATIENCE, isolation_level=None, check_same_thread=False)
            self._db.text_factory = lambda raw: raw.decode(errors="replace")  # a row that is not text is a bad row
        try:
            with self._alone():
                self._begin()
        except ConsilienceError:
            self.close()
            raise

    @classmethod
    def open(cls, settings: SiteSettings) -> Self:
        """Open a site's ledger. Raises `LedgerError`, `StorageError`."""
        path, head = paths(settings)
        return cls(path, head, former=former_path(settings), trace=trace_of(settings.state))

    def close(self) -> None:
        """Let the database go."""
        self._db.close()

    @property
    def now(self) -> str:
        """The time that the next row gets: never before the last row's, whatever the clock says."""
        return max(utc_now().isoformat(timespec="seconds"), self.last)

    def approved(self, job: str, policy: str) -> Approval | None:
        """Return what a person last approved of the job under this policy version; None when that was withdrawn."""
        return self._approved.get((job, policy))

    def approved_under(self, job: str) -> tuple[str, ...]:
        """Return the policy versions under which the job is approved."""
        return tuple(policy for (name, policy), given in self._approved.items() if name == job and given is not None)

    def rows(self, after: int = 0, subject: str | None = None) -> Iterator[Row]:
        """Yield the rows after row `after`, or those of them with one subject, in order. Raises `StorageError`."""
        chosen = "seq > ?" if subject is None else "seq > ? AND subject = ?"
        with self._asking_sqlite():
            yield from map(
                self._row,
                self._db.execute(
                    f"SELECT * FROM rows WHERE {chosen} ORDER BY seq", (after,) if subject is None else (after, subject)
                ),
            )

    def row(self, seq: int) -> Row:
        """Return one row. Raises `LedgerError` when it is missing, `StorageError`."""
        with self._asking_sqlite():
            values = self._db.execute("SELECT * FROM rows WHERE seq = ?", (seq,)).fetchone()
        if values is None:
            raise self._bad(seq, "is missing")
        return self._row(values)

    def _row(self, values: tuple[Any, ...]) -> Row:
        seq, when, kind, job, samples, subject, body, chain = values
        try:
            return Row(seq, when, Entry(kind, job, subject, samples, json.loads(body)), body, chain)
        except ValueError:
            raise self._bad(seq, CHANGED) from None

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep every other process and thread from writing, and know all that they wrote.

        Raises `LedgerError`, `StorageError`.
        """
        with self._alone():
            self._catch_up()
            yield
            # what was committed before a crash, here or elsewhere, must be in the head before any byte leaves
            head = read_head(self.head)
            if head is None or head["rows"] < self.count:
                self._write_head()
            elif head["rows"] > self.count:
                raise self._bad(self.count + 1, f"is missing: {self.head} tells of {head['rows']:,} rows")

    def refresh(self) -> None:
        """Know what other processes wrote. Raises `LedgerError`, `StorageError`."""
        with self._lock:
            self._catch_up()

    def append(self, *entries: Entry) -> int:
        """Add rows, all or none; returns the number of the first. They last once the block of `alone` ends well.

        To be called inside `alone`. Raises `StorageError`: nothing was added, or nothing may leave.
        """
        first, before, when = self.count + 1, self.chain, self.now
        with self._asking_sqlite():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                for seq, entry in enumerate(entries, first):
                    body = canonical_json(dict(entry.body)).decode()
                    before = chain_of(before, seq, when, entry, body)
                    values = (seq, when, entry.kind, entry.job, entry.samples, entry.subject, body, before)
                    self._db.execute(f"INSERT INTO rows VALUES ({', '.join('?' * len(COLUMNS))})", values)
                self._commit()
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
        self._catch_up()
        return first

    def _commit(self) -> None:
        self._db.execute("COMMIT")

    def _begin(self) -> None:
        """Make the table, verify every row, and compare with the head."""
        with self._asking_sqlite():
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(SCHEMA)
        places = [self.head] if self._former is None else [self.head, self._former]
        heads = {place: head for place in places if (head := read_head(place)) is not None}
        for row in self.rows():
            self._take(row)
            for place, head in heads.items():
                if row.seq == head["rows"] and row.chain != head["chain"]:
                    raise self._bad(row.seq, f"is not the one that {place} tells of")
        if not heads and self.count:
            raise LedgerError(
                f"{self.head} is missing, and the ledger has {self.count:,} rows", hint=missing_head(self.path.parent)
            )
        if not heads and self._trace is not None:
            raise LedgerError(
                f"{self.head} and all rows of {self.path} are missing, and {self._trace} is there: what was released "
                "is not known",
                hint=RESTORE,
            )
        for place, head in heads.items():
            if self.count < head["rows"]:
                raise self._bad(
                    self.count + 1, f"and later ones are missing: {place} tells of {head['rows']:,} rows; an older copy"
                )
        if self.head not in heads or self.count > heads[self.head]["rows"]:
            self._write_head()
        if self._former in heads:
            self._forget_former(self._former)

    def _forget_former(self, former: Path) -> None:
        """Remove the head from where it lay once, now that it lies on the disk at its place."""
        try:
            former.unlink(missing_ok=True)
            sync_folder(former.parent)
        except OSError as error:
            raise storage_error(error, former, "remove") from error

    def _catch_up(self) -> None:
        """Take in the rows that were added since, after a look whether the last known one is still there."""
        if self.count and self.row(self.count).chain != self.chain:
            raise self._bad(self.count, CHANGED)
        for row in self.rows(self.count):
            self._take(row)

    def _take(self, row: Row) -> None:
        """Verify the next row and count it. Raises `LedgerError`."""
        try:
            self._verify_and_count(row)
        except (KeyError, AttributeError, TypeError):  # of a body that is not as ours are, whoever wrote it
            raise self._bad(row.seq, CHANGED) from None

    def _verify_and_count(self, row: Row) -> None:
        entry = row.entry
        if row.seq != self.count + 1:
            raise self._bad(self.count + 1, "is missing")
        bound = row.chain == chain_of(self.chain, row.seq, row.time, entry, row.body)
        if not bound or row.time < self.last or entry.samples < 0:  # nothing counts down, whoever wrote it
            raise self._bad(row.seq, CHANGED)
        if entry.kind == "mechanism" and entry.body["count"] < 1:
            raise self._bad(row.seq, CHANGED)
        self.count, self.chain, self.last = row.seq, row.chain, row.time
        if entry.samples:
            self.spent.jobs[entry.job] += entry.samples
            self.spent.months[row.month] += entry.samples
            self.spent.lifetime += entry.samples
            if entry.kind == "answer":
                about = {"use": "", **entry.body}
                self.spent.asked[entry.job, Asked(*(str(about.get(name, "")) for name in Asked._fields))] += (
                    entry.samples
                )
            if entry.body.get("kind") == "features":
                if entry.body["width"] < 0:
                    raise self._bad(row.seq, CHANGED)
                self.spent.features[entry.job] += entry.samples * entry.body["width"]
            if not entry.body.get("behind"):
                self.spent.mechanisms[entry.job, row.month, "none", "{}"] += entry.samples
        if entry.kind in ("card", "features", "tail") and not entry.body.get("behind"):
            self.spent.mechanisms[entry.job, row.month, "none", "{}"] += 1
        if entry.kind == "sum":
            state, teacher = entry.body["state"], str(entry.body["teacher"])
            if state == UNKNOWN:
                self.spent.unsummable = (self.spent.unsummable - {""}) | {teacher}
            elif state in get_args(SumState):
                self.spent.sums[entry.subject] = state, teacher
            else:
                raise self._bad(row.seq, CHANGED)
        if entry.kind == "carried":
            carried, asked = entry.body.get("features", 0), entry.body.get("tail", 0)
            if min(carried, asked) < 0:
                raise self._bad(row.seq, CHANGED)
            self.spent.features.update({entry.job: carried} if carried else {})
            self.spent.tails.update({(entry.job, "samples"): asked} if asked else {})
            if not entry.samples and carried + asked + entry.body.get("rows", 0):  # what these tell of is not known
                self.spent.mechanisms[entry.job, row.month, "none", "{}"] += 1
        if entry.kind == "features":
            if entry.body["bytes"] < 1:
                raise self._bad(row.seq, CHANGED)
            self.spent.features[entry.job] += entry.body["bytes"]
            self.spent.components[entry.job, entry.body["tap"]] += entry.body["bytes"]
        if entry.kind == "tail" and entry.body["what"] != "blocks":
            told = {name: entry.body[name] for name in ("samples", "bytes")}
            if min(told.values()) < 1:
                raise self._bad(row.seq, CHANGED)
            self.spent.tails.update({(entry.job, name): count for name, count in {"rounds": 1, **told}.items()})
        if entry.kind == "mechanism":
            parameters = canonical_json(entry.body["parameters"]).decode()
            self.spent.mechanisms[entry.job, row.month, entry.subject, parameters] += entry.body["count"]
        if entry.kind == "approval":
            self._approved[entry.job, entry.subject] = approved_by(entry)

    def _bad(self, seq: int, problem: str) -> LedgerError:
        return LedgerError(f"{self.path}: row {seq:,} {problem}", hint=RESTORE)

    def _write_head(self) -> None:
        asked = sum(count for (_, name), count in self.spent.tails.items() if name == "samples")
        told = {"samples": self.spent.lifetime, "features": self.spent.features.total(), "tail": asked}
        try:
            write_json(self.head, {"rows": self.count, "chain": self.chain, "last": self.last, **told})
        except StorageError as error:
            raise StorageError(
                error.message,
                hint="Make room there and let it be written, or name another file as `ledger_head` in site.yaml",
            ) from error

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        with self._lock, locked(self.path):
            try:
                same = self.path.stat().st_ino == self._file
            except OSError:
                same = False
            if not same:
                raise LedgerError(
                    f"{self.path} was replaced while it was in use", hint="Stop the agent, and start it again"
                )
            yield

    @contextlib.contextmanager
    def _asking_sqlite(self) -> Iterator[None]:
        """Say in our words what SQLite says: what is on the disk is damaged, or the disk does not do its work."""
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_IOERR) & 0xFF
            if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR, sqlite3.SQLITE_MISMATCH):
                raise LedgerError(f"{self.path} is damaged: {error}", hint=RESTORE) from error
            raise StorageError(
                f"Cannot write {self.path}: {error}",
                hint="Make room on the disk or mend the folder's rights, then run the same command again",
            ) from error


def paths(settings: SiteSettings) -> tuple[Path, Path]:
    """Return where a site's ledger and its head lie."""
    return settings.state / "ledger.db", head_path(settings)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes from writing the ledger. Raises `StorageError` when one does for longer than `PATIENCE`."""
    try:
        file = path.with_suffix(".lock").open("ab")
    except OSError as error:
        raise storage_error(error, path, "write") from error
    with file:
        until = time.monotonic() + PATIENCE
        while not _try(file):
            if time.monotonic() > until:
                raise StorageError(
                    f"Another process has kept {path} for more than {PATIENCE:g} s",
                    hint="Look what holds it (`fuser`), end that, and run the same command again",
                )
            time.sleep(0.002)
        yield


def _try(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
