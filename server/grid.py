"""The Grid that a job talks through when sites are real: Flower's own, with losses of the link told plainly.

Lives here: claiming the server's part of a Flower run, and one exception for "this run of Flower's is over, start
another". Does not live here: the SuperLink's process and its control API (server/superlink), what is asked. Private
flwr modules are used here and in server/superlink (pinned by tests/server/test_flower_contract.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from types import TracebackType
from typing import Self, TypeVar

import httpx
from flwr.app import Context, Error, Message, Metadata
from flwr.app.message import make_message
from flwr.common.constant import ErrorCode, SubStatus
from flwr.common.serde import context_from_proto, run_from_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.message_pb2 import Metadata as AnnouncedMetadata
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
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, inflate_object_from_contents, pull_objects
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
UPLOAD_SECONDS = 60.0
"""How long the rest of a reply may take that a site has begun to send."""
MOST_OBJECTS = 64
"""Objects of one reply: ours has three."""
MOST_BYTES = 64 * 2**20
"""Bytes of one reply; questions are cut so that an answer stays well below."""
AT_ONCE = 8
"""Objects on their way at once: each costs a round trip."""

Result = TypeVar("Result")


class LinkLostError(ServerError):
    """The SuperLink stopped answering, or ended the run: what was on its way is lost, another Flower run must start."""


class SuperLinkGrid(HttpGrid):
    """Flower's grid over its runtime API. Every call raises `LinkLostError` instead of Flower's many ways."""

    def __init__(self, endpoint: Endpoint, token: str) -> None:
        super().__init__(endpoint.control, insecure=False, root_certificates=endpoint.ca, token=token)
        self._retry_invoker = _patience()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; returns their ids in order."""
        return self._linked(lambda: super(SuperLinkGrid, self).push_messages(messages))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that are there; one that is too large or cannot be read comes as an error message."""
        request = PullAppMessagesRequest(message_ids=message_ids)
        response = self._linked(lambda: self._runtime_client.PullMessages(request))
        return [
            self._linked(partial(self._fetch, announced.metadata, tree))
            for announced, tree in zip(response.messages_list, response.message_object_trees, strict=True)
        ]

    def _fetch(self, announced: AnnouncedMetadata, tree: ObjectTree) -> Message:
        """Return one reply with its content.

        Flower's own way pauses a second when a site has not sent all of a reply yet, and takes whatever size comes.
        """
        identifiers = [part.object_id for part in iterate_object_tree(tree)]
        pull = make_pull_object_fn_protobuf(self._runtime_client.PullObject, self.node, self.run.run_id)
        try:
            if len(identifiers) > MOST_OBJECTS:
                raise ObjectPullError(tree.object_id, "too many objects")
            contents = pull_objects(
                identifiers,
                _budgeted(pull),
                max_concurrent_pulls=AT_ONCE,
                max_time=UPLOAD_SECONDS,
                max_tries_per_object=None,
                initial_backoff=0.02,
                backoff_cap=0.5,
            )
            message = inflate_object_from_contents(tree.object_id, contents)
            if not isinstance(message, Message):
                raise TypeError("no message")
        except (httpx.HTTPError, RunNotRunningException):
            raise
        except Exception:  # a stranger's bytes, parsed by code of others
            return self._unreadable(announced)
        finally:
            self._runtime_client.ConfirmMessageReceived(
                ConfirmMessageReceivedRequest(
                    node=self.node, run_id=self.run.run_id, message_object_id=announced.message_id
                )
            )
        message.metadata.__dict__["_message_id"] = announced.message_id
        message.metadata.__dict__["_reply_to_message_id"] = announced.reply_to_message_id
        return message

    def _unreadable(self, announced: AnnouncedMetadata) -> Message:
        metadata = Metadata(
            run_id=self.run.run_id,
            message_id="",
            src_node_id=announced.src_node_id,
            dst_node_id=self.node.node_id,
            message_type=SYSTEM_MESSAGE_TYPE,
            group_id="",
            ttl=0,
            reply_to_message_id=announced.reply_to_message_id,
            created_at=0.0,
        )
        reason = "The reply is not whole, larger than any answer, or no message"
        return make_message(metadata=metadata, error=Error(code=ErrorCode.UNKNOWN, reason=reason))

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Return the nodes that are online."""
        return self._linked(lambda: super(SuperLinkGrid, self).get_nodes())

    def admitted(self) -> dict[int, str]:
        """Return the name under which each online node's key was admitted."""
        return {node.node_id: node.name for node in self.get_nodes()}

    def _linked(self, call: Callable[[], Result]) -> Result:
        try:
            return call()
        except (httpx.HTTPError, RunNotRunningException) as error:
            raise _lost(error) from error


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
        except (httpx.HTTPError, RunNotRunningException) as error:
            raise _lost(error) from error
        self._completed = False
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
        except (httpx.HTTPError, RunNotRunningException):
            pass  # the run folder is what counts; Flower's own list of runs may say what it likes
        finally:
            self.grid.close()

    def _beat(self) -> bool:
        """Tell the SuperLink that we live. While a student is trained nobody minds when it does not listen."""
        try:
            self._client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
        except (httpx.HTTPError, RunNotRunningException):
            return False
        return True


def _budgeted(pull: Callable[[str], bytes]) -> Callable[[str], bytes]:
    """Return `pull` for one reply, which may not be larger than any answer."""
    left = MOST_BYTES

    def checked(identifier: str) -> bytes:
        nonlocal left
        content = pull(identifier)
        left -= len(content)
        if left < 0:
            raise ObjectPullError(identifier, "too large")
        return content

    return checked


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
