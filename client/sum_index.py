"""What was summed: of every image, with each teacher, the sum that it belongs to; and how far each sum is.

Lives here: the rule that of an image one sum is opened, whatever pool it lies in. Does not live here: keys, masks and
rounds, which are kept one file a sum (client/sums). An SQLite file with three small numbers and 8 bytes an image, so
that no call reads more than it asks about. Whoever uses it holds the lock of its folder.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np

from consilience.common.errors import ProtocolError, StorageError
from consilience.common.files import lock, storage_error, write_json
from consilience.common.pool import Pool
from consilience.common.sums.messages import Terms

State = Literal["keys", "given", "opened", "dropped"]
"""Keys were made; masked rows were given; shares were opened; rows were given and the keys are forgotten."""
DIGEST_BYTES = 8
"""Enough that of 100 million images no two are taken for one with odds 3,700 to 1; if two were, a sum is refused."""
MOST_OPEN = 32
"""Sums that are not opened of which keys are kept, among those without rows and among those with. Older ones go."""
_NO_GROUND = -1
"""The ground of images whose sum is given up: that of no sum's terms."""
_BLOCK = 500
_POOL_BYTES = 16 * 2**20
_FILE = "index.sqlite"
_TABLES = """
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS sums (number INTEGER PRIMARY KEY, terms TEXT NOT NULL UNIQUE, state TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS states ON sums (state);
CREATE TABLE IF NOT EXISTS digests (number INTEGER PRIMARY KEY, digest TEXT NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS images (
    digest INTEGER NOT NULL, teacher INTEGER NOT NULL, ground INTEGER NOT NULL, opened INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (digest, teacher)
) WITHOUT ROWID;
COMMIT;
"""


def image_digests(pool: Pool) -> bytes:
    """Return 8 bytes a sample of a pool, one after the other: the same for the same image in any pool."""
    shape = repr(pool.shape).encode()
    return b"".join(
        hashlib.blake2b(image.tobytes(), digest_size=DIGEST_BYTES, key=shape).digest()
        for _, images in pool.blocks(max(1, _POOL_BYTES // pool.sample_bytes))
        for image in images
    )


def forget_unopened(folder: Path) -> None:
    """Give up the sums of a folder that are not opened: the answers are put aside.

    A classifier that never says the same twice would else put other answers under the same masks, or into another
    attempt at the same sum: the difference tells of them. Sums with keys alone are given up too, since rows may have
    left under them of which an older copy does not tell. Raises `RunError` while another process works in the folder,
    `StorageError` when the index is gone or damaged.
    """
    if not (folder / _FILE).exists() and next(folder.glob("*.json"), None) is None:
        return
    with lock(folder), SumIndex.open(folder) as index:
        given_up = index.give_up()
        if given_up:  # also so that a lost index is noticed where no record is left
            write_json(folder / "given-up.json", {"terms": given_up})
        for terms in given_up:
            path = folder / f"{terms}.json"
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise storage_error(error, path, "remove") from error
            index.drop(terms)


class SumIndex:
    """The index of one folder of sums, open for one turn."""

    def __init__(self, path: Path, database: sqlite3.Connection) -> None:
        self._path, self._database = path, database

    @classmethod
    @contextmanager
    def open(cls, folder: Path) -> Iterator[SumIndex]:
        """Open the index of `folder`, or begin one where there is no sum yet.

        Raises `StorageError` when it is gone or damaged: what was summed cannot be known then.
        """
        path = folder / _FILE
        fresh = next(folder.glob("*.json"), None) is None
        if not fresh and not path.exists():
            raise _lost(path, "is gone, and sums are there")
        try:
            database = sqlite3.connect(path, isolation_level=None)
            try:
                database.execute("PRAGMA synchronous = EXTRA")
                if fresh:  # also after a crash while it was made
                    database.executescript(_TABLES)
                yield cls(path, database)
            finally:
                database.close()
        except sqlite3.Error as error:
            raise _lost(path, f"cannot be used: {error}") from error

    @property
    def version(self) -> int:
        """A number that is another one after each `bind` and `give_up`."""
        (number,) = self._database.execute("PRAGMA user_version").fetchone()
        return int(number)

    def _count_version(self) -> None:
        self._database.execute(f"PRAGMA user_version = {(self.version + 1) % 2**31}")

    def state(self, terms: str) -> State | None:
        """Return how far the sum with these terms' digest is; None when no keys were made for it."""
        row = self._database.execute("SELECT state FROM sums WHERE terms = ?", (terms,)).fetchone()
        return None if row is None else row[0]

    def need(self, told: Mapping[str, State]) -> None:
        """Raise `StorageError` unless every sum that was `told` of, by its terms' digest, is that far here too."""
        for terms, state in told.items():
            held = self.state(terms)
            if held in (None, "keys") or (state == "opened" and held != "opened"):
                raise _lost(self._path, "is lost or an older copy: the ledger tells of sums that it does not know")

    def begin(self, terms: str) -> None:
        """Note that keys are made for a sum."""
        self._database.execute("INSERT OR IGNORE INTO sums (terms, state) VALUES (?, 'keys')", (terms,))

    def superfluous(self) -> list[str]:
        """Return the digests of sums of which no keys need be kept: beyond `MOST_OPEN` that were not opened.

        Nothing depends on them: their images stay bound to what they were given for.
        """
        query = "SELECT terms FROM sums WHERE state = ? ORDER BY number DESC LIMIT -1 OFFSET ?"
        return [
            row[0]
            for state in ("keys", "given")
            for row in self._database.execute(query, (state, MOST_OPEN)).fetchall()
        ]

    def drop(self, terms: str) -> None:
        """Note that the keys of a sum are gone."""
        if self.state(terms) == "given":
            self._database.execute("UPDATE sums SET state = 'dropped' WHERE terms = ?", (terms,))
        else:
            self._database.execute("DELETE FROM sums WHERE terms = ?", (terms,))

    def give_up(self) -> list[str]:
        """Let no image of a sum that is not opened be summed again; return the digests of those that have keys."""
        self._database.execute("UPDATE images SET ground = ? WHERE opened = 0", (_NO_GROUND,))
        self._count_version()
        query = "SELECT terms FROM sums WHERE state IN ('keys', 'given')"
        return [row[0] for row in self._database.execute(query).fetchall()]

    def refuse_second(self, terms: Terms, teacher: str, images: bytes) -> None:
        """Raise `ProtocolError` when another sum of some of the images, with the same teacher, was opened or begun.

        `images`: of the terms' samples, as `image_digests` gives them. Begun is one for which masked rows were given:
        others may open it without this site. Another attempt at it by just the same sites may go on, for those who open
        the two are then never all others.
        """
        numbers = self._number(teacher), self._number(terms.ground)
        row = self._database.execute("SELECT number FROM sums WHERE terms = ?", (terms.digest,)).fetchone()
        own = 0 if row is None else row[0]
        for block in _blocks(images):
            found = self._database.execute(
                f"SELECT 1 FROM images WHERE digest IN ({_places(block)}) AND teacher = ? "
                "AND (ground <> ? OR opened NOT IN (0, ?)) LIMIT 1",
                (*block, *numbers, own),
            )
            if found.fetchone() is not None:
                raise _summed_before()

    def bind(self, terms: Terms, teacher: str, images: bytes, state: Literal["given", "opened"]) -> None:
        """Bind the images to this sum, which is on the disk when this returns. Raises as `refuse_second` does."""
        self._database.execute("BEGIN IMMEDIATE")
        try:
            self._database.executemany(
                "INSERT OR IGNORE INTO digests (digest) VALUES (?)", [(teacher,), (terms.ground,)]
            )
            (own,) = self._database.execute("SELECT number FROM sums WHERE terms = ?", (terms.digest,)).fetchone()
            numbers = f"{self._number(teacher)}, {self._number(terms.ground)}, {own if state == 'opened' else 0}"
            # One statement a block that checks and writes: a statement an image took most of what a sum costs its site.
            for block in _blocks(images):
                rows = ",".join([f"(?, {numbers})"] * len(block))
                written = self._database.execute(
                    f"INSERT INTO images (digest, teacher, ground, opened) VALUES {rows} ON CONFLICT DO UPDATE "
                    "SET opened = max(opened, excluded.opened) WHERE ground = excluded.ground AND opened IN (0, ?)",
                    (*block, own),
                )
                if written.rowcount != len(block):
                    raise _summed_before()
            self._database.execute("UPDATE sums SET state = ? WHERE number = ?", (state, own))
            self._count_version()
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")

    def _number(self, digest: str) -> int:
        """Return the small number that stands for a digest; 0 when none does."""
        row = self._database.execute("SELECT number FROM digests WHERE digest = ?", (digest,)).fetchone()
        return 0 if row is None else int(row[0])


def _blocks(images: bytes) -> Iterator[list[int]]:
    """Yield the images' digests as the index has them, each once, in its order: neighbours lie on the same page."""
    values = np.sort(np.frombuffer(images, "<i8"))  # np.unique takes ten times as long
    ordered = values[np.diff(values, prepend=~values[:1]) != 0].tolist()
    for start in range(0, len(ordered), _BLOCK):
        yield ordered[start : start + _BLOCK]


def _places(block: list[int]) -> str:
    return ",".join("?" * len(block))


def _summed_before() -> ProtocolError:
    return ProtocolError("Some of these samples were summed before: two sums tell more than one")


def _lost(path: Path, what: str) -> StorageError:
    return StorageError(
        f"{path} {what}", hint="Restore it; without it this site may open more than one sum of the same samples"
    )
