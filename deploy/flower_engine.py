"""The whole job on Flower's own simulation engine (Ray): hundreds of virtual sites, or a Ray cluster.

Lives here: what differs from the in-process engine, which is who carries the messages and in which process a site
answers. Does not live here: preparing the run and its sites (deploy/simulation).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from consilience.client.app import app as client_app
from consilience.common.errors import MissingExtraError
from consilience.common.files import lock
from consilience.common.progress import Reporter
from consilience.common.settings import JobSettings
from consilience.deploy.simulation import prepare_run, server_home
from consilience.server.job import Job


class PlacedApp(ClientApp):
    """The sites' ClientApp for an engine that numbers its nodes: node i is the i-th of `sites`."""

    def __init__(self, sites: Sequence[Path]) -> None:
        super().__init__()
        self._sites = tuple(str(path) for path in sites)

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer a message as the site of the node that it went to."""
        context.node_config["site"] = self._sites[int(context.node_config["partition-id"])]
        return client_app(message, context)


def simulate_on_flower(job: JobSettings, run: Path, reporter: Reporter) -> None:
    """Do `job` in the folder `run` on Flower's engine, from wherever an earlier run of the same job stopped.

    As many sites answer side by side as the machine, or the Ray cluster in RAY_ADDRESS, has cores for. Raises
    `MissingExtraError` without the extra `simulation`, and whatever the stages raise.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or Ray warns that it will be so one day
    try:
        import ray  # noqa: F401
        from flwr.simulation import run_simulation
    except ImportError as error:
        raise MissingExtraError(
            "Flower's simulation engine needs Ray, which is not installed",
            hint="Type: pip install 'consilience[simulation]'",
        ) from error
    run = run.resolve()
    failures: list[BaseException] = []
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            Job.open(run, reporter, server_home(run)).do(grid)
        except BaseException as error:  # the engine would tell its own story of it
            failures.append(error)

    with lock(run):
        _, sites = prepare_run(job, run, reporter)
        logging.getLogger("flwr").setLevel(logging.ERROR)
        run_simulation(
            server_app=server_app,
            client_app=PlacedApp(sites),
            num_supernodes=len(sites),
            backend_config={
                "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
                "init_args": {"logging_level": "error", "log_to_driver": False, "include_dashboard": False},
            },
        )
    if failures:
        raise failures[0]
