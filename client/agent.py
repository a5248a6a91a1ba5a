"""One process per site: asks the server for questions, answers them with the installed app, and stays connected.

Lives here: the agent's three threads (puller, worker, pusher), what it refuses before the app sees it, and how it comes
back after a loss. Does not live here: Flower's calls (client/fleet), the answers (client/app, client/site), signals
and the form of the log (client/agent_cli).

While one question is answered the next is pulled and the last answer is pushed; the queues between are short, so that
the server's queue stays the server's. What a server sends that is not one of our questions gets a constant reply.
"""

from __future__ import annotations

import logging
import queue
import random
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from flwr.app import Context, Error, Message, RecordDict
from flwr.app.user_config import UserConfig
from flwr.common.constant import ErrorCode

from consilience.client.app import app, site_of
from consilience.client.connection import (
    BusyError,
    DroppedError,
    Envelope,
    Fleet,
    LostError,
    MalformedError,
    OversizedError,
)
from consilience.client.fleet import FORGOTTEN, HEARTBEAT, SERVER_NODE, open_fleet
from consilience.client.reach import why_unreachable
from consilience.client.runs import Runs
from consilience.common.errors import AdmissionError, ConsilienceError, DuplicateError
from consilience.common.identity import Kit, PrivateKey
from consilience.common.protocol import ANSWER, CARD, CONTRACT
from consilience.common.sums.messages import SUM_QUESTIONS
from consilience.common.tails import BLOCKS, TAIL

QUESTIONS = (CARD, CONTRACT, ANSWER, TAIL, BLOCKS, *SUM_QUESTIONS)
QUEUE = 2
"""Questions pulled ahead, and answers waiting to be sent."""
BUSY_POLL, IDLE_POLL = 0.05, 1.0
"""Seconds between two looks for a question: soon after one came, and at most."""
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
"""Seconds before a lost connection is tried again: doubled each time, and at most."""
PATIENCE = FORGOTTEN * 1.5
"""Seconds that an agent waits for another one of its key to go."""
ADMISSION_PATIENCE = 5.0
"""Seconds for which an unknown key is tried again: a server that has just started is still told who is admitted."""
GRACE = 4.0
"""Seconds that a stopping agent gives the question in hand."""
TRIES = 3
"""How often a reply is sent before it is dropped; the server asks again."""

State = Literal["starting", "connecting", "connected", "stopping", "stopped"]
log = logging.getLogger(__name__)


@dataclass
class _Reply:
    message: Message
    seconds: float = 0.0
    tries: int = 0


class Agent:
    """A site's agent. `run` blocks until `stop` is called from another thread or a signal handler."""

    def __init__(self, site: Path, state: Path, kit: Kit, key: PrivateKey, *, patience: float = PATIENCE) -> None:
        """`patience`: seconds to wait for another agent of this key, which may be a dead one of this site, to go."""
        self._config: UserConfig = {"site": str(site)}
        self._kit, self._key, self._patience = kit, key, patience
        self._inbox: queue.Queue[tuple[Message, Context]] = queue.Queue()
        self._outbox: queue.Queue[_Reply] = queue.Queue()
        self._unsent: _Reply | None = None
        self._runs = Runs(state / "refusals.jsonl", self._config)
        self._stop, self._wake, self._closed = threading.Event(), threading.Event(), threading.Event()
        self._flaps = 0
        self._failures: list[Exception] = []
        self._working = False
        self._node: int | None = None
        self._heard = float("-inf")
        self._state: State = "starting"
        self._since = datetime.now(UTC)
        self._answered = self._refused = 0

    def stop(self) -> None:
        """Let `run` end soon: it goes offline first."""
        self._stop.set()
        self._wake.set()

    @property
    def working(self) -> bool:
        """Whether a question is being answered."""
        return self._working

    def status(self) -> dict[str, Any]:
        """Return how the agent is: what GET /health shows."""
        return {
            "status": self._state,
            "site": self._kit.site,
            "server": self._kit.address,
            "since": self._since.isoformat(timespec="seconds"),
            "answered": self._answered,
            "refused": self._refused,
        }

    def run(self) -> None:
        """Load the site, then serve until stopped.

        Raises what loading the site raises, and `CertificateError`, `AdmissionError`, `DuplicateError`, `VersionError`,
        `ClockError` when trying again cannot help.
        """
        site_of(Context(run_id=0, node_id=0, node_config=self._config, state=RecordDict(), run_config={}))
        threading.Thread(target=self._work, name="worker", daemon=True).start()
        try:
            while (fleet := self._connect()) is not None:
                self._serve(fleet)
        finally:
            self.stop()
            self._enter("stopped")

    def _enter(self, state: State) -> None:
        if state != self._state:
            self._state, self._since = state, datetime.now(UTC)

    def _connect(self) -> Fleet | None:
        """Return a connection on which this node is online; None when stopped meanwhile."""
        self._enter("connecting")
        wait, refused_until, unknown_until = FIRST_WAIT, None, None
        if self._flaps > 1:
            self._stop.wait(min(FIRST_WAIT * 2**self._flaps, LONGEST_WAIT) * random.uniform(0.7, 1.3))
        while not self._stop.is_set():
            # a node that the server still takes to be online is taken up as it is
            node = self._node if time.monotonic() - self._heard < FORGOTTEN else None
            fleet = open_fleet(self._kit, self._key, node)
            try:
                if node is None:
                    self._node = fleet.activate()
                else:
                    fleet.heartbeat()
                self._heard = time.monotonic()
                self._enter("connected")
                log.info("connected to %s as %s", self._kit.address, self._kit.site)
                return fleet
            except BusyError:
                refused_until = refused_until or time.monotonic() + self._patience
                if time.monotonic() > refused_until:
                    fleet.close()
                    raise DuplicateError(
                        f"Another agent is connected to {self._kit.address} with the key of {self._kit.site}",
                        hint="Stop it; if there should be none, see `consilience explain 19`",
                    ) from None
                reason, wait = "the server takes another agent of this key to be connected", 2.0
            except AdmissionError as error:
                unknown_until = unknown_until or time.monotonic() + ADMISSION_PATIENCE
                if time.monotonic() > unknown_until:
                    fleet.close()
                    raise
                reason, wait = error.message, 1.0
            except (LostError, DroppedError) as error:
                fleet.close()
                reason = why_unreachable(self._kit).message if isinstance(error, LostError) else str(error)
            except BaseException:
                fleet.close()
                raise
            fleet.close()
            pause = wait * random.uniform(0.7, 1.3)
            log.warning("%s; trying again in %.1f s", reason, pause)
            self._stop.wait(pause)
            wait = min(2 * wait, LONGEST_WAIT)
        return None

    def _serve(self, fleet: Fleet) -> None:
        """Serve on one connection until it is lost or the agent is stopped."""
        began = time.monotonic()
        self._failures.clear()
        self._closed.clear()
        self._wake.clear()
        if self._stop.is_set():
            self._wake.set()
        threads = [
            threading.Thread(target=self._guard, args=(loop, fleet), name=loop.__name__, daemon=True)
            for loop in (self._pull, self._push)
        ]
        for thread in threads:
            thread.start()
        while not self._wake.wait(HEARTBEAT * 0.4):
            try:
                fleet.heartbeat()
                self._heard = time.monotonic()
            except (LostError, DroppedError) as error:
                if time.monotonic() - self._heard > FORGOTTEN:
                    self._fail(error)
            except ConsilienceError as error:
                self._fail(error)
        if not self._failures:
            self._enter("stopping")
            self._finish(fleet)
        self._closed.set()
        fleet.close()
        for thread in threads:
            thread.join()
        self._flaps = self._flaps + 1 if time.monotonic() - began < HEARTBEAT else 0
        if self._failures and not isinstance(self._failures[0], LostError | DroppedError):
            raise self._failures[0]
        if not self._stop.is_set():
            self._enter("connecting")
            log.warning("connection lost: %s", self._failures[0])

    def _finish(self, fleet: Fleet) -> None:
        """Give the question in hand a moment, then go offline: the server asks others for the rest."""
        until = time.monotonic() + GRACE
        while time.monotonic() < until and (self._working or self._unsent or not self._outbox.empty()):
            if self._failures:
                return
            time.sleep(0.02)
        with suppress(LostError, DroppedError, ConsilienceError):
            fleet.deactivate()
        log.info("disconnected from %s", self._kit.address)

    def _guard(self, loop: Any, fleet: Fleet) -> None:
        try:
            loop(fleet)
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        """End this connection, for the first reason that is given."""
        self._failures.append(error)
        self._wake.set()

    def _pull(self, fleet: Fleet) -> None:
        """Look for questions; the ones that may be answered go to the worker."""
        pause = BUSY_POLL
        while not self._wake.is_set():
            if self._inbox.qsize() >= QUEUE or self._outbox.qsize() >= QUEUE:
                self._wake.wait(0.01)
                continue
            try:
                envelope = fleet.pull()
            except (OversizedError, MalformedError) as error:
                log.warning("dropped a message: %s", error)
                self._wake.wait(IDLE_POLL)
                continue
            if envelope is None:
                self._wake.wait(pause)
                pause = min(pause * 1.5, IDLE_POLL)
                continue
            pause = BUSY_POLL
            self._take(fleet, envelope)

    def _take(self, fleet: Fleet, envelope: Envelope) -> None:
        metadata = envelope.message.metadata
        try:
            if metadata.src_node_id != SERVER_NODE or metadata.dst_node_id != self._node:
                self._refuse(envelope, "the message does not come from the server's job")
            elif envelope.kind not in QUESTIONS:
                self._refuse(envelope, "the message is none of the questions that a site answers")
            else:
                run = self._runs.look_into(fleet, envelope.run, metadata.dst_node_id)
                if run.problem is not None:
                    self._refuse(envelope, run.problem, ErrorCode.INVALID_FAB)
                else:
                    self._inbox.put((fleet.fetch(envelope), run.context))
        except OversizedError as error:
            log.warning("%s", error)
            self._refuse(envelope, "the message is too large")
        except MalformedError as error:
            log.warning("%s", error)
            self._refuse(envelope, "the message cannot be read")
        except DroppedError as error:
            log.warning("dropped a message of run %d: %s", envelope.run, error)
        except (LostError, ConsilienceError):
            raise
        except Exception as error:  # a stranger's message must not end the agent, nor its text enter the log
            log.error("dropped a message of run %d: %s", envelope.run, type(error).__name__)

    def _refuse(self, envelope: Envelope, reason: str, code: int = ErrorCode.MOD_FAILED_PRECONDITION) -> None:
        """Reply with a constant reason."""
        self._refused += 1
        log.warning("refused a message of run %d, type %.80r: %s", envelope.run, envelope.kind, reason)
        self._outbox.put(_Reply(Message(Error(code, reason), reply_to=envelope.message)))

    def _work(self) -> None:
        """Answer questions, one at a time, for as long as the process lives."""
        while not self._stop.is_set():
            if self._outbox.qsize() >= QUEUE:
                self._stop.wait(0.01)
                continue
            try:
                message, context = self._inbox.get(timeout=0.2)
            except queue.Empty:
                continue
            self._working = True
            began = time.perf_counter()
            try:
                reply = app(message, context)
                self._outbox.put(_Reply(reply, time.perf_counter() - began))
            except Exception as error:  # the app answers for its own failures: this message cannot be replied to
                log.error("dropped a message of run %d: %s", message.metadata.run_id, type(error).__name__)
            self._working = False

    def _push(self, fleet: Fleet) -> None:
        """Send replies; one that a loss interrupts is sent again on the next connection."""
        while not self._closed.is_set() and not self._failures:
            if self._unsent is None:
                try:
                    self._unsent = self._outbox.get(timeout=0.1)
                except queue.Empty:
                    continue
            reply = self._unsent
            reply.tries += 1
            try:
                fleet.send(reply.message, reply.seconds)
                self._answered += reply.message.has_content()
            except DroppedError as error:
                log.warning("dropped a reply to run %d: %s", reply.message.metadata.run_id, error)
            except LostError:
                if reply.tries < TRIES:
                    raise
                log.warning("dropped a reply to run %d after %d tries", reply.message.metadata.run_id, TRIES)
                self._unsent = None
                raise
            except ConsilienceError:
                raise
            except Exception as error:
                log.error("dropped a reply to run %d: %s", reply.message.metadata.run_id, type(error).__name__)
            self._unsent = None
