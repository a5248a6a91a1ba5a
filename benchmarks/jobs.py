"""What benchmarks of whole jobs share: training sites that are there, and doing a job with them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from flwr.app import Context, RecordDict

from consilience.client.app import app as client_app
from consilience.client.app import forget_sites
from consilience.common.files import read_json
from consilience.common.progress import Reporter
from consilience.common.settings import JobSettings
from consilience.common.settings_file import dump_settings
from consilience.deploy.local_grid import SERVER_NODE, LocalGrid
from consilience.deploy.simulation import train_site
from consilience.server.app import app as server_app

Task = TypeVar("Task")
Result = TypeVar("Result")


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


def train_quietly(path: Path) -> None:
    """Train the site at `path`, as it is done in a process of its own."""
    with Reporter() as reporter:
        train_site(path, reporter)


def all_of(do: Callable[[Task], Result], tasks: Sequence[Task], *, quick: bool) -> list[Result]:
    """Return what `do` gives of each task, done in processes of their own; `quick`: here, without starting any."""
    if quick:
        return [do(task) for task in tasks]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        return list(pool.map(do, tasks))
