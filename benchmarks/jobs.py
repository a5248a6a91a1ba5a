"""What benchmarks of whole jobs share: training sites that are there, and doing a job with them."""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
from flwr.app import Context, RecordDict

from consilience.client.app import app as client_app
from consilience.client.app import forget_sites
from consilience.common.files import read_json, write_json
from consilience.common.progress import Reporter
from consilience.common.settings import JobSettings
from consilience.common.settings_file import dump_settings
from consilience.deploy.local_grid import SERVER_NODE, LocalGrid
from consilience.deploy.simulation import train_site
from consilience.server.app import app as server_app

Task = TypeVar("Task")
Result = TypeVar("Result")
Measure = Callable[[int, Path], dict[str, Any]]
"""Figures under a seed, from files in a folder; what processes can hand each other."""


def do_job(settings: JobSettings, run: Path, paths: list[Path]) -> dict[str, Any]:
    """Do a job in the folder `run` with the sites at `paths`, unless that is done, and return its report."""
    if not (run / "report.json").exists():
        run.mkdir(parents=True, exist_ok=True)
        dump_settings(settings, run / "job.yaml")
        forget_sites()
        with LocalGrid(client_app, [{"site": str(path)} for path in paths], workers=1) as grid:
            about = {"run": str(run), "quiet": True}
            context = Context(run_id=1, node_id=SERVER_NODE, node_config={}, state=RecordDict(), run_config=about)
            server_app(grid=grid, context=context)
    return dict(read_json(run / "report.json"))


def train_quietly(paths: Sequence[Path]) -> None:
    """Train the sites at `paths`, those that are not trained yet, one after another."""
    with Reporter() as reporter:
        for path in paths:
            train_site(path, reporter)


def all_of(do: Callable[[Task], Result], tasks: Sequence[Task], *, quick: bool) -> Iterator[Result]:
    """Yield what `do` gives of each task, done in processes of their own; `quick`: here, without starting any."""
    if quick:
        yield from map(do, tasks)
        return
    cores = os.cpu_count() or 1
    workers = min(cores, len(tasks)) or 1
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(cores // workers,)) as pool:
        yield from pool.map(do, tasks)


def by_seed(
    arguments: argparse.Namespace,
    measures: Mapping[str, Measure],
    told: Callable[[dict[str, Any]], object],
    seeds: int | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Return what each measure gives under each seed, by name: `seeds` of them, or as many as --seeds says.

    A measure gets the seed and a folder for its files. Its figures are kept in the folder --work as NAME-SEED.json, and
    not measured again. One process does one of them, as many at a time as there are cores, in the order of seeds: a
    part says something of all. `told` of the figures is printed once a measurement is there.
    """
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in measures}
    with tempfile.TemporaryDirectory() as temporary:
        work = (arguments.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        every = range(1 if arguments.quick else seeds or arguments.seeds)
        tasks = [(name, measure, seed, work) for seed in every for name, measure in measures.items()]
        for (name, _, seed, _), figures in zip(tasks, all_of(_kept, tasks, quick=arguments.quick), strict=True):
            print(f"{name}, seed {seed}: {told(figures)}", file=sys.stderr)
            found[name].append(figures)
    return found


def students(figures: dict[str, Any]) -> dict[str, float]:
    """Return the accuracy of each student of a measurement, rounded to be shown."""
    return {name: round(told["student"], 3) for name, told in figures.items()}


def _kept(task: tuple[str, Measure, int, Path]) -> dict[str, Any]:
    """Return the figures that are there, measured if they are not."""
    name, measure, seed, work = task
    bare = f"{re.sub('[^A-Za-z0-9-]+', '-', name)}-{seed}"
    done = work / f"{bare}.json"
    if not done.exists():
        write_json(done, measure(seed, work / bare))
    return dict(read_json(done))
