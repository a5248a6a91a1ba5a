"""A server that speaks the Fleet API over gRPC and TLS and says whatever a test wants: also what no SuperLink would."""

from __future__ import annotations

import hashlib
import queue
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc  # type: ignore[import-untyped]
from flwr.app import Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fab_pb2 import Fab, GetFabResponse
from flwr.proto.fleet_pb2 import (
    ActivateNodeResponse,
    DeactivateNodeResponse,
    PullMessagesResponse,
    PushMessagesResponse,
)
from flwr.proto.fleet_pb2_grpc import FleetServicer, add_FleetServicer_to_server
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatResponse
from flwr.proto.message_pb2 import ConfirmMessageReceivedResponse, ObjectTree, PullObjectResponse, PushObjectResponse
from flwr.proto.run_pb2 import GetRunResponse, Run
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity

from consilience.common.identity import Kit, PrivateKey, key_fingerprint
from helpers.superlink import PATIENCE, Authority

NODE = 2**63 + 7
Announced = tuple[Any, ObjectTree]


class FakeFleet(FleetServicer):
    """Give it messages with `announce`, bundles in `bundles`; replies arrive in `replies`."""

    def __init__(self, folder: Path) -> None:
        self.authority = Authority()
        certificate, key = self.authority.issue(folder)
        self.bundles: dict[int, bytes] = {}
        self.hashes: dict[int, str] = {}
        self.objects: dict[str, bytes] = {}
        self.replies: queue.Queue[Message] = queue.Queue()
        self.refuse: dict[str, tuple[grpc.StatusCode, str]] = {}
        self._announced: queue.Queue[PullMessagesResponse] = queue.Queue()
        self._pushed: tuple[Any, ObjectTree] | None = None
        self._parts: dict[str, bytes] = {}
        self._server = grpc.server(ThreadPoolExecutor(16))
        add_FleetServicer_to_server(self, self._server)
        credentials = grpc.ssl_server_credentials([(key.read_bytes(), certificate.read_bytes())])
        self.port = self._server.add_secure_port("127.0.0.1:0", credentials)
        self._server.start()

    def kit(self, key: PrivateKey) -> Kit:
        """Return a kit that leads here."""
        return Kit(
            site="site-a",
            site_fingerprint=key_fingerprint(key.public_key()),
            address=f"127.0.0.1:{self.port}",
            ca=self.authority.pem,
        )

    def close(self) -> None:
        """Stop serving."""
        self._server.stop(None)

    def message(self, kind: str, content: RecordDict, *, run: int = 1, source: int = 1, node: int = NODE) -> Message:
        """Return a message as a job's server would have made it."""
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run, source
        message = Message(content, node, kind)
        message.metadata.__dict__["_message_id"] = message.object_id
        return message

    def announce(self, message: Message) -> Announced:
        """Hold a message's objects ready; return its metadata and tree, for `put`."""
        with no_object_id_recompute():
            tree = get_object_tree(message)
            self.objects.update({key: part.deflate() for key, part in get_all_nested_objects(message).items()})
        return message_to_proto(remove_content_from_message(message)), tree

    def put(self, announced: Announced) -> None:
        """Let the agent pull it."""
        proto, tree = announced
        self._announced.put(PullMessagesResponse(messages_list=[proto], message_object_trees=[tree]))

    def put_response(self, response: PullMessagesResponse) -> None:
        """Let the agent's next pull give just this."""
        self._announced.put(response)

    def reply(self) -> Message:
        """Wait for the next reply."""
        return self.replies.get(timeout=PATIENCE)

    def _answer(self, context: Any, method: str, response: Any) -> Any:
        if method in self.refuse:
            context.abort(*self.refuse[method])
        return response

    def RegisterNode(self, request: Any, context: Any) -> Any:
        raise NotImplementedError

    def UnregisterNode(self, request: Any, context: Any) -> Any:
        raise NotImplementedError

    def ActivateNode(self, request: Any, context: Any) -> Any:
        return self._answer(context, "ActivateNode", ActivateNodeResponse(node_id=NODE))

    def DeactivateNode(self, request: Any, context: Any) -> Any:
        return DeactivateNodeResponse()

    def SendNodeHeartbeat(self, request: Any, context: Any) -> Any:
        return self._answer(context, "SendNodeHeartbeat", SendNodeHeartbeatResponse(success=True))

    def PullMessages(self, request: Any, context: Any) -> Any:
        try:
            return self._answer(context, "PullMessages", self._announced.get_nowait())
        except queue.Empty:
            return self._answer(context, "PullMessages", PullMessagesResponse())

    def GetRun(self, request: Any, context: Any) -> Any:
        content = self.bundles.get(request.run_id, b"")
        digest = self.hashes.get(request.run_id, hashlib.sha256(content).hexdigest())
        return self._answer(context, "GetRun", GetRunResponse(run=Run(run_id=request.run_id, fab_hash=digest)))

    def GetFab(self, request: Any, context: Any) -> Any:
        return GetFabResponse(fab=Fab(hash_str=request.hash_str, content=self.bundles.get(request.run_id, b"")))

    def PullObject(self, request: Any, context: Any) -> Any:
        content = self.objects.get(request.object_id)
        return PullObjectResponse(
            object_found=content is not None, object_available=bool(content), object_content=content or b""
        )

    def ConfirmMessageReceived(self, request: Any, context: Any) -> Any:
        return ConfirmMessageReceivedResponse()

    def PushMessages(self, request: Any, context: Any) -> Any:
        proto, tree = request.messages_list[0], request.message_object_trees[0]
        wanted = self._identifiers(tree)
        self._pushed, self._parts = (proto, tree), {}
        return self._answer(
            context, "PushMessages", PushMessagesResponse(objects_to_push=sorted(wanted), session_id="1")
        )

    def PushObject(self, request: Any, context: Any) -> Any:
        self._parts[request.object_id] = request.object_content
        assert self._pushed is not None
        proto, tree = self._pushed
        if set(self._parts) == self._identifiers(tree):
            message = inflate_object_from_contents(tree.object_id, dict(self._parts))
            assert isinstance(message, Message)
            message.metadata.__dict__["_message_id"] = message_from_proto(proto).metadata.message_id
            self.replies.put(message)
        return PushObjectResponse(stored=True)

    def _identifiers(self, tree: ObjectTree) -> set[str]:
        return {tree.object_id}.union(*(self._identifiers(child) for child in tree.children))
