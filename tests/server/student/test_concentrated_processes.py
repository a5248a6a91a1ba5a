"""A head of verticals taught by two processes with gloo, as torchrun starts them on several GPUs with nccl."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

SCRIPT = Path(__file__).parents[2] / "helpers" / "concentrated_process.py"


def gradients(folder: Path, processes: int) -> list[dict[str, np.ndarray]]:
    """What each process holds after a step."""
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*command, str(SCRIPT), str(folder)], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    return [dict(np.load(folder / f"{rank}.npz")) for rank in range(processes)]


def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    (alone,) = gradients(tmp_path / "one", 1)
    first, second = gradients(tmp_path / "two", 2)
    assert len(alone) == 2 + 3 + 3
    for name, held in alone.items():
        assert np.abs(held).max() > 0, name
        np.testing.assert_array_equal(first[name], second[name])
        np.testing.assert_allclose(first[name], held, rtol=1e-5, atol=1e-6)
