"""The server's Flower ServerApp: does the job of the run folder that the run configuration names.

Does not live here: the stages (server/job), and who starts the app (deploy/ and the runner).
"""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from consilience.common.progress import Reporter
from consilience.server.job import Job

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the job in the folder `context.run_config["run"]` to its end, from wherever an earlier run stopped."""
    quiet = bool(context.run_config.get("quiet", False))
    with Reporter(quiet=quiet) as reporter:
        Job.open(Path(str(context.run_config["run"])), reporter).do(grid)
