"""The server's runs as a site sees them: what their bundles say, and the record of the refused ones.

Does not live here: what may be in a bundle (client/bundle), replies (client/agent).
"""

from __future__ import annotations

import json
import logging
import os
from collections import OrderedDict
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from flwr.app import Context, RecordDict
from flwr.app.user_config import UserConfig

from consilience.client.bundle import bundle_problem
from consilience.client.connection import Fleet, MalformedError, OversizedError
from consilience.common.files import storage_error

REMEMBERED = 32
"""Runs whose bundle is not fetched again."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """What is remembered of a run: its context, or why it is refused."""

    context: Context
    problem: str | None


class Runs:
    """The runs that asked lately. Used by one thread."""

    def __init__(self, refusals: Path, config: UserConfig) -> None:
        self._refusals, self._config = refusals, config
        self._runs: OrderedDict[int, Run] = OrderedDict()

    def look_into(self, fleet: Fleet, identifier: int, node: int) -> Run:
        """Say what follows from a run's bundle, which is fetched once. Raises `DroppedError`, `LostError`."""
        if identifier not in self._runs:
            try:
                problem = bundle_problem(fleet.bundle(identifier))
            except OversizedError:
                problem = "the run's bundle is too large"
            except MalformedError:
                problem = "the run's bundle cannot be read"
            context = Context(
                run_id=identifier,
                node_id=node,
                node_config=dict(self._config),
                state=RecordDict(),
                run_config={},
            )
            self._runs[identifier] = Run(context, problem)
            if problem is None:
                log.info("answering run %d", identifier)
            else:
                self._record(identifier, problem)
            while len(self._runs) > REMEMBERED:
                self._runs.popitem(last=False)
        return self._runs[identifier]

    def _record(self, run: int, reason: str) -> None:
        """Add a refused run to the site's record: one line of JSON."""
        line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "run": str(run), "reason": reason}
        try:
            with self._refusals.open("ab") as file:
                file.write(json.dumps(line).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            log.error("%s", storage_error(error, self._refusals, "write"))
