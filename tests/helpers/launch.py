"""Run a module as `python -m` would, in a process that ends with its parent: `python -m helpers.launch MODULE ...`.

The process asks for that itself: code that runs between fork and exec may hang where gRPC has threads in the parent.
"""

from __future__ import annotations

import ctypes
import runpy
import signal
import sys

if __name__ == "__main__":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
