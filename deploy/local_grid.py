"""A Flower Grid in one process: ClientApps in threads, every message through Flower's wire encoding.

Lives here: the only use of Flower's private modules for the simulation (pinned by tests/deploy/test_local_grid.py).
Does not live here: what is asked and answered. No Ray, no network.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, no_object_id_recompute
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity

SERVER_NODE = 1
FIRST_NODE = 100


def through_wire(message: Message) -> Message:
    """Return `message` as the other side would get it: deflated to bytes object by object, and inflated again."""
    with no_object_id_recompute():
        identifier = message.object_id
        contents = {key: part.deflate() for key, part in get_all_nested_objects(message).items()}
    received = inflate_object_from_contents(identifier, contents)
    assert isinstance(received, Message)
    received.metadata.__dict__["_message_id"] = identifier
    return received


class LocalGrid(Grid):
    """Carries messages to one ClientApp under several node configurations, one message at a time per node.

    `node_configs` are the nodes' configurations, in order; `workers` nodes answer at the same time.
    """

    def __init__(
        self, client_app: ClientApp, node_configs: Sequence[Mapping[str, str | int | float | bool]], *, workers: int
    ) -> None:
        # Since 1.38 a Message reads its run and node from this process-wide identity.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, SERVER_NODE
        self._app = client_app
        self._contexts = {
            FIRST_NODE + i: Context(
                run_id=1, node_id=FIRST_NODE + i, node_config=dict(config), state=RecordDict(), run_config={}
            )
            for i, config in enumerate(node_configs)
        }
        self._waiting: dict[int, deque[tuple[Message, Future[Message]]]] = {node: deque() for node in self._contexts}
        self._busy: set[int] = set()
        self._state = threading.Lock()
        self._workers = ThreadPoolExecutor(workers, thread_name_prefix="site")
        self._replies: dict[str, Future[Message]] = {}
        self._run: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._workers.shutdown(wait=True, cancel_futures=True)

    def set_run(self, run: Any) -> None:
        """Keep the run; nothing here needs it."""
        self._run = run

    @property
    def run(self) -> Any:
        """The run that was set."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message (Flower's older way)."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return every node's id."""
        return list(self._contexts)

    def get_nodes(self) -> Any:
        """Not offered: nodes here have no names or keys; the site card names a site."""
        raise NotImplementedError("the in-process grid knows nodes by id only")

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hand messages to their nodes; returns their ids in order."""
        identifiers = []
        for message in messages:
            message.metadata.__dict__["_src_node_id"] = SERVER_NODE
            identifier = message.object_id
            message.metadata.__dict__["_message_id"] = identifier
            self._replies[identifier] = self._queue(message)
            identifiers.append(identifier)
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that are there, once each."""
        ready = [i for i in message_ids if i in self._replies and self._replies[i].done()]
        return [self._replies.pop(identifier).result() for identifier in ready]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send and wait for every reply that comes within `timeout` seconds."""
        replies = []
        for identifier in self.push_messages(messages):
            try:
                replies.append(self._replies[identifier].result(timeout))
            except TimeoutError:
                continue
            del self._replies[identifier]
        return replies

    def _queue(self, message: Message) -> Future[Message]:
        """Put a message into its node's queue: only idle nodes take a worker, so that no worker waits for a node."""
        node, future = message.metadata.dst_node_id, Future[Message]()
        with self._state:
            self._waiting[node].append((message, future))
            if node not in self._busy:
                self._busy.add(node)
                self._workers.submit(self._deliver_next, node)
        return future

    def _deliver_next(self, node: int) -> None:
        """Deliver a node's oldest message; then let the other nodes have a turn before its next one."""
        with self._state:
            message, future = self._waiting[node].popleft()
        try:
            future.set_result(self._deliver(message, node))
        except BaseException as error:  # whoever waits for the reply must learn of it
            future.set_exception(error)
        with self._state:
            if self._waiting[node]:
                with contextlib.suppress(RuntimeError):  # the grid is being closed: nobody waits any more
                    self._workers.submit(self._deliver_next, node)
            else:
                self._busy.discard(node)

    def _deliver(self, message: Message, node: int) -> Message:
        try:
            reply = self._app(through_wire(message), self._contexts[node])
        except Exception as error:  # as Flower does: a failing app is an error reply, not a dead server
            reply = Message(
                Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=type(error).__name__), reply_to=message
            )
        return through_wire(reply)
