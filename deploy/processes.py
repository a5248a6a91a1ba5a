"""The whole job on one machine with real processes: a server, its SuperLink, and one agent a site.

Lives here: putting them together in a temporary folder with real certificates, over TLS on loopback, and stopping
every one of them. Does not live here: anything that a job over a network would do otherwise.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from consilience.common.errors import ServerError
from consilience.common.files import lock
from consilience.common.identity import Request, load_key, make_key
from consilience.common.progress import Reporter
from consilience.common.settings import JobSettings, SiteSettings
from consilience.common.settings_file import dump_settings, load_settings
from consilience.deploy.simulation import prepare_run
from consilience.server.admission import Register
from consilience.server.authority import authority_pem, ensure_authority, renew_if_due
from consilience.server.runs import Run, submit
from consilience.server.service import read_service
from consilience.server.settings import Home, ServerSettings
from consilience.server.superlink import die_with_parent

START_SECONDS = 120.0
STOP_SECONDS = 15.0
LOOK_SECONDS = 0.2


def simulate_processes(job: JobSettings, run: Path, reporter: Reporter) -> None:
    """Do `job` in the folder `run` with one process a site, from wherever an earlier run of the same job stopped.

    Raises `ServerError` when a process ends by itself, and whatever the stages raise.
    """
    run = run.resolve()
    with lock(run), tempfile.TemporaryDirectory(prefix="consilience-") as name, contextlib.ExitStack() as started:
        settings, paths = prepare_run(job, run, reporter)
        home = make_server(Path(name) / "server")
        sites = [join(home, path, Path(name) / "sites") for path in paths]
        (home.runs / f"{job.name}-here").symlink_to(run)
        held, _ = submit(home.folder, settings, token="here", fold_in=False)
        server = started.enter_context(process(["server", "start", "--home", str(home.folder)]))
        wait_for_server(home, server)
        agents = [started.enter_context(process(["site", "start", str(path)])) for path in sites]
        _wait_for_run(held, [server, *agents])


def make_server(folder: Path) -> Home:
    """Make a server's folder for loopback, on free ports."""
    home = Home(folder)
    fleet, control = free_ports(2)
    settings = ServerSettings(address=f"127.0.0.1:{fleet}", listen=f"127.0.0.1:{fleet}", control_port=control)
    home.runs.mkdir(parents=True)
    dump_settings(settings, home.settings_file)
    ensure_authority(home)
    renew_if_due(home, settings)
    return home


def join(home: Home, site: Path, folder: Path) -> Path:
    """Give the site of a site.yaml a key and a kit below `folder`; returns the settings that name them.

    All three parts of admission in one place: only a simulation holds both sides.
    """
    settings = load_settings(site, SiteSettings)
    place = folder / settings.name
    settings = settings.model_copy(update={"key": place / "site.key", "kit": place / "kit.json"})
    key = load_key(settings.key) if settings.key.exists() else make_key(settings.key)
    register = Register(home)
    record = register.approve(Request.make(key, settings.name, "this machine"))
    register.kit(record, home.settings(), authority_pem(home)).write(settings.kit)
    dump_settings(settings, place / "site.yaml")
    return place / "site.yaml"


@contextlib.contextmanager
def process(arguments: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command of ours as a process; it is stopped at the end, and killed when this process is."""
    command = [sys.executable, "-m", "consilience", *arguments]
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=die_with_parent)
    try:
        yield child
    finally:
        if child.poll() is None:
            child.terminate()
            try:
                child.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()


def wait_for_server(home: Home, server: subprocess.Popen[bytes]) -> None:
    """Wait until a started server is up. Raises `ServerError`."""
    until = time.monotonic() + START_SECONDS
    while read_service(home.folder) is None:
        if server.poll() is not None or time.monotonic() > until:
            raise ServerError("The server did not come up", hint="Read the lines above")
        time.sleep(LOOK_SECONDS)


def _wait_for_run(run: Run, processes: Sequence[subprocess.Popen[bytes]]) -> None:
    while run.state.state in ("queued", "running"):
        for child in processes:
            if child.poll() is not None:
                raise ServerError(f"A process ended with code {child.returncode}", hint="Read the lines above")
        time.sleep(LOOK_SECONDS)
    run.need_done()


def free_ports(count: int) -> list[int]:
    """Return ports on 127.0.0.1 that nothing uses now."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
