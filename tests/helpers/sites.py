"""Scripted sites behind a real ClientApp, for tests of the server's side."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterable
from typing import Protocol, cast

import numpy as np
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from consilience.common.cards import CoverageCard, FeaturesCard, SiteCard, TailCard
from consilience.common.encoding import encode, encode_coverage
from consilience.common.identity import PrivateKey, key_fingerprint, key_line
from consilience.common.protocol import Agreement, Answer, Contract, Enclosed, Question, Refusal
from consilience.common.settings import ENCODINGS, CoverageEncoding, LabelKind
from consilience.common.vouching import Signer
from consilience.deploy.local_grid import LocalGrid

DIGEST, POLICY, CLASSES = "a" * 64, "c" * 16, 3
COVERAGE = "e" * 64
"""Fingerprint of the coverage that sites of these tests have."""
Handler = Callable[[Question, int], RecordDict]
Enclosing = Callable[[Contract], Enclosed | None]
"""What comes with a site's agreement."""


class Tail(Protocol):
    """A site's tail."""

    @property
    def card(self) -> TailCard:
        """What the site's card tells of it."""
        ...

    def answer(self, content: RecordDict) -> RecordDict:
        """Answer a question about features, or for a piece of the blocks."""
        ...


def rows(question: Question) -> np.ndarray:
    """What an honest site answers: each sample's own row, so that a mix-up shows."""
    odds = question.ids.astype(np.float64)[:, None] % 7 + np.arange(CLASSES)
    logits = odds * 0.3
    return np.asarray(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)), np.float32)


def covered(question: Question) -> np.ndarray:
    """What an honest site says of coverage: (n,), each sample's own number."""
    return np.asarray((question.ids * 37 % 101 + 1) / 128, np.float32)


def honest(question: Question, attempt: int) -> RecordDict:
    """Answer as asked."""
    if question.kind == "coverage":
        data = encode_coverage(covered(question), cast(CoverageEncoding, question.encoding))
    else:
        data = encode(rows(question), question.encoding, odds=question.kind == "log-odds")
    return Answer(question, data, 0.1).to_content()


class Sites:
    """A ClientApp whose sites answer by the given handlers; counts questions and how many run at once."""

    def __init__(
        self,
        handlers: dict[str, Handler],
        cards: dict[str, str] | None = None,
        classes: dict[str, tuple[str, ...]] | None = None,
        coverage: dict[str, tuple[CoverageEncoding, ...]] | None = None,
        features: dict[str, FeaturesCard] | None = None,
        keys: dict[str, PrivateKey] | None = None,
        enclosing: dict[str, Enclosing] | None = None,
        labels: dict[str, LabelKind] | None = None,
        tails: dict[str, Tail] | None = None,
    ) -> None:
        self.handlers, self.cards, self.classes = handlers, cards or {}, classes or {}
        self.coverage, self.features, self.keys = coverage or {}, features or {}, keys or {}
        self.enclosing, self.labels, self.tails = enclosing or {}, labels or {}, tails or {}
        self.contracts: list[tuple[str, Contract]] = []
        self.attempts: dict[tuple[str, int], int] = {}
        self.asked_coverage: dict[tuple[str, int], int] = {}
        self.asked_features: dict[tuple[str, str, int], int] = {}
        self.lock = threading.Lock()
        self.app = ClientApp()
        self.app.query("card")(self.card)
        self.app.query("contract")(self.contract)
        self.app.query("answer")(self.answer)
        self.app.query("tail")(self.tail)
        self.app.query("blocks")(self.tail)

    def card(self, message: Message, context: Context) -> Message:
        """Present the site."""
        name = str(context.node_config["name"])
        card = SiteCard(
            labels=self.labels.get(name, "single"),
            name=self.cards.get(name, name),
            classes=self.classes.get(name, ("a", "b", "c")),
            encodings=ENCODINGS,
            teacher=DIGEST,
            description="",
            policy=POLICY,
            coverage=CoverageCard(fingerprint=COVERAGE, encodings=self.coverage[name], description="")
            if name in self.coverage
            else None,
            features=self.features.get(name),
            tail=self.tails[name].card if name in self.tails else None,
            identity=key_fingerprint(self.keys[name].public_key()) if name in self.keys else None,
            public_key=key_line(self.keys[name].public_key()) if name in self.keys else None,
        )
        return Message(card.to_content(), reply_to=message)

    def contract(self, message: Message, context: Context) -> Message:
        """Agree, unless stubborn."""
        name, asked = str(context.node_config["name"]), Contract.from_content(message.content)
        with self.lock:
            self.contracts.append((name, asked))
        if name == "stubborn":
            content = Refusal(code="unknown-pool", reason="the site has no copy of this pool").to_content()
        else:
            enclosed = self.enclosing[name](asked) if name in self.enclosing else None
            content = Agreement(pools=asked.pools, enclosed=enclosed).to_content()
        return Message(content, reply_to=message)

    def answer(self, message: Message, context: Context) -> Message:
        """Let the site's handler answer."""
        name = str(context.node_config["name"])
        question = Question.from_content(message.content)
        if question.kind == "features":
            with self.lock:
                asked = name, question.teacher, question.start
                attempt = self.asked_features[asked] = self.asked_features.get(asked, 0) + 1
            return Message(self.signed(name, question, attempt), reply_to=message)
        with self.lock:
            counts = self.asked_coverage if question.kind == "coverage" else self.attempts
            attempt = counts[name, question.start] = counts.get((name, question.start), 0) + 1
        return Message(self.signed(name, question, attempt), reply_to=message)

    def tail(self, message: Message, context: Context) -> Message:
        """Let the site's tail answer."""
        return Message(self.tails[str(context.node_config["name"])].answer(message.content), reply_to=message)

    def signed(self, name: str, question: Question, attempt: int) -> RecordDict:
        """Return what the site's handler answers, with the site's signature where it has a key."""
        content = self.handlers[name](question, attempt)
        if name not in self.keys or Refusal.find(content) is not None:
            return content
        answer = Answer.from_content(content, question)
        signer = Signer(self.keys[name], name, self.classes.get(name, ("a", "b", "c")))
        return dataclasses.replace(answer, vouch=signer.vouch(question, answer.data)).to_content()


def grid_of(sites: Sites) -> LocalGrid:
    """Return a grid with one node a site."""
    return LocalGrid(sites.app, [{"name": name} for name in sites.handlers], workers=3)


class ScriptedGrid(LocalGrid):
    """A grid whose nodes go away and come back as a test says.

    `away` nodes are not listed; what they were asked comes back as Flower's error NODE_UNAVAILABLE, or, when `silent`,
    not at all. `refuses` nodes take no message. `swallow` counts messages to a node that are still to get lost.
    """

    def __init__(self, sites: Sites) -> None:
        super().__init__(sites.app, [{"name": name} for name in sites.handlers], workers=3)
        self.away: set[int] = set()
        self.refuses: set[int] = set()
        self.swallow: dict[int, int] = {}
        self.silent = False
        self.looks = 0
        self.sent: dict[str, Message] = {}
        self.gone: set[str] = set()

    def looked(self) -> None:
        """Called at every look at who is online: a script changes things here."""

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes that are not away."""
        self.looks += 1
        self.looked()
        return [node for node in super().get_node_ids() if node not in self.away]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hand over what can be handed over."""
        identifiers: list[str] = []
        for message in messages:
            node = message.metadata.dst_node_id
            if node in self.refuses:
                identifiers.append(None)  # type: ignore[arg-type]  # as Flower's own grid does
                continue
            lost = node in self.away or self.swallow.get(node, 0) > 0
            if lost:
                self.swallow[node] = self.swallow.get(node, 1) - 1
                message.metadata.__dict__["_message_id"] = identifier = message.object_id
                if node in self.away:
                    self.gone.add(identifier)
            else:
                (identifier,) = super().push_messages([message])
            self.sent[identifier] = message
            identifiers.append(identifier)
        return identifiers

    def leave(self, node: int) -> None:
        """Let a node go away, and with it what it was asked."""
        self.away.add(node)
        self.gone |= {i for i, message in self.sent.items() if message.metadata.dst_node_id == node}

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that are there, and errors for what nobody will answer."""
        wanted = list(message_ids)
        replies = list(super().pull_messages([i for i in wanted if i not in self.gone]))
        if not self.silent:
            for identifier in [i for i in wanted if i in self.gone]:
                replies.append(Message(Error(code=5, reason="away"), reply_to=self.sent[identifier]))
                self.gone.discard(identifier)
        return replies


def refusing(question: Question, attempt: int) -> RecordDict:
    """What a site with a broken teacher answers."""
    return Refusal(code="teacher-failed", reason="the site's teacher gave no usable answer").to_content()
