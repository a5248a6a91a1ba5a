"""The send loop: cards, contracts and questions over a Flower Grid, answers into the stores.

Lives here: who is asked what and when, how failures are counted. Does not live here: which samples a job wants
(server/job) and how messages travel (the Grid is whatever the caller has: in-process or Flower's own).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from consilience.common.errors import AskingError, ProtocolError
from consilience.common.progress import Reporter, Task
from consilience.common.protocol import (
    ANSWER,
    CARD,
    CONTRACT,
    Agreement,
    Answer,
    CardRequest,
    Contract,
    Question,
    Record,
    SiteCard,
    read_reply,
)
from consilience.common.settings import Ask
from consilience.server.answers import AnswerStore
from consilience.server.events import Events

POLL_SECONDS = 0.002
"""Pause between two looks for replies: far below the time of a question, far above the cost of a look."""

Reply = TypeVar("Reply", bound=Record)


@dataclass
class SiteState:
    """How asking one site goes."""

    name: str
    node: int
    asked: int = 0
    """Samples asked about in this session."""
    failures: list[str] = field(default_factory=list)
    """Reasons of failed questions, oldest first."""
    lost: int = 0
    """Samples given up after the last retry."""


def collect_cards(grid: Grid, job: str) -> dict[int, SiteCard]:
    """Ask every connected node for its site card; node id -> card.

    Raises `AskingError` when no node is connected, one fails to present itself, or two have one name.
    """
    nodes = list(grid.get_node_ids())
    if not nodes:
        raise AskingError("No site is connected", hint="Start the sites, then run the same command again")
    requests = {node: CardRequest(job=job).to_content() for node in nodes}
    cards: dict[int, SiteCard] = {}
    for node, content in _ask_all(grid, CARD, requests).items():
        cards[node] = _read(content, SiteCard, f"Node {node}")
    names = [card.name for card in cards.values()]
    for name in names:
        if names.count(name) > 1:
            raise AskingError(f"Two connected sites are called {name}", hint="Rename one of them in its site.yaml")
    return cards


def agree(grid: Grid, contracts: Mapping[int, Contract], cards: Mapping[int, SiteCard]) -> None:
    """Send each node its contract. Raises `AskingError` naming the first site that does not agree, and why."""
    replies = _ask_all(grid, CONTRACT, {node: contract.to_content() for node, contract in contracts.items()})
    for node, content in replies.items():
        agreement = _read(content, Agreement, f"Site {cards[node].name}")
        if agreement.pools != contracts[node].pools:
            raise AskingError(f"Site {cards[node].name} agreed to other pools", hint="Update that site's software")


def ask(
    grid: Grid,
    job: str,
    stores: Sequence[tuple[int, AnswerStore]],
    settings: Ask,
    *,
    events: Events,
    reporter: Reporter,
) -> list[SiteState]:
    """Ask until every store is complete or its site has used up its retries; answers are stored as they arrive.

    `stores` pairs a node id with a store; a node may stand in several pairs (several pools). Questions to one node
    keep at most `settings.in_flight` on their way. Raises `StorageError` when an answer cannot be stored: what had
    arrived before is safe, and nothing more is asked.
    """
    session = _Session(grid, job, settings, events, reporter)
    for node, store in stores:
        session.add(node, store)
    session.run()
    return list(session.states.values())


@dataclass
class _Pending:
    question: Question
    store: AnswerStore
    node: int
    tries: int


class _Session:
    """Bookkeeping of one call of `ask`."""

    def __init__(self, grid: Grid, job: str, settings: Ask, events: Events, reporter: Reporter) -> None:
        self._grid, self._job, self._settings = grid, job, settings
        self._events, self._reporter = events, reporter
        self._queues: dict[int, deque[_Pending]] = {}
        self._flying: dict[str, _Pending] = {}
        self._tasks: dict[int, Task] = {}
        self.states: dict[int, SiteState] = {}

    def add(self, node: int, store: AnswerStore) -> None:
        about = store.about
        state = self.states.setdefault(node, SiteState(about.site, node))
        queue = self._queues.setdefault(node, deque())
        for low, high in store.missing():
            start = low
            while start < high:
                stop = min(high, start - start % self._settings.question_size + self._settings.question_size)
                question = Question(
                    job=self._job,
                    pool=about.pool,
                    start=start,
                    stop=stop,
                    encoding=about.encoding,
                    teacher=about.teacher,
                    policy=about.policy,
                )
                queue.append(_Pending(question, store, node, tries=0))
                state.asked += stop - start
                start = stop

    def run(self) -> None:
        for node, state in self.states.items():
            if state.asked:
                self._tasks[node] = self._reporter.start(f"asking {state.name}", state.asked)
        while any(self._queues.values()) or self._flying:
            self._send()
            replies = list(self._grid.pull_messages(list(self._flying)))
            for message in replies:
                self._receive(message)
            if not replies:
                time.sleep(POLL_SECONDS)

    def _send(self) -> None:
        for node, queue in self._queues.items():
            flying = sum(pending.node == node for pending in self._flying.values())
            batch = [queue.popleft() for _ in range(min(len(queue), self._settings.in_flight - flying))]
            if not batch:
                continue
            messages = [_message(p.question.to_content(), ANSWER, node) for p in batch]
            for pending, identifier in zip(batch, self._grid.push_messages(messages), strict=True):
                self._flying[identifier] = pending
                self._note("asked", pending)

    def _receive(self, message: Message) -> None:
        pending = self._flying.pop(message.metadata.reply_to_message_id, None)
        if pending is None:
            return  # a late or strange reply: nobody waits for it
        try:
            if message.has_error():
                raise ProtocolError(f"The message failed with Flower's code {message.error.code}")
            pending.store.append(Answer.from_content(message.content, pending.question))
        except ProtocolError as error:
            self._failed(pending, error.message)
            return
        self._note("answered", pending)
        self._tasks[pending.node].advance(len(pending.question))

    def _failed(self, pending: _Pending, reason: str) -> None:
        state = self.states[pending.node]
        state.failures.append(reason)
        self._note("failed", pending, reason=reason)
        if pending.tries < self._settings.retries:
            pending.tries += 1
            self._queues[pending.node].append(pending)
        else:
            state.lost += len(pending.question)

    def _note(self, event: str, pending: _Pending, **more: str) -> None:
        question = pending.question
        self._events.add(
            event,
            site=pending.store.about.site,
            pool=question.pool[:12],
            start=question.start,
            stop=question.stop,
            **more,
        )


def _ask_all(grid: Grid, kind: str, contents: Mapping[int, RecordDict]) -> dict[int, RecordDict | None]:
    """Send one message a node and wait for all replies; node id -> content, None for an error of Flower's."""
    nodes = list(contents)
    identifiers = list(grid.push_messages([_message(contents[node], kind, node) for node in nodes]))
    waiting = dict(zip(identifiers, nodes, strict=True))
    replies: dict[int, RecordDict | None] = {}
    while waiting:
        for message in grid.pull_messages(list(waiting)):
            node = waiting.pop(message.metadata.reply_to_message_id, None)
            if node is not None:
                replies[node] = None if message.has_error() else message.content
        if waiting:
            time.sleep(POLL_SECONDS)
    return {node: replies[node] for node in nodes}


def _read(content: RecordDict | None, record: type[Reply], who: str) -> Reply:
    try:
        if content is None:
            raise ProtocolError("it failed to answer")
        return read_reply(content, record)
    except ProtocolError as error:
        raise AskingError(
            f"{who} cannot take part: {error.message}", hint="See that site's log, mend it, run the same command again"
        ) from error


def _message(content: RecordDict, kind: str, node: int) -> Message:
    return Message(content, dst_node_id=node, message_type=kind)
