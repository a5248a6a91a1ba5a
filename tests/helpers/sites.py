"""Scripted sites behind a real ClientApp, for tests of the server's side."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from consilience.common.encoding import encode
from consilience.common.protocol import Agreement, Answer, Contract, Question, Refusal, SiteCard
from consilience.deploy.local_grid import LocalGrid

DIGEST, POLICY, CLASSES = "a" * 64, "c" * 16, 3
Handler = Callable[[Question, int], RecordDict]


def rows(question: Question) -> np.ndarray:
    """What an honest site answers: each sample's own row, so that a mix-up shows."""
    odds = np.arange(question.start, question.stop, dtype=np.float64)[:, None] % 7 + np.arange(CLASSES)
    logits = odds * 0.3
    return np.asarray(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)), np.float32)


def honest(question: Question, attempt: int) -> RecordDict:
    """Answer as asked."""
    return Answer(question, encode(rows(question), question.encoding), 0.1).to_content()


class Sites:
    """A ClientApp whose sites answer by the given handlers; counts questions and how many run at once."""

    def __init__(self, handlers: dict[str, Handler], cards: dict[str, str] | None = None) -> None:
        self.handlers, self.cards = handlers, cards or {}
        self.attempts: dict[tuple[str, int], int] = {}
        self.lock = threading.Lock()
        self.app = ClientApp()
        self.app.query("card")(self.card)
        self.app.query("contract")(self.contract)
        self.app.query("answer")(self.answer)

    def card(self, message: Message, context: Context) -> Message:
        """Present the site."""
        name = str(context.node_config["name"])
        card = SiteCard(
            name=self.cards.get(name, name),
            classes=("a", "b", "c"),
            encodings=("f32", "f16"),
            teacher=DIGEST,
            description="",
            policy=POLICY,
        )
        return Message(card.to_content(), reply_to=message)

    def contract(self, message: Message, context: Context) -> Message:
        """Agree, unless stubborn."""
        pools = Contract.from_content(message.content).pools
        if context.node_config["name"] == "stubborn":
            content = Refusal(code="unknown-pool", reason="the site has no copy of this pool").to_content()
        else:
            content = Agreement(pools=pools).to_content()
        return Message(content, reply_to=message)

    def answer(self, message: Message, context: Context) -> Message:
        """Let the site's handler answer."""
        name = str(context.node_config["name"])
        question = Question.from_content(message.content)
        with self.lock:
            attempt = self.attempts[name, question.start] = self.attempts.get((name, question.start), 0) + 1
        return Message(self.handlers[name](question, attempt), reply_to=message)


def grid_of(sites: Sites) -> LocalGrid:
    """Return a grid with one node a site."""
    return LocalGrid(sites.app, [{"name": name} for name in sites.handlers], workers=3)


def refusing(question: Question, attempt: int) -> RecordDict:
    """What a site with a broken teacher answers."""
    return Refusal(code="teacher-failed", reason="the site's teacher gave no usable answer").to_content()
