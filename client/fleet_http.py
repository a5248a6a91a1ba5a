"""The connection by HTTP, for flwr 1.40 and later, which have no gRPC for sites.

Does not live here: the connection in use (client/fleet). This one is the way out when the pin on flwr 1.39 has to
go: it stands on Flower's own connection function, so it cannot tell why a connection was refused, and its signs of
life are Flower's. With CONSILIENCE_TEST_NEWEST_FLWR=1 tests/client/test_fleet.py looks for it in the installed flwr.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar

from flwr.app import Message
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import pull_objects, push_objects

from consilience.client.connection import DroppedError, Envelope, LostError, OversizedError
from consilience.client.fleet import MOST_OBJECTS, budgeted, inflate
from consilience.common.identity import Kit, PrivateKey

Result = TypeVar("Result")
CONNECTION = "flwr.supernode.fleet_http_connection", "http_request_response"


class HttpFleet:
    """Flower's `http_request_response` behind the methods of `consilience.client.fleet.Fleet`."""

    def __init__(self, kit: Kit, key: PrivateKey) -> None:
        self._kit, self._key, self._held = kit, key, ExitStack()
        self._calls: tuple[Callable[..., Any], ...] = ()

    def admitted(self) -> bool:
        """Go online and say that it was possible."""
        self.activate()
        return True

    def activate(self) -> int:
        """Go online; return the node's id."""
        module, name = CONNECTION
        connect = getattr(importlib.import_module(module), name)
        keys = (self._key, self._key.public_key())
        node, *calls = _try(
            lambda: self._held.enter_context(connect(self._kit.address, False, self._kit.ca.encode(), keys, 1, None))
        )
        self._calls = tuple(calls)
        return int(node)

    def heartbeat(self) -> None:
        """Nothing: Flower's connection sends its own."""

    def pull(self) -> Envelope | None:
        """Return the next message for this node, if any."""
        received = _try(self._calls[0])
        return None if received is None else Envelope(*received)

    def bundle(self, run: int) -> bytes:
        """Return the run's app bundle."""
        about = _try(lambda: self._calls[2](run))
        content: bytes = _try(lambda: self._calls[3](about.fab_hash, run)).content
        return content

    def fetch(self, envelope: Envelope) -> Message:
        """Return the announced message with its content. Raises `OversizedError`, `MalformedError`."""
        identifiers = [part.object_id for part in iterate_object_tree(envelope.tree)]
        if len(identifiers) > MOST_OBJECTS:
            raise OversizedError(f"a message has {len(identifiers)} objects; allowed: {MOST_OBJECTS}")
        pull = budgeted(lambda identifier: self._calls[4](envelope.run, identifier))
        contents = _try(lambda: pull_objects(identifiers, pull))
        _try(lambda: self._calls[6](envelope.run, envelope.message.metadata.message_id))
        return inflate(envelope, contents)

    def send(self, reply: Message, seconds: float) -> None:
        """Send a reply; `seconds` is what the answer took."""
        reply.metadata.__dict__["_message_id"] = reply.object_id
        run = reply.metadata.run_id
        with no_object_id_recompute():
            tree, objects = get_object_tree(reply), get_all_nested_objects(reply)
            wanted, push_id = _try(lambda: self._calls[1](reply, tree, seconds))
            _try(
                lambda: push_objects(
                    objects,
                    lambda identifier, content: self._calls[5](run, push_id, identifier, content),
                    object_ids_to_push=wanted,
                    keep_objects=True,
                )
            )

    def deactivate(self) -> None:
        """Go offline."""
        _try(self._held.close)

    def close(self) -> None:
        """End the connection."""
        _try(self._held.close)


def _try(call: Callable[[], Result]) -> Result:
    """Call Flower, which ends the process (`SystemExit`) where it sees no way on: here the connection is lost."""
    try:
        return call()
    except DroppedError:
        raise
    except (Exception, SystemExit) as error:
        raise LostError(type(error).__name__) from error
