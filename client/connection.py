"""What a connection of a site to its server offers, and how its calls may fail.

Does not live here: the connections themselves (client/fleet by gRPC, client/fleet_http by HTTP).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from flwr.app import Message

if TYPE_CHECKING:
    from flwr.proto.message_pb2 import ObjectTree


class LostError(Exception):
    """The server does not answer, or no longer."""


class DroppedError(Exception):
    """The server answers but will not do this: the run is over, or it failed. The connection is as good as before."""


class OversizedError(DroppedError):
    """What the server sends is larger than any question."""


class MalformedError(DroppedError):
    """What the server sends is no message."""


class BusyError(Exception):
    """The server knows the key, but takes another agent of it to be connected."""


@dataclass(frozen=True)
class Envelope:
    """A message that was announced: its metadata, and the objects that hold its content."""

    message: Message
    tree: ObjectTree

    @property
    def run(self) -> int:
        """The run it belongs to."""
        return self.message.metadata.run_id

    @property
    def kind(self) -> str:
        """The message's type."""
        return self.message.metadata.message_type


class Fleet(Protocol):
    """A connection of one site. Every call may raise `LostError`, `DroppedError` and what ends an agent:
    `AdmissionError`, `ClockError`, `VersionError`."""

    def admitted(self) -> bool:
        """Say whether the server knows the key; changes nothing there."""
        ...

    def activate(self) -> int:
        """Go online; return the node's id. Raises `BusyError`."""
        ...

    def heartbeat(self) -> None:
        """Tell the server that the agent lives."""
        ...

    def pull(self) -> Envelope | None:
        """Return the next message for this node, if any."""
        ...

    def bundle(self, run: int) -> bytes:
        """Return the run's app bundle. Raises `OversizedError`."""
        ...

    def fetch(self, envelope: Envelope) -> Message:
        """Return the announced message with its content. Raises `OversizedError`, `MalformedError`."""
        ...

    def send(self, reply: Message, seconds: float) -> None:
        """Send a reply; `seconds` is what the answer took."""
        ...

    def deactivate(self) -> None:
        """Go offline."""
        ...

    def close(self) -> None:
        """End the connection; calls under way raise `LostError`."""
        ...
