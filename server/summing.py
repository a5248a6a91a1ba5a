"""A secure sum over a Grid: the rounds of server/secure_sums asked of the sites, one message at a time each.

Lives here: sending, waiting, who is given up. Does not live here: what a round holds (server/secure_sums), taking
masks off (server/unmasking). A run that was killed goes on from the round that was open.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from flwr.app import RecordDict
from flwr.serverapp import Grid

from consilience.common.cards import SiteCard
from consilience.common.errors import AskingError, ProtocolError
from consilience.common.protocol import RefusedReplyError, read_reply
from consilience.common.records import RecordType
from consilience.common.sums.messages import (
    DELIVERY,
    ROSTER,
    ROWS,
    TERMS,
    UNMASK,
    Advert,
    Delivered,
    MaskedRows,
    Member,
    Opened,
    RowsQuestion,
    SealedShares,
)
from consilience.server.contract import RunContract
from consilience.server.messages import Backoff, compose, content_of, is_absence, pull, push
from consilience.server.secure_sums import SecureSum
from consilience.server.unmasking import Summed, unmask_sums

PIECE_BYTES = 4 * 2**20
"""Masked rows asked for at a time."""
TTL_SECONDS = 300.0
RETRY_SECONDS = 1.0
"""Pause before a site that failed is asked the same again; twice as long each time."""

Take = Callable[[str, RecordDict], None]
"""What to do with a site's reply: site, content. Raises `ProtocolError` when it is not what was asked for."""


def members_of(contract: RunContract, weights: Mapping[str, float]) -> tuple[Member, ...]:
    """Return the members of sums under a contract. Raises `AskingError` for sites without a key to sign with."""
    return tuple(
        Member(
            site=card.name,
            classes=classes,
            weight=weights.get(card.name, 1.0),
            teacher=card.teacher,
            policy=card.policy,
            identity=_identity(card),
            noise=card.sum_noise,
        )
        for card, classes in zip(contract.sites, contract.class_sets, strict=True)
    )


def _identity(card: SiteCard) -> str:
    if card.identity is None:
        raise AskingError(
            f"Site {card.name} has no key to sign with, which secure sums need",
            hint="Let the site make one with `consilience site init`",
        )
    return card.identity


def sum_over(
    grid: Grid, nodes: Mapping[str, int], secure: SecureSum, *, patience: float, retries: int = 2
) -> tuple[Summed, dict[str, str]]:
    """Do every round that is not done; returns the sums, and site -> why it was lost.

    `nodes`: site -> node, for the members that are there. A site is lost from then on that says nothing for `patience`
    seconds in a round, that refuses for good, or that fails `retries` times more when it is asked again.
    Raises `AskingError` when too few are left, `ProtocolError`, `StorageError`.
    """
    asking = _Asking(grid, nodes, patience, retries)
    try:
        _rounds(asking, secure)
        return unmask_sums(secure), asking.lost
    except AskingError as error:
        if not asking.lost:
            raise
        reasons = "; ".join(f"{site}: {reason}" for site, reason in sorted(asking.lost.items()))
        raise AskingError(f"{error.message} ({reasons})", hint=error.hint) from error


def _rounds(asking: _Asking, secure: SecureSum) -> None:
    terms = secure.terms
    if not secure.closed("roster"):
        step = _Step(TERMS, terms.to_content(), _take(Advert, secure.add_advert))
        asking.round({member.site: [step] for member in terms.members})
    roster = secure.roster()
    if not secure.closed("sharers"):
        step = _Step(ROSTER, roster.to_content(), _take(SealedShares, secure.add_sealed))
        asking.round({site: [step] for site in roster.places})
    sharers = secure.sharers()
    if not secure.closed("unmask"):
        asking.round({site: _answering(secure, site) for site in sharers})
    step = _Step(UNMASK, secure.unmask().to_content(), _take(Opened, secure.add_opened))
    asking.round({site: [step] for site in sharers})


def _take(record: type[RecordType], add: Callable[[str, RecordType], None]) -> Take:
    return lambda site, content: add(site, read_reply(content, record))


@dataclass(frozen=True)
class _Step:
    kind: str
    content: RecordDict
    take: Take


def _answering(secure: SecureSum, site: str) -> Iterable[_Step]:
    """The delivery, and then every piece of rows that is missing, made when it is its turn."""
    yield _Step(DELIVERY, secure.delivery(site).to_content(), _take(Delivered, secure.check_delivered))
    size = max(1, PIECE_BYTES // (4 * len(secure.terms.by_name[site].classes)))
    for question in secure.questions(site, size):

        def masked(name: str, content: RecordDict, question: RowsQuestion = question) -> None:
            secure.add_rows(name, MaskedRows.from_content(content, question))

        yield _Step(ROWS, question.to_content(), masked)


@dataclass
class _Turn:
    """Where a site is in a round."""

    steps: deque[_Step]
    since: float
    sent: str | None = None
    tries: int = 0
    """How often the site failed at its step."""
    due: float = 0.0
    """When it is asked next, at the earliest."""


@dataclass
class _Asking:
    grid: Grid
    nodes: Mapping[str, int]
    patience: float
    retries: int
    lost: dict[str, str] = field(default_factory=dict)

    def round(self, steps: Mapping[str, Iterable[_Step]]) -> None:
        """Ask every site that is not lost, step by step, until all are through or lost."""
        for site in steps:
            if site not in self.nodes:
                self.lost.setdefault(site, "it is not there")
        turns = {site: _Turn(deque(own), time.monotonic()) for site, own in steps.items() if site not in self.lost}
        backoff = Backoff()
        while turns := {site: turn for site, turn in turns.items() if turn.steps and site not in self.lost}:
            self._send(turns)
            if self._receive(turns):
                backoff.reset()
            else:
                backoff.pause()

    def _send(self, turns: Mapping[str, _Turn]) -> None:
        now = time.monotonic()
        due = [site for site, turn in turns.items() if turn.sent is None and turn.due <= now]
        messages = [
            compose(turns[site].steps[0].content, turns[site].steps[0].kind, self.nodes[site], TTL_SECONDS)
            for site in due
        ]
        for site, identifier in zip(due, push(self.grid, messages), strict=True):
            turns[site].sent = identifier  # None: the grid does not know the node now; it is tried again

    def _receive(self, turns: Mapping[str, _Turn]) -> bool:
        """Take what has come; returns whether anything has."""
        waiting = {turn.sent: site for site, turn in turns.items() if turn.sent is not None}
        came = False
        for identifier, message in pull(self.grid, list(waiting)):
            site = waiting[identifier]
            turn = turns[site]
            turn.sent = None
            if is_absence(message):
                continue
            came = True
            try:
                turn.steps[0].take(site, content_of(message))
            except ProtocolError as error:
                self._failed(site, turn, error)
                continue
            turn.steps.popleft()
            turn.since, turn.tries = time.monotonic(), 0
        for site, turn in turns.items():
            if time.monotonic() - turn.since > self.patience:
                self.lost.setdefault(site, f"it said nothing for {self.patience:g} seconds")
        return came

    def _failed(self, site: str, turn: _Turn, error: ProtocolError) -> None:
        """Give a site up, or let it be asked again in a while: what passes should not cost it its place."""
        turn.tries += 1
        if turn.tries > self.retries or (isinstance(error, RefusedReplyError) and error.final):
            self.lost[site] = error.message
        else:
            turn.due = time.monotonic() + RETRY_SECONDS * 2 ** (turn.tries - 1)
