"""One run of a job over a SuperLink, in a process of its own: `python -m consilience.server.runner HOME`.

The process reads the run's folder and what was submitted from standard input, so that it can be started, and torch
imported, before there is a run. It may be killed at any moment.

Lives here: a Flower run for the job, another one whenever the link is lost, the same ServerApp as everywhere. Does not
live here: the stages (server/job), which run is next (server/service).
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

from consilience.common.errors import ConsilienceError, ServerError
from consilience.common.files import lock
from consilience.common.progress import Reporter
from consilience.server.app import app
from consilience.server.grid import Claim, LinkLostError
from consilience.server.runs import Failure, Run, Submitted
from consilience.server.settings import Home
from consilience.server.superlink import Control, Endpoint

RETRY_SECONDS = 1.0
"""Pause before another Flower run is started after the link was lost."""


def do_run(endpoint: Endpoint, run: Run, submitted: Submitted) -> None:
    """Do what was submitted to its end, over as many Flower runs as it takes. Raises any `ConsilienceError`."""
    configuration: dict[str, bool | float | int | str] = {
        "run": str(run.folder),
        "home": str(endpoint.home.folder),
        "quiet": not sys.stderr.isatty(),
        "fold-in": submitted.fold_in,
        "submission": submitted.time,
    }
    while True:
        try:
            with Control(endpoint) as control:
                flower_run = control.start_run()
            with Claim(endpoint, flower_run) as claim:
                claim.context.run_config = {**claim.context.run_config, **configuration}
                app(grid=claim.grid, context=claim.context)
                return
        except LinkLostError as error:
            _say(f"{error.message}; starting again")
        except ServerError as error:
            _say(f"Waiting for the SuperLink: {error.message}")
        time.sleep(RETRY_SECONDS)


def _say(line: str) -> None:
    with Reporter() as reporter:
        reporter.say(line)


def main(home: Path, control_port: int, folder: Path, submitted: Submitted) -> int:
    """Do the run and return the exit code; a failure is left in RUN/failure.json for the server."""
    run = Run(folder)
    (folder / "failure.json").unlink(missing_ok=True)
    try:
        with lock(folder / "answers"):
            do_run(Endpoint(Home(home), control_port), run, submitted)
    except ConsilienceError as error:
        (folder / "failure.json").write_text(Failure.of(error).model_dump_json())
        _say(f"Error ({error.name}, {error.exit_code}): {error}")
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    folder, submission = sys.stdin.readline().strip(), sys.stdin.readline()
    if not folder:  # nothing came: the server has ended
        sys.exit(0)
    about = Submitted.model_validate_json(submission)
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), Path(folder), about))
