"""The server as a process: a SuperLink, the register of sites kept in step with it, and one run after another.

Lives here: what `consilience server start` does until it is stopped. Does not live here: any of their work. Everything
it knows is in files of the server's folder, so that it may be killed at any moment and started again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from consilience.common.child import child_command
from consilience.common.errors import ConsilienceError, ServerError
from consilience.common.files import lock, read_json, write_json
from consilience.server.runs import Failure, Run, State, runs
from consilience.server.superlink import STOP_SECONDS, Control, Endpoint, SuperLink

log = logging.getLogger(__name__)

TICK_SECONDS = 0.25
SYNC_SECONDS = 1.0
"""How soon an approved site can connect, a suspended one cannot, and `status` sees who is online."""
RESTART_SECONDS = 1.0
MOST_CRASHES = 5
"""A run whose process dies this often without an error of ours is called failed."""


class ServiceState(BaseModel):
    """HOME/service.json: how the server stands, written every second."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pid: int
    since: float
    now: float
    superlink: int | None
    online: dict[str, bool]
    """Admitted site -> whether it is connected."""


def read_service(home: Path) -> ServiceState | None:
    """Return how the server stands, None when it does not run."""
    path = home / "service.json"
    if not path.exists():
        return None
    state = ServiceState.model_validate(read_json(path))
    try:  # the number may belong to another process by now
        command = Path(f"/proc/{state.pid}/cmdline").read_bytes()
    except OSError:
        return None
    return state if b"consilience" in command else None


class Service:
    """One server folder's server."""

    def __init__(self, endpoint: Endpoint, listen: str, admitted: Callable[[], dict[str, str]]) -> None:
        """`admitted` returns the keys that may connect: site -> OpenSSH line."""
        self.home, self.endpoint = endpoint.home.folder, endpoint
        self._admitted = admitted
        self._superlink = SuperLink(endpoint, listen)
        self._since = time.time()
        self._online: dict[str, bool] = {}
        self._synced = 0.0
        self._run: Run | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._spare: subprocess.Popen[bytes] | None = None
        self._crashes = 0
        self._stopping = False

    def serve(self) -> None:
        """Run until SIGTERM or SIGINT. Raises `RunError` when another server has this folder, `ServerError`."""
        with lock(self.home / "flower"):
            for sign in (signal.SIGTERM, signal.SIGINT):
                signal.signal(sign, self._stop)
            try:
                self._superlink.start()
                log.info(
                    "the SuperLink is up: sites dial %s, control is on %s",
                    self._superlink.listen,
                    self.endpoint.control,
                )
                while not self._stopping:
                    self._tick()
                    time.sleep(TICK_SECONDS)
                log.info("stopping")
            finally:
                self._end_process()
                self._superlink.stop()
                (self.home / "service.json").unlink(missing_ok=True)

    def _stop(self, *_: object) -> None:
        self._stopping = True

    def _tick(self) -> None:
        if not self._superlink.alive:
            log.warning("the SuperLink ended; starting it again")
            time.sleep(RESTART_SECONDS)
            try:
                self._superlink.start()
            except ServerError as error:
                log.error("%s", error)
                return
            self._synced = 0.0
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self._sync()
            self._synced = time.monotonic()
        self._look_after_run()

    def _sync(self) -> None:
        """Bring the SuperLink's keys in step with the register, and see who is online."""
        try:
            with Control(self.endpoint) as control:
                nodes = control.nodes()
                changes = control.sync(self._admitted(), nodes)
                if changes:
                    nodes = control.nodes()
            for line in changes:
                log.info("%s", line)
            online = {node.name: node.online for node in nodes}
        except ConsilienceError as error:
            log.warning("%s", error)
            return
        for name, is_online in online.items():
            if is_online != self._online.get(name, False):
                log.info("site %s is %s", name, "online" if is_online else "offline")
        self._online = online
        state = ServiceState(
            pid=os.getpid(), since=self._since, now=time.time(), superlink=self._superlink.pid, online=online
        )
        write_json(self.home / "service.json", state.model_dump(mode="json"))

    def _look_after_run(self) -> None:
        if self._run is None:
            waiting = [run for run in runs(self.home) if run.state.state in ("queued", "running")]
            for run in waiting:
                if run.stop_wanted:
                    run.set("stopped")
                else:
                    self._begin(run)
                    return
            self._warm_up()
            return
        if self._run.stop_wanted:
            self._end_process()
            self._end("stopped")
        elif self._process is not None and self._process.poll() is not None:
            self._ended(self._process.returncode)

    def _begin(self, run: Run) -> None:
        log.info("run %s begins", run.name)
        run.set("running")
        self._run = run
        self._warm_up()
        process, self._spare = self._spare, None
        assert process is not None
        assert process.stdin is not None
        self._process = process
        with contextlib.suppress(BrokenPipeError):  # it ended while it waited; the next look sees that
            process.stdin.write(f"{run.folder}\n".encode())
            process.stdin.close()

    def _warm_up(self) -> None:
        """Have a process ready that waits for a run: importing torch takes longer than many a run's questions."""
        if self._spare is None or self._spare.poll() is not None:
            self._spare = subprocess.Popen(
                child_command("consilience.server.runner", str(self.home), str(self.endpoint.control_port)),
                stdin=subprocess.PIPE,
            )

    def _ended(self, code: int) -> None:
        assert self._run is not None
        failure_file = self._run.folder / "failure.json"
        if code == 0:
            self._end("done")
        elif failure_file.exists():
            self._end("failed", Failure.model_validate(read_json(failure_file)))
        elif self._crashes >= MOST_CRASHES:
            error = ConsilienceError(
                f"The run's process ended {self._crashes + 1} times, last with code {code}",
                hint="Read the server's log; the same submit goes on from what is on disk",
            )
            self._end("failed", Failure.of(error))
        else:
            self._crashes += 1
            log.warning("the run's process ended with code %d; beginning it again", code)
            self._run = self._process = None  # its state is still "running": the next look begins it again

    def _end(self, state: State, failure: Failure | None = None) -> None:
        assert self._run is not None
        log.info("run %s is %s%s", self._run.name, state, f": {failure.message}" if failure else "")
        self._run.set(state, failure)
        self._run, self._process, self._crashes = None, None, 0

    def _end_process(self) -> None:
        for process in (self._process, self._spare):
            if process is None or process.poll() is not None:
                continue
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
