"""A process that says who it is and then does nothing: `python -m helpers.idle FILE`."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    Path(sys.argv[1]).write_text(str(os.getpid()))
    time.sleep(60)
