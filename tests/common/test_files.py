"""Files that survive a crash, and a disk that refuses."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from consilience.common import files
from consilience.common.errors import RunError, StorageError
from consilience.common.identity import write_secret
from helpers.disk import Disk


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "value.json"
    files.write_json(path, {"a": 1})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"Cannot write .*value\.json: No space left on device"):
        files.write_json(path, {"a": 2})
    assert files.read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_an_exception_inside_the_block_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "value"
    with pytest.raises(ZeroDivisionError), files.atomic(path) as file:
        file.write(b"half" * (1 // 0))
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_read_says_so(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="Cannot read"):
        files.read_json(tmp_path / "missing")
    (tmp_path / "bad").write_text("{")
    with pytest.raises(StorageError, match="is not JSON"):
        files.read_json(tmp_path / "bad")
    (tmp_path / "deep").write_bytes(b"[" * 100_000)
    with pytest.raises(StorageError, match="deep is not JSON"):
        files.read_json(tmp_path / "deep")
    (tmp_path / "long").write_bytes(b"[1, 2]")
    assert files.read_json(tmp_path / "long", 6) == [1, 2]
    with pytest.raises(StorageError, match="long has more than 5 bytes"):
        files.read_json(tmp_path / "long", 5)
    with pytest.raises(StorageError, match="Cannot read"):
        files.sha256_file(tmp_path / "missing")


def test_equal_values_have_equal_bytes() -> None:
    assert files.canonical_json({"b": [1, 2.5], "a": "é"}) == '{"a":"é","b":[1,2.5]}'.encode()
    assert files.sha256(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.canonical_json(float("nan"))


def test_a_lock_keeps_a_second_process_out_and_goes_with_the_first(tmp_path: Path) -> None:
    code = f"""
import time, pathlib
from consilience.common.files import lock
with lock(pathlib.Path({str(tmp_path)!r})):
    print("held", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunError, match="Another process"), files.lock(tmp_path):
            pass
        other.kill()
    with files.lock(tmp_path):
        pass


def test_an_array_on_a_full_disk_is_an_error_not_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = files.create_array(tmp_path / "a.npy", np.float32, (3, 2))
    array[:] = 7
    array.flush()
    assert np.load(tmp_path / "a.npy").tolist() == [[7, 7]] * 3
    assert (tmp_path / "a.npy").stat().st_blocks * 512 >= 24

    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StorageError, match="No space left"):
        files.create_array(tmp_path / "b.npy", np.float32, (3, 2))


def test_a_written_file_has_the_rights_that_the_user_s_umask_gives(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        files.write_bytes(tmp_path / "a", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_rows_are_written_to_their_places(tmp_path: Path) -> None:
    array = files.create_array(tmp_path / "rows.npy", np.float32, (10, 3))
    writer = files.RowWriter(tmp_path / "rows.npy", array)
    rows = np.arange(15.0).reshape(5, 3)
    ids = np.array([1, 2, 5, 8, 9])
    writer.put(ids, rows)  # of another type, in three runs
    writer.put(np.empty(0, np.int64), np.empty((0, 3)))
    writer.close()
    found = np.load(tmp_path / "rows.npy")
    np.testing.assert_array_equal(found[ids], rows.astype(np.float32))
    assert not found[[0, 3, 4, 6, 7]].any()


def test_rows_that_the_disk_refuses_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = files.create_array(tmp_path / "rows.npy", np.float32, (4, 3))
    writer = files.RowWriter(tmp_path / "rows.npy", array)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StorageError, match=r"rows\.npy"):
        writer.put(np.array([0]), np.zeros((1, 3), np.float32))
    writer.close()


@pytest.mark.parametrize(
    "write",
    [
        lambda path: files.write_bytes(path, b"1"),
        lambda path: write_secret(path, b"1"),
        lambda path: files.make_private(path.parent),
        lambda path: files.make_folder(path.parent),
        lambda path: files.create_array(path, np.uint8, (3,)),
        lambda path: contextlib.ExitStack().enter_context(files.lock(path.parent)),
    ],
)
@pytest.mark.parametrize("there", ["", "a", "a/b/c"])
def test_the_power_takes_no_folder_that_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str, write: Callable[[Path], object]
) -> None:
    (tmp_path / there).mkdir(parents=True, exist_ok=True)
    disk = Disk(monkeypatch)
    write(tmp_path / "a" / "b" / "c" / "file")
    assert (tmp_path / "a" / "b" / "c").is_dir()
    assert disk.unsure == set()


def test_a_folder_for_its_owner_has_parents_as_always(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    files.make_private(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode
    files.make_private(tmp_path / "a")  # as it was
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="Cannot write"):
        files.make_private(tmp_path / "file" / "a")
