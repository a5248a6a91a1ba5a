"""Jobs done in this process, by sites that are functions (helpers.sites): their folder, their settings, their run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from consilience.common.data import from_arrays
from consilience.common.files import read_json
from consilience.common.pool import Pool
from consilience.common.progress import Reporter
from consilience.common.settings import JobSettings
from consilience.common.settings_file import dump_settings, parse_settings
from consilience.server.job import Job
from helpers.sites import Sites, grid_of

QUICK: dict[str, Any] = {
    "name": "job",
    "pool": "pool",
    "ask": {"encoding": "f32", "question_size": 16, "retries": 0},
    "student": {"architecture": "cnn3", "fit": {"epochs": 1, "precision": "f32", "augment": False}},
    "judge": {"test": {"kind": "npz", "path": "test.npz"}},
}
JUDGED: dict[str, Any] = {"judge": {"test_pool": "test-pool", "pool_labels": "labels.npy"}}
"""What sections say where `build_home` was given a test pool and the pool's labels."""


def build_home(
    home: Path,
    pool: NDArray[np.uint8],
    test: NDArray[np.uint8],
    truth: ArrayLike,
    names: Sequence[str],
    *,
    pool_labels: ArrayLike | None = None,
    test_pool: bool = True,
) -> Path:
    """Write pool, test.npz, and, where asked for, test-pool and labels.npy into `home`; returns it."""
    Pool.build(from_arrays(pool, None, (), where="test"), home / "pool")
    if test_pool:
        Pool.build(from_arrays(test, None, (), where="test"), home / "test-pool")
    np.savez(home / "test.npz", x=test, y=truth, names=np.array(list(names)))
    if pool_labels is not None:
        np.save(home / "labels.npy", pool_labels)
    return home


def noise(seed: int, *counts: int) -> list[NDArray[np.uint8]]:
    """Return so many images of 16 x 16 each, drawn one after another."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (count, 16, 16), np.uint8) for count in counts]


def job_settings(home: Path, *changes: Mapping[str, Any]) -> JobSettings:
    """Return `QUICK` with changes, section by section, the later ones before the earlier."""
    raw = dict(QUICK)
    for change in changes:
        for key, value in change.items():
            raw[key] = {**raw.get(key, {}), **value} if isinstance(value, Mapping) else value
    return parse_settings(raw, JobSettings, source="job.yaml", folder=home)


def run_job(
    home: Path, sites: Sites, settings: JobSettings, reporter: Reporter, run: str = "run", **how: Any
) -> dict[str, Any]:
    """Do a job in `home`/`run`, or go on with it; returns its report. `how`: what `Job.do` takes beside the sites."""
    folder = home / run
    folder.mkdir(exist_ok=True)
    dump_settings(settings, folder / "job.yaml")
    with grid_of(sites) as grid:
        Job.open(folder, reporter).do(grid, **how)
    report: dict[str, Any] = read_json(folder / "report.json")
    return report
