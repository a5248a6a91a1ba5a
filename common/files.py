"""Files that survive a crash: atomic writes, digests and a lock per folder; large ones that are read in pieces.

Does not live here: the answer store (server/answers.py), which appends instead of replacing.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import mmap
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from consilience.common.errors import NEW_RUN, RunError, StorageError


def storage_error(error: OSError, path: Path, doing: str) -> StorageError:
    """Return the `StorageError` that says which path could not be written or read, and why."""
    return StorageError(
        f"Cannot {doing} {path}: {error.strerror or type(error).__name__}",
        hint="Make room on the disk or mend the folder's rights, then run the same command again",
    )


@contextlib.contextmanager
def atomic(path: Path, mode: int = 0o666) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path`; when the block ends well, fsync it and rename it to `path`.

    Its rights are `mode`, less what the process takes away (umask).
    Raises `StorageError` when the disk refuses; the file at `path` is then what it was before.
    """
    temporary: Path | None = None
    try:
        make_folder(path.parent)
        temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.part")
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise storage_error(error, path, "write") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


class Resident:
    """How much of memory maps a process has read in small pieces, so that their pages do not pile up in its memory.

    A page that was read stays until the kernel is short of memory; a training reads all of a file, again and again.
    """

    MOST = 32 * 2**20
    """Bytes that may have been read before pages are let go of; what is needed again comes from the disk's cache."""
    AROUND = 2**18
    """Bytes that the kernel maps around a piece that is read, as measured: 16 pages, or a large folio of its cache."""

    def __init__(self) -> None:
        self._read = 0

    def note(self, pieces: int, maps: Iterable[NDArray[Any]], *, long: int = 0) -> None:
        """Note that `pieces` were read of `maps`, made by `numpy.memmap`; lets go of their pages from time to time.

        `long`: bytes that were read in long pieces beside them.
        """
        self._read += pieces * self.AROUND + long
        if self._read < self.MOST:
            return
        self._read = 0
        for mapped in maps:
            base: Any = mapped.base
            if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):  # else the kernel sees to it
                base.madvise(mmap.MADV_DONTNEED)


def create_array(path: Path, dtype: DTypeLike, shape: tuple[int, ...]) -> np.memmap[Any, Any]:
    """Create an .npy file of that shape and return it memory-mapped for writing.

    The disk space is taken at once, so that a full disk is a `StorageError` here and not a crash at a later write.
    """
    try:
        make_folder(path.parent)
        array = np.lib.format.open_memmap(path, "w+", dtype, shape)
        with path.open("rb+") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, path.stat().st_size))
    except OSError as error:
        raise storage_error(error, path, "write") from error
    return array


class RowWriter:
    """Writes rows of an array that `create_array` made, by any thread, without its pages in the process's memory."""

    def __init__(self, path: Path, array: np.memmap[Any, Any]) -> None:
        self._path, self._dtype, self._first = path, array.dtype, array.offset
        self._width = array.dtype.itemsize * int(np.prod(array.shape[1:]))
        self._file = path.open("rb+", buffering=0)

    def put(self, ids: NDArray[np.int64], rows: NDArray[Any]) -> None:
        """Write `rows` (b, ...) to the places `ids` (b,), ascending. Raises `StorageError`."""
        held = np.ascontiguousarray(rows, self._dtype)
        cuts = np.flatnonzero(np.diff(ids) != 1) + 1
        try:
            for part in np.split(np.arange(len(ids)), cuts) if len(ids) else ():
                left = held[part[0] : part[-1] + 1].reshape(-1).view(np.uint8).data
                at = self._first + int(ids[part[0]]) * self._width
                while left:
                    written = os.pwrite(self._file.fileno(), left, at)
                    left, at = left[written:], at + written
        except OSError as error:
            raise storage_error(error, self._path, "write") from error

    def close(self) -> None:
        """Make what was written durable. Raises `StorageError`."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise storage_error(error, self._path, "write") from error
        finally:
            self._file.close()


def make_folder(folder: Path, mode: int = 0o777) -> None:
    """Make `folder` with these rights, unless it is there, and its parents as they always are; each of them durably.

    A file's own folder is not enough: if the power goes, a folder whose name never came to the disk is lost with all
    that is in it. Raises `OSError`.
    """
    if folder.is_dir():
        return
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(mode, parents=True, exist_ok=True)
    for made in reversed(missing):
        sync_folder(made.parent)


def make_private(folder: Path) -> None:
    """Make `folder` durably, for its owner alone, unless it is there; its parents as always. Raises `StorageError`."""
    try:
        make_folder(folder, 0o700)
    except OSError as error:
        raise storage_error(error, folder, "write") from error


def sync_folder(folder: Path) -> None:
    """Make a rename or a new file in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write `data` to `path` atomically, with rights as `atomic` gives them. Raises `StorageError`."""
    with atomic(path, mode) as file:
        file.write(data)


def write_json(path: Path, value: Any, mode: int = 0o666) -> None:
    """Write `value` as readable JSON with sorted keys, as `write_bytes` does. Raises `StorageError`."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode(), mode)


def read_bytes(path: Path, most: int | None = None) -> bytes:
    """Read a file. Raises `StorageError` when it is missing or cannot be read.

    `most`: a file from a stranger has at most so many bytes; a longer one is a `StorageError` too, and is not read.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if most is not None and size > most:
                raise StorageError(f"{path} has more than {most:,} bytes", hint="Get it anew from whoever made it")
            return file.read(-1 if most is None else size)  # not `most`: that many bytes would be taken at once
    except OSError as error:
        raise storage_error(error, path, "read") from error


def read_json(path: Path, most: int | None = None) -> Any:
    """Read what `write_json` wrote, as `read_bytes` does. Raises `StorageError` when it is damaged."""
    data = read_bytes(path, most)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:  # the latter: brackets within brackets, thousands deep
        raise StorageError(
            f"{path} is not JSON", hint="Remove it and run the same command again to write it anew"
        ) from error


def canonical_json(value: Any) -> bytes:
    """Return the one byte string that stands for `value` in digests: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256(data: bytes | memoryview) -> str:
    """Return the SHA-256 of `data` in lower-case hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, read in pieces. Raises `StorageError`."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise storage_error(error, path, "read") from error


@contextlib.contextmanager
def lock(folder: Path, hint: str = f"Wait for it, or start {NEW_RUN}") -> Iterator[None]:
    """Hold `folder` for this process alone; the lock goes with the process, however it ends.

    Raises `RunError`, with this `hint`, when another process holds it.
    """
    try:
        make_folder(folder)
        file = (folder / ".lock").open("ab")
    except OSError as error:
        raise storage_error(error, folder, "write") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(
                f"Another process is working in {folder}",
                hint=hint,
            ) from error
        for stale in folder.rglob(".*.part"):  # what a crash left half-written; nobody else is at work here
            stale.unlink(missing_ok=True)
        yield
