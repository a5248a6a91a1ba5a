"""The server's list of runs: one folder a run, and what people and the server said about it.

Lives here: RUN/submitted.json (written by `submit`), RUN/stop.json (by `stop`) and RUN/state.json (by the server
alone), so that no two processes write one file. Does not live here: doing a run (server/runner).
"""

from __future__ import annotations

import functools
import logging
import re
import time
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from consilience.common.errors import REGISTRY, ConsilienceError, RunError, StorageError
from consilience.common.files import canonical_json, read_json, sha256, write_json
from consilience.common.settings import NAME_PATTERN, JobSettings
from consilience.common.settings_file import dump_settings, load_settings

log = logging.getLogger(__name__)

State = Literal["queued", "running", "done", "failed", "stopped"]


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Model = TypeVar("Model", bound=_File)


class Submitted(_File):
    """What `submit` asked for last."""

    token: str
    time: float
    fold_in: bool = False


class _Stop(_File):
    time: float


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
        return _read(self.folder / "submitted.json", Submitted)

    @property
    def state(self) -> RunState:
        """How it stands; queued when the server has not seen the last submission yet and is not at an earlier one."""
        submitted = self.submitted
        path = self.folder / "state.json"
        held = _read(path, RunState) if path.exists() else None
        if held is None or (held.submitted < submitted.time and held.state != "running"):
            return RunState(state="queued", submitted=submitted.time, since=submitted.time)
        return held

    def set(self, state: State, failure: Failure | None = None, *, about: Submitted | None = None) -> None:
        """Write the state of the submission `about`, by default the last one. For the server alone."""
        about = about or self.submitted
        held = RunState(state=state, submitted=about.time, since=time.time(), failure=failure)
        write_json(self.folder / "state.json", held.model_dump(mode="json"))

    @property
    def stop_wanted(self) -> bool:
        """Whether somebody asked to stop the run since it was submitted last."""
        path = self.folder / "stop.json"
        return path.exists() and _read(path, _Stop).time > self.submitted.time

    def stop(self) -> None:
        """Ask the server to stop the run."""
        write_json(self.folder / "stop.json", _Stop(time=time.time()).model_dump())

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
    one that failed or was stopped goes on from what is on disk, one that is done stays done. With `fold_in` the run is
    queued in any case; one that is at work is done to its end first. A job may come again with other
    `PATIENCE_FIELDS`: job.yaml then says what was submitted last.

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
    """Return the server's runs, the one submitted last at the end; one whose files are damaged is left out."""
    found: list[tuple[float, Run]] = []
    for path in (home / "runs").glob("*/submitted.json"):
        run = Run(path.parent)
        try:
            _ = run.state, run.stop_wanted
            found.append((run.submitted.time, run))
        except StorageError as error:
            _warn(f"{run.folder} is left out: {error}")
    return [run for _, run in sorted(found, key=lambda each: each[0])]


@functools.cache
def _warn(line: str) -> None:
    """Say it once in the life of this process: the server looks at its runs several times a second."""
    log.warning("%s", line)


def _read(path: Path, model: type[Model]) -> Model:
    """Read one file of a run. Raises `StorageError`."""
    try:
        return model.model_validate(read_json(path))
    except ValidationError as error:
        raise StorageError(
            f"{path} is not what was written there: {error.errors()[0]['msg']}",
            hint="Restore it from a copy, or remove it and submit the job again",
        ) from error


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
