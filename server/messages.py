"""Messages over a Flower Grid that outlive sites which go away: who is there, sending, collecting, how long to pause.

Lives here: what one exchange needs whatever it is about. Does not live here: cards and contracts (server/enrolment),
questions (server/asking).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, runtime_checkable

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from consilience.common.errors import ProtocolError

UNAVAILABLE = frozenset({3, 4, 5})
"""Flower's codes MESSAGE_UNAVAILABLE, REPLY_MESSAGE_UNAVAILABLE and NODE_UNAVAILABLE: nobody was there to answer."""

SHORTEST_PAUSE, LONGEST_PAUSE = 0.002, 0.1
"""Seconds between two looks for replies. The in-process grid costs nothing to ask; a real one an HTTP call."""


class Backoff:
    """Pauses that grow while nothing comes and start again when something did."""

    def __init__(self, longest: float = LONGEST_PAUSE) -> None:
        self._next, self._longest = SHORTEST_PAUSE, longest

    def reset(self) -> None:
        """Something came: the next pause is short."""
        self._next = SHORTEST_PAUSE

    def pause(self) -> None:
        """Sleep, longer than the last time."""
        time.sleep(self._next)
        self._next = min(1.5 * self._next, self._longest)


@runtime_checkable
class Admitting(Protocol):
    """A grid whose nodes were admitted under a name."""

    def admitted(self) -> dict[int, str]:
        """Return the name under which each online node's key was admitted."""
        ...


def online_nodes(grid: Grid) -> dict[int, str | None]:
    """Return the nodes that are online and the name each was admitted under.

    None where nobody is admitted (a simulation in one process); where sites are, one look tells both, so that no node
    is there without its name.
    """
    return dict(grid.admitted()) if isinstance(grid, Admitting) else dict.fromkeys(grid.get_node_ids())


def compose(content: RecordDict, kind: str, node: int, ttl: float) -> Message:
    """Return a message for `node` that Flower drops, with its reply, after `ttl` seconds."""
    return Message(content, dst_node_id=node, message_type=kind, ttl=ttl)


def push(grid: Grid, messages: Sequence[Message]) -> list[str | None]:
    """Send messages; returns one id a message, None where the grid did not take it (its node is not known to it)."""
    given: list[str | None] = list(grid.push_messages(messages)) if messages else []
    return given + [None] * (len(messages) - len(given))


def pull(grid: Grid, identifiers: Iterable[str]) -> Iterator[tuple[str, Message]]:
    """Yield (id of the message it answers, reply) for every reply that is there."""
    wanted = list(identifiers)
    if wanted:
        for message in grid.pull_messages(wanted):
            yield message.metadata.reply_to_message_id, message


def is_absence(message: Message) -> bool:
    """Whether Flower says that the site was not there, rather than that it failed."""
    return message.has_error() and message.error.code in UNAVAILABLE


def content_of(message: Message) -> RecordDict:
    """Return a reply's content. Raises `ProtocolError` when it is an error of Flower's instead."""
    if message.has_error():
        raise ProtocolError(f"The message failed with Flower's code {message.error.code}")
    return message.content
