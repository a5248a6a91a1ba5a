"""The benchmarks run at their quick size and write their figures. Their claims are judged at full size, by hand.

Those that kill processes or train many teachers take minutes even so, and are left to hand too; so is what needs
packages or images of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "answer_encodings",
        "answering",
        "canaries",
        "common_feature",
        "coverage",
        "feature_memory",
        "fuzz_decoders",
        "hundred_thousand",
        "ledger",
        "privacy",
        "secure_sums",
        "student",
        "transport",
        "unify",
    ],
)
def test_a_benchmark_runs(name: str, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--quick", "--json", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(file.read_text())
    assert len(figures) >= 2
    assert "machine" in figures
