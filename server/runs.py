"""The server's list of runs: one folder a run, and what people and the server said about it.

Lives here: RUN/submitted.json (written by `submit`), RUN/stop.json (by `stop`) and RUN/state.json (by the server
alone), so that no two processes write one file. Does not live here: doing a run (server/runner).
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from consilience.common.errors import REGISTRY, ConsilienceError, RunError
from consilience.common.files import canonical_json, read_json, sha256, write_json
from consilience.common.settings import NAME_PATTERN, JobSettings
from consilience.common.settings_file import dump_settings, load_settings

State = Literal["queued", "running", "done", "failed", "stopped"]


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Submitted(_File):
    """What `submit` asked for last."""

    token: str
    time: float
    fold_in: bool = False


class Failure(_File):
    """Why a run failed."""

    code: int
    name: str
    message: str
    hint: str

    @classmethod
    def of(cls, error: ConsilienceError) -> Failure:
        """Return the failure that an error is."""
        return cls(code=error.exit_code, name=error.name, message=error.message, hint=error.hint)


class RunState(_File):
    """How a run stands, as the server wrote it last."""

    state: State
    submitted: float
    """The submission this is about: an older one than the file's means that the server has not seen it yet."""
    since: float
    failure: Failure | None = None


class Run:
    """One run folder of a server."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name

    @property
    def submitted(self) -> Submitted:
        """What was asked for."""
        return Submitted.model_validate(read_json(self.folder / "submitted.json"))

    @property
    def state(self) -> RunState:
        """How it stands; queued when the server has not seen the last submission yet."""
        submitted = self.submitted
        path = self.folder / "state.json"
        held = RunState.model_validate(read_json(path)) if path.exists() else None
        if held is None or held.submitted < submitted.time:
            return RunState(state="queued", submitted=submitted.time, since=submitted.time)
        return held

    def set(self, state: State, failure: Failure | None = None) -> None:
        """Write the state. For the server alone."""
        held = RunState(state=state, submitted=self.submitted.time, since=time.time(), failure=failure)
        write_json(self.folder / "state.json", held.model_dump(mode="json"))

    @property
    def stop_wanted(self) -> bool:
        """Whether somebody asked to stop the run since it was submitted last."""
        path = self.folder / "stop.json"
        return path.exists() and float(read_json(path)["time"]) > self.submitted.time

    def stop(self) -> None:
        """Ask the server to stop the run."""
        write_json(self.folder / "stop.json", {"time": time.time()})

    def need_done(self) -> dict[str, Any]:
        """Return report.json of a run that is done. Raises why there is none."""
        state, found = self.state, self.report
        if state.failure is not None:
            kind = REGISTRY.get(state.failure.code, ConsilienceError)
            raise kind(f"Run {self.name} failed: {state.failure.message}", hint=state.failure.hint)
        if state.state != "done" or found is None:
            raise RunError(
                f"Run {self.name} is {state.state} and has no report", hint="Type `consilience server status`"
            )
        return found

    @property
    def progress(self) -> dict[str, Any]:
        """Stage and sites as the job wrote them last; empty before it began."""
        path = self.folder / "progress.json"
        return dict(read_json(path)) if path.exists() else {}

    @property
    def report(self) -> dict[str, Any] | None:
        """report.json, when the run is done."""
        path = self.folder / "report.json"
        return dict(read_json(path)) if path.exists() else None


def token_of(job: JobSettings) -> str:
    """Return the token of a job: the same settings, but for how many sites are enough and when, give the same one."""
    return sha256(canonical_json(job.identity()))[:12]


def submit(home: Path, job: JobSettings, *, token: str | None = None, fold_in: bool = False) -> tuple[Run, bool]:
    """Put a job into the queue; returns its run and whether that is a new one.

    The same token is the same run, so that a retry never asks twice: a run that is queued or running stays as it is,
    one that failed or was stopped goes on from what is on disk, one that is done stays done unless `fold_in`. It may
    name other `PATIENCE_FIELDS`: job.yaml then says what was submitted last.

    Raises `RunError` when the token's run is of another job, `StorageError`.
    """
    token = token_of(job) if token is None else token
    if not re.fullmatch(NAME_PATTERN, token):
        raise RunError(
            f"The token {token!r} is not allowed", hint="Use lower-case letters, digits and hyphens, at most 63"
        )
    run = Run(home / "runs" / f"{job.name}-{token}")
    held = run.folder / "job.yaml"
    fresh = not (run.folder / "submitted.json").exists()
    if held.exists() and not load_settings(held, JobSettings).same_job(job):
        raise RunError(
            f"The token {token} belongs to a run of another job", hint="Submit it under another token, or without one"
        )
    if not held.exists() or load_settings(held, JobSettings) != job:
        dump_settings(job, held)
    if fresh or fold_in or run.state.state in ("failed", "stopped"):
        asked = Submitted(token=token, time=time.time(), fold_in=fold_in)
        write_json(run.folder / "submitted.json", asked.model_dump(mode="json"))
    return run, fresh


def runs(home: Path) -> list[Run]:
    """Return the server's runs, the one submitted last at the end."""
    found = [Run(path.parent) for path in (home / "runs").glob("*/submitted.json")]
    return sorted(found, key=lambda run: run.submitted.time)


def find(home: Path, name: str | None) -> Run:
    """Return a run by its name or the beginning of one; without a name the last. Raises `RunError`."""
    held = runs(home)
    if not held:
        raise RunError(f"{home} has no run yet", hint="Submit a job: consilience server submit JOB.yaml")
    if name is None:
        return held[-1]
    fitting = [run for run in held if run.name == name] or [run for run in held if run.name.startswith(name)]
    if len(fitting) != 1:
        known = ", ".join(run.name for run in held[-10:])
        what = "is no run" if not fitting else "fits several runs"
        raise RunError(f"{name!r} {what} of {home}; known: {known}", hint="Name one of them")
    return fitting[0]
