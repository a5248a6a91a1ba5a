"""A server of ours and its sites' agents as processes on loopback, and what their people type."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from typer.testing import CliRunner

from consilience.__main__ import app
from consilience.common.child import child_command
from consilience.common.data import from_arrays
from consilience.common.pool import Pool
from consilience.common.settings import CallableTeacher, JobSettings, Preprocessing, SiteSettings
from consilience.common.settings_file import dump_settings
from consilience.deploy.processes import join, make_server, online
from consilience.server.runs import Run
from consilience.server.service_state import ServiceState, read_service
from consilience.server.superlink import Control, Endpoint, Node
from helpers.teachers import HOLD

PATIENCE = 240.0
"""Seconds until a wait for another process is a failure."""
TESTS = Path(__file__).resolve().parents[1]
CLASSES = ("ant", "bee", "cow")

Found = TypeVar("Found")


def until(condition: Callable[[], Found], what: str) -> Found:
    """Wait until `condition()` holds and return what it gave."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        began = time.thread_time()
        if found := condition():
            return found
        time.sleep(max(0.05, 5 * (time.thread_time() - began)))  # a costly look takes time from what it waits for
    raise AssertionError(f"not within {PATIENCE} s: {what}")


def type_in(*words: str | Path) -> dict[str, Any]:
    """Type a command with --json; return its envelope and exit code."""
    result = CliRunner().invoke(app, [*map(str, words), "--json"])
    return {"code": result.exit_code, **json.loads(result.stdout)}


def done(*words: str | Path) -> dict[str, Any]:
    """Type a command that must succeed; return its data."""
    envelope = type_in(*words)
    assert envelope["ok"], envelope
    data = envelope["data"]
    assert isinstance(data, dict)
    return data


def processes_about(folder: Path, module: str = "") -> list[int]:
    """Return the processes of `module` that have a path below `folder` in their command line, apart from this one."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_bytes()
            ours = str(folder).encode() in line and module.encode() in line
            if ours and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
    return found


class Process:
    """A Python module as a process with its log in a file; it ends with the tests."""

    def __init__(self, log: Path, arguments: Sequence[str | Path], *, module: str = "consilience", **variables: str):
        self.log = log
        path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                child_command(module, *map(str, arguments)),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env={**os.environ, "PYTHONPATH": path, **variables},
            )

    def text(self) -> str:
        """What it wrote."""
        return self.log.read_text()

    def says(self, text: str, times: int = 1) -> None:
        """Wait until its log holds `text` so many times."""

        def held() -> bool:
            assert self.process.poll() is None or text in self.text(), self.text()
            return self.text().count(text) >= times

        until(held, f"the log says {text!r}; it says:\n{self.text()}")

    def end(self, sign: signal.Signals = signal.SIGTERM) -> int:
        """Send it a signal and return its exit code."""
        self.process.send_signal(sign)
        return self.wait()

    def wait(self) -> int:
        """Return its exit code once it has ended by itself."""
        return self.process.wait(PATIENCE)


class Deployment:
    """One server's folder, a pool of 64 images, sites, and their processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = make_server(folder / "server")
        self.endpoint = Endpoint(self.home, self.home.settings().control_port)
        pixels = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1), np.uint8)
        self.pool = Pool.build(from_arrays(pixels, None, (), where="test"), folder / "pool")
        self.started: list[Process] = []
        self.files: dict[str, Path] = {}
        self.agents: dict[str, Process] = {}
        self.server: Process | None = None

    @property
    def hold(self) -> Path:
        """While this file exists no teacher answers."""
        return self.folder / "hold"

    def start(self) -> Process:
        """Start the server."""
        self.server = self.process("server.log", ["server", "start", "--home", self.home.folder])
        return self.server

    def process(self, log: str, arguments: Sequence[str | Path], *, module: str = "consilience") -> Process:
        """Start a process that `stop` stops."""
        self.started.append(Process(self.folder / log, arguments, module=module, **{HOLD: str(self.hold)}))
        return self.started[-1]

    def add(self, name: str, *, teacher: str = "fixed", admit: bool = True, **fields: Any) -> Path:
        """Make a site; admit it."""
        path = self.folder / "private" / name / "site.yaml"
        settings = SiteSettings(
            name=name,
            teacher=CallableTeacher(
                kind="callable",
                callable=f"helpers.teachers:{teacher}",
                classes=CLASSES,
                preprocessing=Preprocessing(),
            ),
            pools=(self.pool.folder,),
            **fields,
        )
        dump_settings(settings, path)
        self.files[name] = join(self.home, path, self.folder / "sites") if admit else path
        return self.files[name]

    def agent(self, name: str) -> Process:
        """Start a site's agent."""
        self.agents[name] = self.process(f"{name}.log", ["site", "start", self.files[name]])
        return self.agents[name]

    def job(self, name: str = "leaves", **fields: Any) -> Path:
        """Write a job.yaml of a very small student."""
        settings = JobSettings.model_validate(
            {
                "name": name,
                "pool": str(self.pool.folder),
                "ask": {"question_size": 16, "retries": 1, "wait": 60, **fields.pop("ask", {})},
                "student": {"architecture": "cnn3", "fit": {"epochs": 1, "precision": "f32"}},
                **fields,
            }
        )
        path = self.folder / f"{name}.yaml"
        dump_settings(settings, path)
        return path

    def type_in(self, *words: str | Path) -> dict[str, Any]:
        """Type `server WORDS` for this folder; return envelope and exit code."""
        return type_in("server", *words, "--home", self.home.folder)

    def done(self, *words: str | Path) -> dict[str, Any]:
        """Type `server WORDS`, which must succeed."""
        return done("server", *words, "--home", self.home.folder)

    def submit(self, job: Path) -> str:
        """Submit a job; return the run's name."""
        return str(self.done("submit", job)["run"]["name"])

    def state(self, run: str) -> str:
        """Return how a run stands."""
        return str(self.done("status", run)["run"]["state"])

    def ended(self, run: str) -> str:
        """Wait until a run has ended; return how."""
        until(lambda: not self.at_work(run), f"run {run} ends")
        return self.state(run)

    def at_work(self, run: str) -> bool:
        """Say whether a run has not ended: by its file, for whoever asks often; `state` types a command."""
        return Run(self.home.runs / run).state.state in ("queued", "running")

    def events(self, run: str, kind: str) -> list[dict[str, Any]]:
        """Return a run's events of one kind."""
        path = self.home.runs / run / "events.jsonl"
        held = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [event for event in held if event["event"] == kind]

    def online(self) -> set[str]:
        """Return the sites that the server says are connected."""
        return {name for name, there in online(self.home).items() if there}

    def samples(self, run: str, kind: str) -> dict[str, list[int]]:
        """Return the pool samples that a run's events of one kind are about, by site, sorted."""
        found: dict[str, list[int]] = {}
        for event in self.events(run, kind):
            found.setdefault(event["site"], []).extend(range(event["start"], event["stop"]))
        return {site: sorted(samples) for site, samples in found.items()}

    def wait_online(self, *names: str) -> None:
        """Wait until just these sites are connected."""
        until(lambda: self.online() == set(names), f"online: {names}; now: {self.online()}")

    def service(self) -> ServiceState:
        """Return what the server says of itself."""
        held = read_service(self.home.folder)
        assert held is not None
        return held

    def nodes(self) -> dict[str, Node]:
        """Return the SuperLink's nodes by name."""
        with Control(self.endpoint) as control:
            return {node.name: node for node in control.nodes()}

    def stop(self) -> None:
        """End every process."""
        for each in self.started:
            if each.process.poll() is None:
                each.process.terminate()
        for each in self.started:
            try:
                each.process.wait(15)
            except subprocess.TimeoutExpired:
                each.process.kill()
                each.process.wait()


@contextlib.contextmanager
def deployment(folder: Path, *names: str) -> Iterator[Deployment]:
    """Give a running server whose sites `names` are online."""
    held = Deployment(folder)
    try:
        held.start()
        for name in names:
            held.add(name)
            held.agent(name)
        held.wait_online(*names)
        yield held
    finally:
        held.stop()
