"""What every benchmark shares: its options, its table, its JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def options(description: str | None) -> argparse.Namespace:
    """Read --json FILE and --quick; start over with the thread policy of the command line where it is not set."""
    if "OMP_WAIT_POLICY" not in os.environ:  # torch reads it once, when it is imported
        os.execve(sys.executable, sys.orig_argv, {**os.environ, "OMP_WAIT_POLICY": "passive"})
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--quick", action="store_true", help="a small size, to see that it runs")
    return parser.parse_args()


def show(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], figures: dict[str, Any], path: Path | None
) -> None:
    """Print a table and write the figures, with the machine they were measured on."""
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*(cell if isinstance(cell, str) else f"{cell:,.4g}" for cell in row))
    Console(highlight=False, width=120).print(table)
    if path is not None:
        machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        path.write_text(json.dumps({**figures, "machine": machine}, indent=2) + "\n")
