"""The whole job on one machine with real processes: a server, its SuperLink, and one agent a site.

Lives here: putting them together in a temporary folder with real certificates, over TLS on loopback, and stopping
every one of them. Does not live here: anything that a job over a network would do otherwise.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from consilience.client.fleet import SPEAKS_GRPC
from consilience.common.child import child_command, end_all
from consilience.common.errors import ServerError
from consilience.common.files import lock
from consilience.common.progress import Reporter
from consilience.common.settings import JobSettings, SiteSettings
from consilience.common.settings_file import dump_settings, load_settings
from consilience.deploy.simulation import admit, prepare_run
from consilience.server.authority import ensure_authority, renew_if_due
from consilience.server.runs import submit
from consilience.server.service_state import read_service
from consilience.server.settings import Home, ServerSettings

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
        server = start(["server", "start", "--home", str(home.folder)])
        started.callback(stop, [server])
        _wait(lambda: len(online(home)) == len(sites), [server])  # admitted: an unknown key would be sent away
        agents = [start(["site", "start", str(path)]) for path in sites]
        started.callback(stop, agents)
        _wait(lambda: sum(online(home).values()) == len(agents), [server, *agents])
        held, _ = submit(home.folder, settings, token="here")
        _wait(lambda: held.state.state not in ("queued", "running"), [server, *agents])
        held.need_done()


def make_server(folder: Path) -> Home:
    """Make a server's folder for loopback, on free ports."""
    home = Home(folder)
    fleet, control = free_ports(2)
    dialled = fleet if SPEAKS_GRPC else control
    settings = ServerSettings(address=f"127.0.0.1:{dialled}", listen=f"127.0.0.1:{fleet}", control_port=control)
    home.runs.mkdir(parents=True)
    dump_settings(settings, home.settings_file)
    ensure_authority(home)
    renew_if_due(home, settings)
    return home


def join(home: Home, site: Path, folder: Path) -> Path:
    """Give a site a kit below `folder`, and a key if it has none; returns the file of settings that name them."""
    settings = load_settings(site, SiteSettings)
    place = folder / settings.name
    settings = settings.model_copy(update={"kit": place / "kit.json"})
    admit(home, settings, home.settings())
    dump_settings(settings, place / "site.yaml")
    return place / "site.yaml"


def start(arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    """Run a command of ours as a process, which is killed when this one is; what it says goes to our stderr."""
    return subprocess.Popen(
        child_command("consilience", *arguments),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )


def stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Stop processes side by side; kill those that take too long."""
    end_all(processes, STOP_SECONDS)


def online(home: Home) -> dict[str, bool]:
    """Return which admitted sites are connected."""
    service = read_service(home.folder)
    return {} if service is None else service.online


def _wait(done: Callable[[], bool], processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait until `done()`. Raises `ServerError` when a process ends."""
    while not done():
        for child in processes:
            if child.poll() is not None:
                raise ServerError(f"A process ended with code {child.returncode}", hint="Read the lines above")
        time.sleep(LOOK_SECONDS)


def free_ports(count: int) -> list[int]:
    """Return ports on 127.0.0.1 that nothing uses now."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
