"""The server's Flower ServerApp: does the job of the run folder that the run configuration names.

Does not live here: the stages (server/job), and who starts the app (deploy/ and the runner).
"""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from consilience.common.progress import Reporter
from consilience.server.job import Job
from consilience.server.settings import Home

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the job in the folder `context.run_config["run"]` to its end, from wherever an earlier run stopped.

    With `fold-in` in the run configuration, sites that were not there when the run began join it. `submission` there
    says when the run was submitted: asking goes on for the same one and begins anew for another, or without it. `home`
    there names the server's folder.
    """
    quiet = bool(context.run_config.get("quiet", False))
    fold_in = bool(context.run_config.get("fold-in", False))
    submission = float(context.run_config.get("submission", 0.0))
    home = Home(Path(str(named))) if (named := context.run_config.get("home")) else None
    with Reporter(quiet=quiet) as reporter:
        job = Job.open(Path(str(context.run_config["run"])), reporter, home)
        job.do(grid, fold_in=fold_in, submission=submission)
