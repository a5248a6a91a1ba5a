"""The Grid that a job talks through when sites are real: Flower's own, with losses of the link told plainly.

Lives here: claiming the server's part of a Flower run, one exception for "this run of Flower's is over, start
another", and taking in replies, whose every byte is a stranger's. Does not live here: the SuperLink's process and its
control API (server/superlink), what is asked, what a reply says. Private flwr modules are used here and in
server/superlink (pinned by tests/server/test_flwr_contract.py).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Self, TypeVar

import httpx
from flwr.app import Context, Error, Message, Metadata
from flwr.app.message import make_message
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode, SubStatus
from flwr.common.serde import context_from_proto, run_from_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.message_pb2 import Metadata as Announced
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import SYSTEM_MESSAGE_TYPE
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    inflate_object_from_contents,
    pull_objects,
)
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.retry import RetryInvoker, exponential
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from consilience.common.errors import ServerError
from consilience.server.superlink import Endpoint

PATIENCE_SECONDS = 10.0
"""How long one call is tried again while the SuperLink does not answer; a restarted one knows no earlier run."""
CLAIM_SECONDS = 30.0
MOST_OBJECTS = 128
"""Objects of one reply: Flower cuts an answer into pieces of 5 MB."""
MOST_BYTES = 256 * 2**20
"""Bytes of one reply."""
UPLOAD_SECONDS = 900.0
"""How long a reply that was announced may take to arrive. One whose sender goes away is given up by Flower sooner."""
AT_ONCE = 64
"""Replies taken in side by side: one whose bytes do not come must not hold up the others."""
LOOK_SECONDS = 0.02
UPLOAD_LOOK_SECONDS = 0.1
"""Seconds before the first second look for what a site has not sent yet: each look costs the SuperLink as much."""

LOST = (httpx.HTTPError, RunNotRunningException, ObjectPushError)
"""What Flower raises when the SuperLink is away, has ended the run, or was started again in the middle of a message."""

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class LinkLostError(ServerError):
    """The SuperLink stopped answering, or ended the run: what was on its way is lost, another Flower run must start."""


class SuperLinkGrid(HttpGrid):
    """Flower's grid over its runtime API. Every call raises `LinkLostError` instead of Flower's many ways."""

    def __init__(self, endpoint: Endpoint, token: str) -> None:
        super().__init__(endpoint.control, insecure=False, root_certificates=endpoint.ca, token=token)
        self._retry_invoker = _patience()
        self._threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="reply")
        self._arriving: dict[str, Future[Message]] = {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; returns their ids in order."""
        return self._linked(lambda: super(SuperLinkGrid, self).push_messages(messages))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that are there, whole; one that cannot be taken is an error message."""
        return self._linked(lambda: self._arrived(list(message_ids)))

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Return the nodes that are online."""
        return self._linked(lambda: super(SuperLinkGrid, self).get_nodes())

    def close(self) -> None:
        """End the connection; replies under way are given up."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        super().close()

    def _arrived(self, wanted: list[str]) -> list[Message]:
        """Begin to take in what is announced; return what has arrived since."""
        for forgotten in self._arriving.keys() - set(wanted):
            self._arriving.pop(forgotten).cancel()
        asked = [identifier for identifier in wanted if identifier not in self._arriving]
        if asked:
            found = self._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=asked))
            for held, tree in zip(found.messages_list, found.message_object_trees, strict=True):
                if held.metadata.reply_to_message_id in asked:  # a site may announce whatever it likes
                    reply = self._threads.submit(self._take, self._runtime_client, held.metadata, tree)
                    self._arriving[held.metadata.reply_to_message_id] = reply
        if self._arriving:
            wait(self._arriving.values(), LOOK_SECONDS, FIRST_COMPLETED)
        done = [
            identifier for identifier in wanted if identifier in self._arriving and self._arriving[identifier].done()
        ]
        return [self._arriving.pop(identifier).result() for identifier in done]

    def _take(self, client: RuntimeHttpClient, about: Announced, tree: ObjectTree) -> Message:
        """Return a reply, or an error message in its place."""
        try:
            reply = self._fetch(client, about, tree)
        except LOST:
            raise
        except ObjectPullError:  # as when its agent was killed: nobody is there
            code, reason = ErrorCode.REPLY_MESSAGE_UNAVAILABLE, "it was announced, and then its content did not come"
        except _RefusedError as error:
            code, reason = ErrorCode.UNKNOWN, str(error)
        except Exception:  # a stranger's bytes, parsed by code of others
            code, reason = ErrorCode.UNKNOWN, "it cannot be read"
        else:
            return reply
        if self._client is client:
            log.warning("no reply of site %s: %s", self.admitted().get(about.src_node_id, "that has gone"), reason)
        metadata = Metadata(
            run_id=about.run_id,
            message_id="",
            src_node_id=SUPERLINK_NODE_ID,
            dst_node_id=SUPERLINK_NODE_ID,
            reply_to_message_id=about.reply_to_message_id,
            group_id="",
            created_at=time.time(),
            ttl=0,
            message_type=SYSTEM_MESSAGE_TYPE,
        )
        return make_message(metadata=metadata, error=Error(code, reason))

    def _fetch(self, client: RuntimeHttpClient, about: Announced, tree: ObjectTree) -> Message:
        identifiers = [part.object_id for part in iterate_object_tree(tree)]
        if len(identifiers) > MOST_OBJECTS:
            raise _RefusedError(f"it has {len(identifiers):,} objects; allowed: {MOST_OBJECTS}")
        left, counting = MOST_BYTES, threading.Lock()
        pull = make_pull_object_fn_protobuf(client.PullObject, self.node, about.run_id)

        def pull_some(identifier: str) -> bytes:
            nonlocal left
            content = pull(identifier)
            with counting:
                left -= len(content)
                spent = left < 0
            if spent:
                raise _RefusedError(f"it is larger than {MOST_BYTES:,} bytes")
            return content

        contents = pull_objects(
            identifiers,
            pull_some,
            max_time=UPLOAD_SECONDS,
            max_tries_per_object=None,
            initial_backoff=UPLOAD_LOOK_SECONDS,
            backoff_cap=1,
        )
        client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(node=self.node, run_id=about.run_id, message_object_id=about.message_id)
        )
        reply = inflate_object_from_contents(about.message_id, contents)
        names = ("run_id", "src_node_id", "reply_to_message_id")
        if not isinstance(reply, Message) or any(getattr(reply.metadata, n) != getattr(about, n) for n in names):
            raise _RefusedError("it is not the one that was announced")
        reply.metadata.__dict__["_message_id"] = about.message_id
        return reply

    def admitted(self) -> dict[int, str]:
        """Return the name under which each online node's key was admitted."""
        return {node.node_id: node.name for node in self.get_nodes()}

    def _linked(self, call: Callable[[], Result]) -> Result:
        try:
            return call()
        except LOST as error:
            raise _lost(error) from error


class _RefusedError(Exception):
    """A reply is not taken."""


class Claim:
    """The server's part of one Flower run, claimed: a grid and a context, kept alive by heartbeats until closed."""

    def __init__(self, endpoint: Endpoint, run_id: int) -> None:
        """Claim run `run_id`. Raises `LinkLostError`."""
        self.run_id = run_id
        try:
            token = _acquire(endpoint, run_id)
            self.grid = SuperLinkGrid(endpoint, token)
            self._client = self.grid._runtime_client
            given = self._client.PullTaskInput(PullTaskInputRequest())
            TaskIdentity.task_id, TaskIdentity.run_id = given.task_id, given.run.run_id
            TaskIdentity.node_id = given.context.node_id
            self.context: Context = context_from_proto(given.context)
            self.grid.set_run(run_from_proto(given.run))
        except LOST as error:
            raise _lost(error) from error
        self._heartbeat = HeartbeatSender(self._beat)
        self._heartbeat.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._heartbeat.stop()
        ending = (SubStatus.COMPLETED, "") if kind is None else (SubStatus.FAILED, kind.__name__)
        try:
            self._client.PushTaskOutput(PushTaskOutputRequest(sub_status=ending[0], details=ending[1]))
        except LOST:
            pass  # the run folder is what counts; Flower's own list of runs may say what it likes
        finally:
            self.grid.close()

    def _beat(self) -> bool:
        """Tell the SuperLink that we live. While a student is trained nobody minds when it does not listen."""
        try:
            self._client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
        except LOST:
            return False
        return True


def _acquire(endpoint: Endpoint, run_id: int) -> str:
    """Return the token of run `run_id`'s task. Tasks of runs that nobody waits for any more are ended on the way."""
    method = "/flwr.proto.Runtime/AcquireTask"
    client = _runtime(
        endpoint,
        SuperExecAuthHttpInterceptor(master_secret=endpoint.secret, protected_methods=frozenset({method})),
    )
    until = time.monotonic() + CLAIM_SECONDS
    try:
        while time.monotonic() < until:
            answer = client.AcquireTask(AcquireTaskRequest(supported_task_types=["flwr-serverapp"]))
            if not (answer.HasField("task") and answer.token):
                time.sleep(0.05)
            elif answer.task.run_id == run_id:
                return str(answer.token)
            else:
                leftover = _runtime(endpoint, RuntimeTokenHttpInterceptor(answer.token))
                leftover.PushTaskOutput(PushTaskOutputRequest(sub_status=SubStatus.FAILED, details="given up"))
                leftover.close()
    finally:
        client.close()
    raise LinkLostError(
        f"The SuperLink did not hand over run {run_id} within {CLAIM_SECONDS:.0f} s", hint="Read superlink.log"
    )


def _runtime(
    endpoint: Endpoint, interceptor: RuntimeTokenHttpInterceptor | SuperExecAuthHttpInterceptor
) -> RuntimeHttpClient:
    return RuntimeHttpClient.from_server_address(
        server_address=endpoint.control,
        insecure=False,
        root_certificates=endpoint.ca,
        interceptors=[RuntimeVersionHttpInterceptor(component_name="SuperExec"), interceptor],
        retry_invoker=_patience(),
    )


def _patience() -> RetryInvoker:
    """Try again for a short while when nothing answers. Flower's own would wait for ever, or interrupt the process."""
    return RetryInvoker(
        wait_gen_factory=lambda: exponential(base_delay=0.2, max_delay=2),
        recoverable_exceptions=httpx.TransportError,
        max_tries=None,
        max_time=PATIENCE_SECONDS,
    )


def _lost(error: BaseException) -> LinkLostError:
    what = f"HTTP {error.response.status_code}" if isinstance(error, httpx.HTTPStatusError) else type(error).__name__
    return LinkLostError(f"The link to the SuperLink is lost ({what})", hint="Read superlink.log")
