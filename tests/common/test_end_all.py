"""Ending several processes takes one time, however many of them do not listen."""

from __future__ import annotations

import subprocess
import sys
import time

from consilience.common.child import end_all

DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); signal.pause()"


def test_deaf_processes_are_killed_after_one_time_for_all() -> None:
    deaf = [subprocess.Popen([sys.executable, "-c", DEAF], stdout=subprocess.PIPE) for _ in range(3)]
    polite = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for process in deaf:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
    began = time.monotonic()
    end_all([*deaf, polite, gone], 1.0)
    assert 1.0 <= time.monotonic() - began < 2.9
    assert [process.returncode for process in deaf] == [-9, -9, -9]
    assert (polite.returncode, gone.returncode) == (-15, 0)
    for process in deaf:
        assert process.stdout is not None
        process.stdout.close()
