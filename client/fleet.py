"""The site's connection to the server: Flower's Fleet API over gRPC, one method per call, one exception per outcome.

Lives here: every use of Flower's private modules by the client, pinned by tests/client/test_fleet.py. Does not live
here: when to call what (client/agent), why a server cannot be reached (client/reach), what an answer is (client/app).

Flower's own connection function ends the process on its own terms and hides why, so the calls are made here on its
stub, channel and authentication. gRPC between site and server ends with flwr 1.39: from 1.40 on the sites' transport
is HTTP, and `open_fleet` takes `client/fleet_http` instead, by what can be imported.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import grpc  # type: ignore[import-untyped]
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import HEARTBEAT_MIN_INTERVAL, HEARTBEAT_PATIENCE, SUPERLINK_NODE_ID
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest, PullMessagesRequest, PushMessagesRequest
from flwr.proto.fleet_pb2_grpc import FleetStub
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.grpc import create_channel
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_id,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    inflate_object_from_contents,
    pull_objects,
    push_objects,
)
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata

from consilience.client.connection import (
    BusyError,
    DroppedError,
    Envelope,
    Fleet,
    LostError,
    MalformedError,
    OversizedError,
)
from consilience.common.errors import AdmissionError, ClockError, VersionError
from consilience.common.files import sha256
from consilience.common.identity import Kit, PrivateKey

HEARTBEAT = float(HEARTBEAT_MIN_INTERVAL)
"""Seconds between two signs of life, the shortest that the SuperLink takes: a killed agent is soon forgotten."""
FORGOTTEN = HEARTBEAT * HEARTBEAT_PATIENCE
"""Seconds after its last sign of life until the SuperLink takes an agent to be gone."""
SERVER_NODE = SUPERLINK_NODE_ID
MOST_OBJECTS = 64
"""Objects of one question: ours has three."""
MOST_BYTES = 64 * 2**20
"""Bytes of one question."""
AT_ONCE = 8
"""Objects on their way at once: each costs a round trip."""
SHORT, LONG = 5.0, 120.0
"""Seconds after which a small call, and one that carries an object, counts as lost."""
CONTENT_SECONDS = 15.0
"""How long the content of a message that was announced may take to be there. A server that was killed while it sent
one never sends the rest, and the messages of the next one wait behind it."""
_OURS_TO_DROP = {
    ApiErrorCode.FLEET_RUN_STATUS_NOT_ALLOWED,
    ApiErrorCode.FLEET_GET_RUN_FAILED,
    ApiErrorCode.FLEET_GET_FAB_FAILED,
}
_UNREACHED = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED}


SPEAKS_GRPC = importlib.util.find_spec("flwr.client.grpc_rere_client") is not None
"""Whether the installed flwr has gRPC between site and server; if not, sites dial the SuperLink's HTTP port."""


def open_fleet(kit: Kit, key: PrivateKey, node: int | None = None) -> Fleet:
    """Return a connection by the transport that the installed flwr has. Nothing is sent yet.

    `node` is the node's id, where an earlier connection of this agent is taken up.
    """
    if not SPEAKS_GRPC:
        from consilience.client.fleet_http import HttpFleet

        return HttpFleet(kit, key)
    return GrpcFleet(kit, key, node)


class GrpcFleet:
    """The Fleet API of flwr 1.39 over gRPC and TLS, authenticated by the site's key."""

    def __init__(self, kit: Kit, key: PrivateKey, node: int | None = None) -> None:
        from flwr.client.grpc_rere_client.node_auth_client_interceptor import NodeAuthClientInterceptor

        self._public = public_key_to_bytes(key.public_key())
        self._channel = create_channel(
            kit.address,
            insecure=False,
            root_certificates=kit.ca.encode(),
            max_message_length=MOST_BYTES + 2**20,
            interceptors=[_VersionInterceptor(), NodeAuthClientInterceptor(key, key.public_key())],
        )
        self._stub = FleetStub(self._channel)
        self._node = Node(node_id=node or 0)

    def admitted(self) -> bool:
        """Say whether the server knows the key; changes nothing there.

        An interval that no SuperLink takes is complained of only after the key was found.
        """
        try:
            self._stub.ActivateNode(ActivateNodeRequest(public_key=self._public, heartbeat_interval=0.0), timeout=SHORT)
        except grpc.RpcError as error:
            code = _flower_code(error)
            if code == ApiErrorCode.FLEET_INVALID_HEARTBEAT_INTERVAL:
                return True
            if code == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
                return False
            raise outcome(error) from error
        return True

    def activate(self) -> int:
        """Go online; return the node's id. Raises `BusyError`."""
        request = ActivateNodeRequest(public_key=self._public, heartbeat_interval=HEARTBEAT)
        try:
            response = self._stub.ActivateNode(request, timeout=SHORT)
        except grpc.RpcError as error:
            if _flower_code(error) != ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
                raise outcome(error) from error
            if self.admitted():
                raise BusyError from error
            raise AdmissionError(
                "The server does not know this site's key", hint="Send the request to the coordinator, or ask them"
            ) from error
        self._node = Node(node_id=response.node_id)
        return int(response.node_id)

    def heartbeat(self) -> None:
        """Tell the server that the agent lives. A node that it took to be offline is online again by this."""
        request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT)
        if not _call(self._stub.SendNodeHeartbeat, request, SHORT).success:
            raise AdmissionError("The server no longer admits this site", hint="Ask the coordinator")

    def pull(self) -> Envelope | None:
        """Return the next message for this node, if any."""
        response = _call(self._stub.PullMessages, PullMessagesRequest(node=self._node), LONG)
        if not response.messages_list:
            return None
        try:
            return Envelope(message_from_proto(response.messages_list[0]), response.message_object_trees[0])
        except Exception as error:  # a stranger's bytes, parsed by code of others
            raise MalformedError("a message's metadata cannot be read") from error

    def bundle(self, run: int) -> bytes:
        """Return the run's app bundle. Raises `OversizedError`."""
        about = _call(self._stub.GetRun, GetRunRequest(node=self._node, run_id=run), SHORT).run
        request = GetFabRequest(node=self._node, hash_str=about.fab_hash, run_id=run)
        content: bytes = _call(self._stub.GetFab, request, LONG).fab.content
        if sha256(content) != about.fab_hash:
            raise MalformedError("the run's bundle is not the one that its digest names")
        return content

    def fetch(self, envelope: Envelope) -> Message:
        """Return the announced message with its content. Raises `OversizedError`, `MalformedError`."""
        stub, run = self._stub, envelope.run
        identifiers = [part.object_id for part in iterate_object_tree(envelope.tree)]
        if len(identifiers) > MOST_OBJECTS:
            raise OversizedError(f"a message has {len(identifiers)} objects; allowed: {MOST_OBJECTS}")
        pull = make_pull_object_fn_protobuf(partial(_call, stub.PullObject, seconds=LONG), self._node, run)
        try:
            contents = pull_objects(
                identifiers,
                budgeted(pull),
                max_concurrent_pulls=AT_ONCE,
                max_time=CONTENT_SECONDS,
                initial_backoff=0.05,
                backoff_cap=1,
            )
        except ObjectPullError as error:
            raise DroppedError("a message's content is no longer there") from error
        confirm = make_confirm_message_received_fn_protobuf(
            partial(_call, stub.ConfirmMessageReceived, seconds=SHORT), self._node, run
        )
        with suppress(DroppedError):  # it only lets the server forget the content sooner
            confirm(envelope.message.metadata.message_id)
        return inflate(envelope, contents)

    def send(self, reply: Message, seconds: float) -> None:
        """Send a reply; `seconds` is what the answer took."""
        reply.metadata.__dict__["_message_id"] = reply.object_id
        with no_object_id_recompute():
            tree, objects = get_object_tree(reply), get_all_nested_objects(reply)
            bare = remove_content_from_message(reply) if reply.has_content() else reply
            request = PushMessagesRequest(
                node=self._node,
                messages_list=[message_to_proto(bare)],
                message_object_trees=[tree],
                clientapp_runtime_list=[seconds],
            )
            response = _call(self._stub.PushMessages, request, LONG)
            push = make_push_object_fn_protobuf(
                partial(_call, self._stub.PushObject, seconds=LONG),
                self._node,
                reply.metadata.run_id,
                response.session_id,
            )
            try:
                push_objects(
                    objects,
                    push,
                    object_ids_to_push=set(response.objects_to_push),
                    keep_objects=True,
                    max_concurrent_pushes=AT_ONCE,
                )
            except ObjectPushError as error:
                raise DroppedError("the server did not take a reply's content") from error

    def deactivate(self) -> None:
        """Go offline."""
        _call(self._stub.DeactivateNode, DeactivateNodeRequest(node_id=self._node.node_id), 2.0)

    def close(self) -> None:
        """End the connection; calls under way raise `LostError`."""
        self._channel.close()


def budgeted(pull: Callable[[str], bytes]) -> Callable[[str], bytes]:
    """Return `pull` for one message: each object is checked against its digest, and all together against a limit."""
    left, counting = MOST_BYTES, threading.Lock()

    def checked(identifier: str) -> bytes:
        nonlocal left
        content = pull(identifier)
        with counting:
            left -= len(content)
            spent = left < 0
        if spent:
            raise OversizedError(f"a message is larger than {MOST_BYTES:,} bytes")
        if get_object_id(content) != identifier:
            raise MalformedError("an object's bytes are not those that its digest names")
        return content

    return checked


class _VersionInterceptor(grpc.UnaryUnaryClientInterceptor):  # type: ignore[misc]
    """Tells the server our flwr version. Flower's own also ends the process when the server refuses it."""

    def __init__(self) -> None:
        self._metadata = RuntimeVersionMetadata.from_local_component("SuperNode")

    def intercept_unary_unary(
        self, continuation: Callable[[Any, Any], Any], client_call_details: Any, request: Any
    ) -> Any:
        """Add the version to a call."""
        metadata = self._metadata.append_to_grpc_metadata(client_call_details.metadata)
        return continuation(client_call_details._replace(metadata=metadata), request)


def inflate(envelope: Envelope, contents: dict[str, bytes]) -> Message:
    """Put a message together from its objects. Raises `MalformedError` when it is not the one that was announced."""
    try:
        message = inflate_object_from_contents(envelope.tree.object_id, contents)
    except Exception as error:  # a stranger's bytes, parsed by code of others
        raise MalformedError("a message's objects cannot be read") from error
    announced = envelope.message.metadata
    if not isinstance(message, Message) or not message.has_content():
        raise MalformedError("a message carries no content")
    held = message.metadata
    if any(getattr(held, name) != getattr(announced, name) for name in ("run_id", "message_type", "dst_node_id")):
        raise MalformedError("a message is not the one that was announced")
    message.metadata.__dict__.update(_message_id=announced.message_id, _src_node_id=announced.src_node_id)
    return message


def outcome(error: grpc.RpcError) -> Exception:
    """Return what a failed call means."""
    code, details = error.code(), str(error.details() or "")
    flower = _flower_code(error)
    if flower == ApiErrorCode.RUNTIME_VERSION_INCOMPATIBLE or code == grpc.StatusCode.UNIMPLEMENTED:
        ours = RuntimeVersionMetadata.from_local_component("SuperNode").package_version
        return VersionError(
            f"The server does not take this site's flwr {ours}",
            hint="Ask the coordinator for their version and install the same minor one",
        )
    if code == grpc.StatusCode.UNAUTHENTICATED:
        if details == "Invalid timestamp":
            return ClockError(
                "The server does not accept this machine's time",
                hint="Compare `date -u` with the coordinator's; switch on a time service such as chrony",
            )
        return AdmissionError("The server does not admit this site's key", hint="Ask the coordinator")
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        return OversizedError(f"a message is larger than {MOST_BYTES:,} bytes")
    if flower in _OURS_TO_DROP:
        return DroppedError("the run is over")
    if code in _UNREACHED:
        return LostError(str(code.name).lower().replace("_", " "))
    return DroppedError(f"the server failed at it ({code.name.lower()})")


def _flower_code(error: grpc.RpcError) -> int | None:
    flower = FlowerError.from_json(error.details())
    return None if flower is None else flower.code


def _call(method: Callable[..., Any], request: Any, seconds: float) -> Any:
    try:
        return method(request, timeout=seconds)
    except grpc.RpcError as error:
        raise outcome(error) from error
    except ValueError as error:  # what gRPC raises on a closed channel
        raise LostError("closed") from error
