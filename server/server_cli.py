"""`consilience server`: start, submit, status, stop, report. Does not live here: admission (server/admission_cli)."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table

from consilience.common.cli import AsJson, Result, emit
from consilience.common.errors import RunError, ServerError
from consilience.common.settings import JobSettings
from consilience.common.settings_file import load_settings
from consilience.server.admission import Register
from consilience.server.admission_cli import HomeOption, app
from consilience.server.authority import authority_pem, certificate_end, renew_if_due, renewal_reason
from consilience.server.runs import Run, find, runs
from consilience.server.runs import submit as submit_job
from consilience.server.service_state import OLD_SECONDS, read_service
from consilience.server.settings import Home
from consilience.server.strangers import REASONS, Strangers
from consilience.server.summary import summary

__all__ = ["app"]

LOOK_SECONDS = 0.5
STRANGER_SECONDS = 600.0
"""So long `status` shows that a key was turned away."""

RunName = Annotated[str | None, typer.Argument(help="A run's name or its beginning; by default the last one.")]


@app.command()
def start(home: HomeOption = None, as_json: AsJson = False) -> None:
    """Run the server until it is stopped: Flower's SuperLink for the sites, and one submitted job after another.

    It may be killed at any moment: started again, it goes on where it was.
    """

    def action() -> Result:
        # late: these import Flower, which the other commands do without
        from consilience.server.service import Certificate, Service
        from consilience.server.superlink import Endpoint

        place = Home.find(home)
        folder, settings = place.folder.resolve(), place.settings()
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
        logging.getLogger("httpx").setLevel(logging.WARNING)
        authority_pem(place)
        reason = renew_if_due(place, settings)
        if reason:
            logging.getLogger(__name__).info("made the server's certificate anew: %s", reason)
        endpoint = Endpoint(Home(folder), settings.control_port)
        certificate = Certificate(lambda: renewal_reason(place, settings), lambda: renew_if_due(place, settings))
        register = Register(place)
        Service(endpoint, settings.listen, register.keys, register.named, certificate).serve()
        return {"home": str(folder)}, "Stopped."

    emit(as_json, action)


@app.command()
def submit(
    job: Annotated[Path, typer.Argument(help="The job.yaml.")],
    home: HomeOption = None,
    token: Annotated[
        str | None,
        typer.Option(help="The same token is the same run; by default it follows from the job's settings."),
    ] = None,
    fold_in: Annotated[
        bool, typer.Option("--fold-in", help="Take sites that joined since into the run: only they are asked.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until the run has ended.")] = False,
    as_json: AsJson = False,
) -> None:
    """Put a job into the server's queue. The same job again is the same run: it goes on where it stopped."""

    def action() -> Result:
        folder = Home.find(home).folder.resolve()
        settings = load_settings(job, JobSettings)
        if settings.simulation is not None:
            raise RunError(
                f"{job}: field 'simulation' makes sites that exist only here; a server asks real ones",
                hint="Leave the field out, or type `consilience simulate`",
            )
        run, fresh = submit_job(folder, settings, token=token, fold_in=fold_in)
        running = read_service(folder) is not None
        if wait:
            if not running:
                raise _not_running(folder)
            return _ended(_follow(folder, run, live=not as_json))
        lines = [f"{'New run' if fresh else 'Run'} {run.name}: {run.state.state}"]
        if not running:
            lines.append("The server does not run: type `consilience server start`")
        lines.append(f"Watch it: consilience server status {run.name}")
        return _data(folder, run), "\n".join(lines)

    emit(as_json, action)


@app.command()
def status(
    run: RunName = None,
    home: HomeOption = None,
    once: Annotated[bool, typer.Option("--once", help="Print the table once, on a terminal too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the server, its sites and a run; on a terminal live until the run has ended."""

    def action() -> Result:
        folder = Home.find(home).folder.resolve()
        if not runs(folder) and run is None:
            return _data(folder, None), _view(folder, None)
        found = find(folder, run)
        if not once and not as_json and sys.stdout.isatty() and read_service(folder) is not None:
            found = _follow(folder, found, live=True)
        return _data(folder, found), _view(folder, found)

    emit(as_json, action)


@app.command()
def stop(
    run: Annotated[str | None, typer.Argument(help="A run's name or its beginning; without one, the server.")] = None,
    home: HomeOption = None,
    as_json: AsJson = False,
) -> None:
    """Stop a run, or without a name the whole server. Nothing that had arrived is lost; `submit` goes on."""

    def action() -> Result:
        folder = Home.find(home).folder.resolve()
        if run is not None:
            found = find(folder, run)
            if found.state.state in ("queued", "running"):
                found.stop()
                _wait(lambda: found.state.state not in ("queued", "running"), folder)
            state = found.state.state
            if state not in ("queued", "running"):
                return _data(folder, found), f"Run {found.name}: {state}"
            when = "" if read_service(folder) is not None else " once the server runs"
            return _data(folder, found), f"Run {found.name} will stop{when}; it is {state}"
        service = read_service(folder)
        if service is None:
            return {"running": False}, "The server does not run."
        os.kill(service.pid, signal.SIGTERM)
        _wait(lambda: read_service(folder) is None, folder)
        stopped = read_service(folder) is None
        return {"running": not stopped}, "Stopped." if stopped else f"Process {service.pid} is still stopping."

    emit(as_json, action)


@app.command()
def report(run: RunName = None, home: HomeOption = None, as_json: AsJson = False) -> None:
    """Show what a finished run found, and where its report, card and student are."""

    def action() -> Result:
        folder = Home.find(home).folder.resolve()
        return _ended(find(folder, run))

    emit(as_json, action)


def _ended(run: Run) -> Result:
    found = run.need_done()
    return {"run": str(run.folder), "report": found}, summary(run.folder, found)


def _follow(home: Path, run: Run, *, live: bool) -> Run:
    """Wait until a run has ended; on a terminal with a live table. Raises `ServerError` when the server ends."""
    console = Console(stderr=True, highlight=False, markup=False)
    if not live or not console.is_terminal:
        while run.state.state in ("queued", "running"):
            if read_service(home) is None:
                raise _not_running(home)
            time.sleep(LOOK_SECONDS)
        return run
    with Live(_view(home, run), console=console, refresh_per_second=2, transient=True) as screen:
        while run.state.state in ("queued", "running"):
            if read_service(home) is None:
                raise _not_running(home)
            time.sleep(LOOK_SECONDS)
            screen.update(_view(home, run))
    return run


def _not_running(home: Path) -> ServerError:
    return ServerError(
        f"No server runs in {home}", hint="Type `consilience server start`; submitted runs go on by themselves"
    )


def _wait(done: Any, home: Path) -> None:
    """Wait up to 20 s for `done()`; at once when no server runs that could do it."""
    until = time.monotonic() + 20
    while not done() and time.monotonic() < until and read_service(home) is not None:
        time.sleep(0.1)


def _data(home: Path, run: Run | None) -> dict[str, Any]:
    service = read_service(home)
    ends = certificate_end(Home(home))
    data: dict[str, Any] = {
        "server": None if service is None else {"pid": service.pid, "since": service.since},
        "certificate_ends": None if ends is None else ends.isoformat(),
        "sites": {} if service is None else service.online,
        "turned_away": _turned_away(home),
        "runs": [{"name": held.name, "state": held.state.state} for held in runs(home)],
    }
    if run is not None:
        data["run"] = {
            "name": run.name,
            "folder": str(run.folder),
            **run.state.model_dump(mode="json", exclude={"submitted"}),
            "progress": run.progress,
        }
    return data


def _view(home: Path, run: Run | None) -> RenderableType:
    service = read_service(home)
    lines: list[RenderableType] = []
    if service is None:
        lines.append("The server does not run: type `consilience server start`")
    elif service.superlink is None:
        lines.append("The server is starting")
    else:
        age = time.time() - service.now
        if age > OLD_SECONDS:
            lines.append(f"The server wrote how it stands {_span(age)} ago: read its log")
        online = [name for name, is_online in service.online.items() if is_online]
        lines.append(f"Server up for {_span(time.time() - service.since)}; {len(online)} of {len(service.online)} "
                     f"sites online{': ' + ', '.join(sorted(online)[:20]) if online else ''}")  # fmt: skip
    if (ends := certificate_end(Home(home))) is not None:
        lines.append(
            f"The server's certificate {'ends' if ends.timestamp() > time.time() else 'ended'} on {ends:%Y-%m-%d}"
        )
    lines += [f"Turned away lately: {line}" for line in _turned_away(home)]
    if run is None:
        lines.append("No run yet: type `consilience server submit JOB.yaml`")
        return Group(*lines)
    state, progress = run.state, run.progress
    stage = f", stage {progress['stage']}" if state.state == "running" and progress.get("stage") else ""
    lines.append(f"Run {run.name}: {state.state}{stage}, since {_span(time.time() - state.since)}")
    if state.failure is not None:
        lines.append(
            f"Failed ({state.failure.name}, {state.failure.code}): {state.failure.message}. {state.failure.hint}"
        )
    if progress.get("sites"):
        lines.append(_sites_table(progress["sites"], {} if service is None else service.online))
    return Group(*lines)


def _turned_away(home: Path) -> list[str]:
    """Return which keys the server turned away lately, and why."""
    register = Register(Home(home))
    lately = Strangers(home).since(time.time() - STRANGER_SECONDS)
    return sorted({f"{register.named(each.fingerprint)}: {REASONS[each.reason]}" for each in lately})


def _sites_table(sites: list[dict[str, Any]], online: dict[str, bool]) -> Table:
    table = Table("site", "online", "answered", "asked", "MB", "samples/s", "left", "failures", "last failure")
    for site in sites:
        there = online.get(site["name"], site.get("online"))
        left = site.get("seconds_left")
        table.add_row(
            site["name"],
            "yes" if there else "no",
            f"{site['answered']:,}",
            f"{site['asked']:,}",
            f"{site['bytes'] / 1e6:,.1f}",
            f"{site['rate']:,.0f}" if site.get("rate") else "",
            "" if left is None else _span(left),
            str(site["failures"] or ""),
            site.get("reason") or "",
        )
    return table


def _span(seconds: float) -> str:
    """Return a duration as a person reads it."""
    whole = max(0, round(seconds))
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
