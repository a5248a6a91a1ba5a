"""What every benchmark shares: its options, its table, its JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def options(
    description: str | None, add: Callable[[argparse.ArgumentParser], None] | None = None
) -> argparse.Namespace:
    """Read --json, --quick and what `add` adds; start over with the command line's thread policy if none is set."""
    if "OMP_WAIT_POLICY" not in os.environ:  # torch reads it once, when it is imported
        os.execve(sys.executable, sys.orig_argv, {**os.environ, "OMP_WAIT_POLICY": "passive"})
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--quick", action="store_true", help="a small size, to see that it runs")
    if add is not None:
        add(parser)
    return parser.parse_args()


def add_seeds(parser: argparse.ArgumentParser, seeds: int = 5) -> None:
    """Add the options of a benchmark under several seeds that keeps what is done."""
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="keep runs and figures here, and go on from them")
    parser.add_argument("--seeds", type=int, default=seeds)


def show(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], figures: dict[str, Any], path: Path | None
) -> None:
    """Print a table and write the figures, with the machine they were measured on."""
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*(cell if isinstance(cell, str) else f"{cell:,.4g}" for cell in row))
    Console(highlight=False, width=120).print(table)
    if path is not None:
        write(figures, path)


def write(figures: dict[str, Any], path: Path) -> None:
    """Write the figures, with the machine they were measured on."""
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    path.write_text(json.dumps({**figures, "machine": machine}, indent=2) + "\n")
