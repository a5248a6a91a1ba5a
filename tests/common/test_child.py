"""A child process ends with its parent, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from consilience.common.child import child_command

PARENT = """
import subprocess, sys, time
from consilience.common.child import child_command
child = subprocess.Popen(child_command("helpers.idle", sys.argv[1]))
time.sleep(60)
"""


def gone(pid: int) -> bool:
    """Whether a process has ended, a zombie included."""
    try:
        return "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True


def test_a_child_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(file)], env=environment)
    until = time.monotonic() + 30
    while not (file.exists() and file.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    child = int(file.read_text())
    assert not gone(child)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while not gone(child) and time.monotonic() < until:
        time.sleep(0.05)
    assert gone(child)


def test_a_child_whose_parent_is_gone_already_does_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "consilience.common.child", "1", "helpers.idle", str(tmp_path / "pid")]
    assert subprocess.run(command, check=False, timeout=30).returncode == 1
    assert not (tmp_path / "pid").exists()


def test_nothing_is_imported_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ctypes", "runpy", "signal", "consilience"):
        (tmp_path / f"{name}.py").write_text("import os; os._exit(66)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    ended = subprocess.run(child_command("consilience", "--version"), check=False, timeout=60, capture_output=True)
    assert (ended.returncode, ended.stdout[:11]) == (0, b"consilience")
