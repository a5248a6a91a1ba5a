"""Sites' tails over a Flower Grid: blocks that are lent are fetched once, others are asked as training goes.

Lives here: finding the sites that a run began with, one exchange at a time for each site whatever it does meanwhile,
and the counts of it in RUN/tails. Does not live here: how much is asked (common/nets/tail_plan), what is checked of an
answer (server/student/remote_tail), what is learnt (server/filtered).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from consilience.common.cards import SiteCard, TailCard
from consilience.common.errors import AskingError, ProtocolError
from consilience.common.files import read_json, sha256, write_bytes, write_json
from consilience.common.nets.blocks import LentTail, rebuild_tail
from consilience.common.nets.tail_plan import most_samples, taps_told
from consilience.common.progress import Reporter
from consilience.common.protocol import RefusedReplyError
from consilience.common.settings import JobSettings
from consilience.common.tails import (
    BLOCKS,
    PIECE_BYTES,
    TAIL,
    BlocksQuestion,
    Carried,
    Floats,
    TailQuestion,
    answered,
    packed,
)
from consilience.server.contract import RunContract
from consilience.server.enrolment import collect_cards
from consilience.server.events import Events
from consilience.server.messages import Backoff, compose, content_of, is_absence, pull, push
from consilience.server.settings import Home
from consilience.server.student.remote_tail import RemoteTail, Spent
from consilience.server.student.tails import LocalTail, TeacherTail

TTL_SECONDS = 120.0
"""How long a question waits for its answer before it counts as lost on the way and is sent again."""
ASKED = "asked.json"
"""In RUN/tails: site -> what its tail was asked."""
SAVE_EVERY = 2.0
"""Seconds between two writings of the counts."""


class Exchange:
    """Questions to sites, one answer each, for several threads at once. Sites that go away are waited for."""

    def __init__(
        self,
        grid: Grid,
        job: JobSettings,
        contract: RunContract,
        path: Path,
        *,
        reporter: Reporter,
        events: Events,
        home: Home | None = None,
    ) -> None:
        """`contract` is what the sites agreed to, in the file `path`; `home` is as for `collect_cards`."""
        self._grid, self._job, self._contract, self._path, self._home = grid, job, contract, path, home
        self._reporter, self._events = reporter, events
        self._lock = threading.Lock()
        self._nodes: dict[str, int] = {}
        self._waiting: set[str] = set()
        self._replies: dict[str, Message] = {}

    def ask(self, site: str, kind: str, carried: Carried) -> bytes:
        """Return the bytes that answer a question.

        A question that fails is sent again `ask.retries` times; one that finds nobody there, until the site is back.
        Raises `AskingError` when it does not come back within `ask.wait` seconds, refuses, or fails too often.
        """
        failures, heard, backoff = 0, time.monotonic(), Backoff()
        while True:
            reply = self._once(site, kind, carried.to_content())
            if reply is None or is_absence(reply):
                self._events.add("tail-away", site=site)
                with self._lock:
                    self._nodes.pop(site, None)
                if time.monotonic() - heard > self._job.ask.wait:
                    raise AskingError(
                        f"Site {site} did not answer about its teacher's last blocks for {self._job.ask.wait:,g} s",
                        hint="Start that site, then run the same command again: what was trained is kept",
                    )
                backoff.pause()
                continue
            heard = time.monotonic()
            try:
                return answered(content_of(reply), carried.question)
            except ProtocolError as error:
                self._events.add("tail-failed", site=site, reason=error.message)
                failures += 1
                if failures > self._job.ask.retries or (isinstance(error, RefusedReplyError) and error.final):
                    raise AskingError(
                        f"Site {site} does not answer about its teacher's last blocks: {error.message}",
                        hint="Mend that site, then run the same command again: what was trained is kept",
                    ) from error

    def _once(self, site: str, kind: str, content: RecordDict) -> Message | None:
        """Send a question; return the reply, or None where none comes."""
        with self._lock:
            node = self._node(site)
            (identifier,) = push(self._grid, [compose(content, kind, node, TTL_SECONDS)])
            if identifier is None:
                return None
            self._waiting.add(identifier)
        backoff, until = Backoff(), time.monotonic() + TTL_SECONDS
        while time.monotonic() < until:
            with self._lock:
                # one pull for all that wait: a grid gives up replies that nobody asks for any more
                for answers, message in pull(self._grid, self._waiting):
                    self._waiting.discard(answers)
                    self._replies[answers] = message
                if (found := self._replies.pop(identifier, None)) is not None:
                    return found
            backoff.pause()
        with self._lock:
            self._waiting.discard(identifier)
        return None

    def _node(self, site: str) -> int:
        """Return where a site is, and wait for it where it is not there. Raises `AskingError`, `RunError`."""
        if site not in self._nodes:
            asking = self._job.ask
            cards, _ = collect_cards(
                self._grid,
                self._job.name,
                lacking=lambda names: "" if site in names else f"site {site} is not connected, whose blocks are needed",
                wait=asking.wait,
                strict=False,
                reporter=self._reporter,
                home=self._home,
            )
            wanted = [card for card in cards.values() if card.name == site]
            self._contract.check_unchanged(wanted, self._path)
            self._nodes |= {card.name: node for node, card in cards.items()}
        return self._nodes[site]


class Tails:
    """The tails of a run's sites, by RUN/tails."""

    def __init__(self, folder: Path, job: JobSettings, exchange: Exchange) -> None:
        self.folder, self._job, self._exchange = folder, job, exchange
        path = folder / ASKED
        held: Mapping[str, Mapping[str, int]] = read_json(path) if path.exists() else {}
        self._spent = {site: Spent(**told) for site, told in held.items()}
        self._saved, self._saving = 0.0, threading.Lock()

    def fetch(self, cards: Sequence[SiteCard], reporter: Reporter) -> None:
        """Fetch what these sites lend, unless it is here. Raises `AskingError`, `ProtocolError`, `StorageError`."""
        for card in cards:
            if card.tail is None or card.tail.allow != "blocks" or self._lent(card, card.tail) is not None:
                continue
            task = reporter.start(f"fetching blocks of {card.name}", card.tail.bytes)
            parts = []
            for start in range(0, card.tail.bytes, PIECE_BYTES):
                stop = min(start + PIECE_BYTES, card.tail.bytes)
                question = BlocksQuestion(
                    job=self._job.name, tail=card.tail.fingerprint, policy=card.policy, start=start, stop=stop
                )
                parts.append(self._exchange.ask(card.name, BLOCKS, Carried(question)))
                task.advance(stop - start)
            data = b"".join(parts)
            if sha256(data) != card.tail.digest:
                raise ProtocolError(
                    f"Site {card.name} lent blocks that are not those of its card",
                    hint="Have that site restart its agent, then run the same command again",
                )
            self._rebuilt(card, card.tail, data)
            write_bytes(self._path(card.name), data)

    def tail(self, card: SiteCard, sides: Sequence[tuple[int, int]]) -> TeacherTail:
        """Return a site's tail. `sides` as `common/nets/tail_plan` gives them. Raises `ProtocolError`."""
        told = card.tail
        assert told is not None  # the job was checked
        if told.allow == "blocks":
            data = self._lent(card, told)
            assert data is not None
            return self._rebuilt(card, told, data)
        spent = self._spent.setdefault(card.name, Spent())

        def ask(block: int, features: Floats, gradient: Floats | None = None) -> Floats:
            question = TailQuestion(
                job=self._job.name,
                tail=told.fingerprint,
                policy=card.policy,
                block=block,
                samples=len(features),
                shape=(int(features.shape[1]), int(features.shape[2]), int(features.shape[3])),
                outputs=told.blocks[-1].channels,
                gradient=gradient is not None,
            )
            carried = Carried(question, packed([features] if gradient is None else [features, gradient]))
            data = self._exchange.ask(card.name, TAIL, carried)
            self.save(now=False)
            return np.frombuffer(data, "<f4").astype(np.float32).reshape(question.answered)  # checked by RemoteTail

        most = max(most_samples(told, sides), 1)
        return RemoteTail(card.name, told.fingerprint, taps_told(told), told.first, ask, ask, most=most, spent=spent)

    def save(self, *, now: bool = True) -> None:
        """Write what was asked, at most every few seconds unless `now`. Raises `StorageError`."""
        with self._saving:
            if self._spent and (now or time.monotonic() - self._saved >= SAVE_EVERY):
                self._saved = time.monotonic()
                write_json(self.folder / ASKED, {site: asdict(spent) for site, spent in self._spent.items()})

    def _rebuilt(self, card: SiteCard, told: TailCard, data: bytes) -> LocalTail:
        lent = LentTail(told.architecture, told.first, len(card.classes), data)
        blocks = rebuild_tail(lent, most=self._job.ask.tail_bytes)
        given = [(tap.name, tap.unit, tap.channels) for tap in blocks.taps]
        if given != [(block.name, block.layout, block.channels) for block in told.blocks]:
            raise ProtocolError(
                f"Site {card.name} lent blocks that are not laid out as its card says",
                hint="Have that site restart its agent, or leave it out with ask.min_sites",
            )
        return LocalTail(card.name, blocks, told.architecture)

    def _lent(self, card: SiteCard, told: TailCard) -> bytes | None:
        """Return what a site lent before; None where it is not here, or is not what the card tells of."""
        path = self._path(card.name)
        data = path.read_bytes() if path.exists() else None
        return data if data is not None and sha256(data) == told.digest else None

    def _path(self, site: str) -> Path:
        return self.folder / f"{site}.safetensors"
