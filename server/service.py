"""The server as a process: a SuperLink, the register of sites kept in step with it, and one run after another.

Lives here: what `consilience server start` does until it is stopped. Does not live here: any of their work, and
the record of how it stands (server/service_state). Everything it knows is in files of the server's folder, so that it
may be killed at any moment and started again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

from pydantic import ValidationError

from consilience.common.child import child_command, end_all
from consilience.common.errors import ConsilienceError, StorageError
from consilience.common.files import lock, read_json, write_json
from consilience.server.runs import Failure, Run, State, Submitted, runs
from consilience.server.service_state import OLD_SECONDS, ServiceState
from consilience.server.strangers import REASONS, Strangers
from consilience.server.superlink import STOP_SECONDS, Control, Endpoint, SuperLink

log = logging.getLogger(__name__)

TICK_SECONDS = 0.25
SYNC_SECONDS = 1.0
"""How soon an approved site can connect, a suspended one cannot, and `status` sees who is online."""
RESTART_SECONDS = 1.0
LONGEST_PAUSE = 60.0
"""Between two starts of a waiting process that ends by itself; the first pause is `RESTART_SECONDS`."""
CERTIFICATE_SECONDS = 4 * 3600.0
"""How often the server looks whether its certificate must be renewed."""
DAY = 24 * 3600.0
MOST_CRASHES = 5
"""A run whose process dies this often without an error of ours is called failed."""


@dataclass(frozen=True)
class Certificate:
    """What the server does about its certificate; both return why it is due, None while it is good."""

    due: Callable[[], str | None]
    renew: Callable[[], str | None]


class Service:
    """One server folder's server."""

    def __init__(
        self,
        endpoint: Endpoint,
        listen: str,
        admitted: Callable[[], dict[str, str]],
        named: Callable[[str], str],
        certificate: Certificate,
    ) -> None:
        """`admitted` returns the keys that may connect: site -> OpenSSH line; `named` whose a key's fingerprint is."""
        self.home, self.endpoint = endpoint.home.folder, endpoint
        self._admitted, self._named, self._certificate = admitted, named, certificate
        self._strangers, self._told = Strangers(self.home), time.time()
        self._certificate_look = self._certificate_act = 0.0
        self._superlink = SuperLink(endpoint, listen)
        self._since = time.time()
        self._online: dict[str, bool] = {}
        self._synced = 0.0
        self._run: Run | None = None
        self._submitted: Submitted | None = None
        """What the run at work began with: a later submission stays in the queue."""
        self._process: subprocess.Popen[bytes] | None = None
        self._spare: subprocess.Popen[bytes] | None = None
        self._spare_after, self._pause = 0.0, RESTART_SECONDS
        self._crashes = 0
        self._troubles: dict[str, tuple[str, float]] = {}
        self._stopping = False

    def serve(self) -> None:
        """Run until SIGTERM or SIGINT. Raises `RunError` when another server has this folder, `ServerError`."""
        with lock(self.home / "flower"):
            for sign in (signal.SIGTERM, signal.SIGINT):
                signal.signal(sign, self._stop)
            try:
                self._write_state(superlink=None)
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
                started = (self._process, self._spare, self._superlink.process)
                end_all([process for process in started if process is not None], STOP_SECONDS)
                self._superlink.stop()
                (self.home / "service.json").unlink(missing_ok=True)

    def _stop(self, *_: object) -> None:
        self._stopping = True

    def _tick(self) -> None:
        """Do each part of the work; what goes wrong in one (a full disk, a locked database) ends neither another."""
        for part in (self._keep_superlink, self._keep_certificate, self._sync, self._look_after_run):
            try:
                part()
            except (ConsilienceError, OSError) as error:
                now = time.monotonic()
                said, last = self._troubles.get(part.__name__, ("", now))
                if said != str(error) or now - last > OLD_SECONDS:  # else it is still the same trouble
                    log.error("%s", error)
                self._troubles[part.__name__] = str(error), now

    def _keep_superlink(self) -> None:
        if self._superlink.alive:
            return
        log.warning("the SuperLink ended; starting it again")
        time.sleep(RESTART_SECONDS)
        self._superlink.start()
        self._synced = 0.0

    def _keep_certificate(self) -> None:
        """Renew the certificate between two runs; agents connect again by themselves. At most one try a day."""
        now = time.monotonic()
        if now < self._certificate_look or not self._superlink.alive:
            return
        self._certificate_look = now + CERTIFICATE_SECONDS
        reason = self._certificate.due()
        if reason is None or now < self._certificate_act:
            return
        if self._run is not None:
            log.warning("the server's certificate must be renewed (%s); that is done when the run has ended", reason)
            self._certificate_look = now + DAY
            return
        self._certificate_act = now + DAY
        self._certificate.renew()
        log.warning("made the server's certificate anew: %s; the SuperLink starts again with it", reason)
        self._superlink.stop()
        self._superlink.start()
        self._synced = 0.0

    def _sync(self) -> None:
        """Bring the SuperLink's keys in step with the register, and see who is online."""
        if not self._superlink.alive or time.monotonic() - self._synced < SYNC_SECONDS:
            return
        self._synced = time.monotonic()
        for refusal in self._strangers.since(self._told):
            log.warning("turned away %s: %s", self._named(refusal.fingerprint), REASONS[refusal.reason])
            self._told = refusal.time
        with Control(self.endpoint) as control:
            nodes = control.nodes()
            changes = control.sync(self._admitted(), nodes)
            if changes:
                nodes = control.nodes()
        for line in changes:
            log.info("%s", line)
        online = {node.name: node.online for node in nodes}
        for name, is_online in online.items():
            if is_online != self._online.get(name, False):
                log.info("site %s is %s", name, "online" if is_online else "offline")
        self._online = online
        self._write_state(superlink=self._superlink.pid)

    def _write_state(self, superlink: int | None) -> None:
        state = ServiceState(
            pid=os.getpid(), since=self._since, now=time.time(), superlink=superlink, online=self._online
        )
        write_json(self.home / "service.json", state.model_dump(mode="json"))

    def _look_after_run(self) -> None:
        at_work = None if self._run is None else self._run.name
        waiting = []
        for run in runs(self.home):
            if run.name == at_work or run.state.state not in ("queued", "running"):
                continue
            if run.stop_wanted:
                run.set("stopped")
                log.info("run %s is stopped before its turn", run.name)
            else:
                waiting.append(run)
        if self._run is None:
            if waiting and self._superlink.alive:
                self._begin(waiting[0])
            else:
                self._keep_warm()
        elif self._stop_wanted(self._run):
            end_all([process for process in (self._process,) if process is not None], STOP_SECONDS)
            self._end("stopped")
        elif self._process is not None and self._process.poll() is not None:
            self._ended(self._process.returncode)

    @staticmethod
    def _stop_wanted(run: Run) -> bool:
        try:
            return run.stop_wanted
        except StorageError:  # somebody damaged its files: its process goes on to its end
            return False

    def _begin(self, run: Run) -> None:
        self._warm_up()
        submitted = run.submitted
        run.set("running", about=submitted)
        log.info("run %s begins", run.name)
        process, self._spare = self._spare, None
        assert process is not None
        assert process.stdin is not None
        self._run, self._submitted, self._process = run, submitted, process
        with contextlib.suppress(BrokenPipeError):  # it ended while it waited; the next look sees that
            process.stdin.write(f"{run.folder}\n{submitted.model_dump_json()}\n".encode())
            process.stdin.close()

    def _warm_up(self) -> None:
        """Have a process ready that waits for a run: importing torch takes longer than many a run's questions."""
        if self._spare is None or self._spare.poll() is not None:
            self._spare = subprocess.Popen(
                child_command("consilience.server.runner", str(self.home), str(self.endpoint.control_port)),
                stdin=subprocess.PIPE,
            )

    def _keep_warm(self) -> None:
        """Replace a waiting process that ended by itself, each time after a longer pause."""
        if self._spare is not None and (code := self._spare.poll()) is not None:
            log.warning("the process that waits for a run ended with code %d; next try in %d s", code, self._pause)
            self._spare, self._spare_after = None, time.monotonic() + self._pause
            self._pause = min(LONGEST_PAUSE, 2 * self._pause)
        if time.monotonic() >= self._spare_after:
            self._warm_up()

    def _ended(self, code: int) -> None:
        assert self._run is not None
        if code == 0:
            self._end("done")
        elif (failure := _failure(self._run)) is not None:
            self._end("failed", failure)
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
        self._run.set(state, failure, about=self._submitted)
        self._run, self._submitted, self._process, self._crashes = None, None, None, 0
        self._pause = RESTART_SECONDS
        self._certificate_look = 0.0


def _failure(run: Run) -> Failure | None:
    """Return what the run's process left when it failed, None when it left nothing that can be read."""
    path = run.folder / "failure.json"
    try:
        return Failure.model_validate(read_json(path)) if path.exists() else None
    except (StorageError, ValidationError):
        return None
