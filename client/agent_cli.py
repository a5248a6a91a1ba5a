"""`consilience site start`: the agent as a process.

Lives here: papers checked before it starts, signals, the lock on the site's folder, and the form of the log. Does not
live here: the agent (client/agent).
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from contextlib import ExitStack
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from consilience.client.agent import Agent
from consilience.client.health import health_server
from consilience.client.ledger import Ledger
from consilience.common.cli import Result, emit
from consilience.common.errors import ConsilienceError, DuplicateError, IdentityError, RunError
from consilience.common.files import lock, make_private
from consilience.common.identity import Kit, PrivateKey, key_fingerprint, load_key
from consilience.common.settings import SiteSettings
from consilience.common.settings_file import load_settings

STOP_WITHIN = 8.0
"""Seconds from a signal to the end of the process, whatever the agent is doing."""
log = logging.getLogger(__name__)


class LogForm(StrEnum):
    """What a line of the log looks like."""

    PLAIN = "plain"
    JSON = "json"


def start(
    site: Annotated[Path, typer.Argument(help="The site's site.yaml.")],
    form: Annotated[LogForm, typer.Option("--log", help="Lines for people, or one JSON object a line.")] = (
        LogForm.PLAIN
    ),
) -> None:
    """Connect the site to its server and answer questions until stopped (Ctrl-C, SIGTERM)."""
    log_to_stderr(form)

    def action() -> Result:
        try:
            serve(site)
        except ConsilienceError as error:
            if form is LogForm.PLAIN:
                raise
            log.error("%s", error, extra={"about": {"code": error.exit_code, "name": error.name}})
            raise typer.Exit(error.exit_code) from error
        return {}, ""

    emit(False, action)


def papers(settings: SiteSettings) -> tuple[PrivateKey, Kit]:
    """Return the site's key and kit. Raises `IdentityError` when one is missing or they are not of this site.

    While a new key waits for its kit, the key that `site init --rotate` put aside still goes with the old one.
    """
    key, kit = load_key(settings.key), Kit.read(settings.kit)
    if kit.site != settings.name:
        raise IdentityError(
            f"{settings.kit} was made for site {kit.site!r}; the settings name {settings.name!r}",
            hint="Put the kit of this site there, or correct the name",
        )
    if kit.site_fingerprint != key_fingerprint(key.public_key()):
        for aside in sorted(settings.key.parent.glob(f"{settings.key.name}.*"), reverse=True):
            older = load_key(aside)
            if kit.site_fingerprint == key_fingerprint(older.public_key()):
                log.warning("the kit is that of an earlier key, %s: put the new kit at %s", aside, settings.kit)
                return older, kit
        raise IdentityError(
            f"{settings.kit} was made for another key than {settings.key}",
            hint="Put back the key that was approved, or send the coordinator a request with this one",
        )
    return key, kit


def serve(path: Path) -> None:
    """Run the agent of `path` until a signal ends it. Raises `ConsilienceError`."""
    settings = load_settings(path, SiteSettings)
    key, kit = papers(settings)
    make_private(settings.state)
    with ExitStack() as held:
        try:
            held.enter_context(lock(settings.state / "agent"))
        except RunError as error:
            raise DuplicateError(
                f"An agent of this site is running already: it holds {settings.state / 'agent'}",
                hint="Stop that one first; it may be a service",
            ) from error
        ledger = Ledger.open(settings)
        log.info("the ledger is in order: %d rows, %d samples released", ledger.count, ledger.spent.lifetime)
        ledger.close()
        log.info("the server's words: %s", kit.words)
        agent = Agent(path.resolve(), settings.state, kit, key)
        held.enter_context(health_server(settings.health_port, agent.status))
        _run(agent)


def _run(agent: Agent) -> None:
    """Run the agent beside the main thread, which signals reach even while a call blocks."""
    failures: list[BaseException] = []
    done = threading.Event()

    def body() -> None:
        try:
            agent.run()
        except BaseException as error:
            failures.append(error)
        done.set()

    def ended(number: int, frame: object) -> None:
        log.info("stopping (%s)", signal.Signals(number).name)
        agent.stop()
        stopping.set()

    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ended)
    threading.Thread(target=body, name="agent", daemon=True).start()
    while not stopping.wait(0.2) and not done.is_set():
        pass
    if not done.wait(STOP_WITHIN) or (agent.working and not failures):
        # a teacher in the middle of its work cannot be asked to end, and ending Python under it may crash
        logging.shutdown()
        sys.stderr.flush()
        os._exit(0)
    if failures:
        raise failures[0]


class _JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "about", {}),
        }
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_to_stderr(form: LogForm) -> None:
    """Write the program's log, and nothing of the libraries' below warnings, to stderr; Flower's own not at all."""
    handler = logging.StreamHandler()
    handler.setFormatter(
        _JsonLines() if form is LogForm.JSON else logging.Formatter("%(asctime)s %(levelname)-7s %(message)s")
    )
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("consilience").setLevel(logging.INFO)
    flower = logging.getLogger("flwr")
    flower.handlers.clear()
    flower.addHandler(logging.NullHandler())
    flower.propagate = False
