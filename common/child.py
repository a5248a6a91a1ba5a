"""A process that ends with the one that started it: `python -m consilience.common.child PARENT MODULE ...`.

Lives here: asking Linux for that, from inside the new process, then running the module. Code of ours between fork and
exec would do it too, and may hang where the parent has threads of gRPC. And ending several within one time.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

PR_SET_PDEATHSIG = 1


def child_command(module: str, *arguments: str) -> list[str]:
    """Return the command that runs `module` as `python -m` does, and is killed when this process ends, however.

    `-P`: unlike there, nothing is imported from the current folder, which may be anybody's.
    """
    return [sys.executable, "-P", "-m", "consilience.common.child", str(os.getpid()), module, *arguments]


def end_all(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    """Ask processes side by side to end; kill those that have not after `seconds`, counted once for all."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    until = time.monotonic() + seconds
    for process in processes:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


if __name__ == "__main__":
    parent = int(sys.argv[1])
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before we asked
        sys.exit(1)
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
