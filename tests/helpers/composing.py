"""Multi-label images as benchmarks/composed.py makes them."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # at the end: benchmarks/coverage.py is no library

from composed import ATTRIBUTES, compose

__all__ = ["ATTRIBUTES", "compose"]
