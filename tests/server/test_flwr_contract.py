"""What the server uses of Flower's private modules is as it was when it was written: another flwr fails here first.

Nothing of this is behaviour of ours; the other tests of the server need every line of it.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from flwr.supercore import sql_mixin
from flwr.supercore.constant import SQLITE_PRAGMAS

import consilience.server.grid
import consilience.server.superlink
from consilience.common.identity import make_key
from consilience.server import superlink_process
from helpers.superlink import SuperLink

# fmt: off
# ruff: noqa: E501 (signatures as Python prints them)
SIGNATURES = {
    'flwr.app.message:make_message': "(metadata: 'Metadata', content: 'RecordDict | None' = None, error: 'Error | None' = None) -> 'Message'",
    'flwr.cli.build:build_fab_from_files': "(files: 'Mapping[str, bytes | Path]') -> 'tuple[bytes, FabFormatMetadata]'",
    'flwr.common.constant:ErrorCode': "() -> 'ErrorCode'",
    'flwr.server.superlink.fleet.grpc_rere.fleet_servicer:FleetServicer.ActivateNode': '(self, request: flwr.proto.fleet_pb2.ActivateNodeRequest, context: grpc.ServicerContext) -> flwr.proto.fleet_pb2.ActivateNodeResponse',
    'flwr.server.superlink.fleet.grpc_rere.node_auth_server_interceptor:NodeAuthServerInterceptor.intercept_service': '(self, continuation: collections.abc.Callable[[typing.Any], typing.Any], handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler',
    'flwr.supercore.primitives.asymmetric:bytes_to_public_key': '(public_key_bytes: bytes) -> cryptography.hazmat.primitives.asymmetric.ec.EllipticCurvePublicKey',
    'flwr.supercore.primitives.asymmetric:verify_signature': '(public_key: cryptography.hazmat.primitives.asymmetric.ec.EllipticCurvePublicKey, message: bytes, signature: bytes) -> bool',
    'flwr.common.constant:SubStatus': "() -> 'SubStatus'",
    'flwr.common.serde:context_from_proto': '(context_proto: flwr.proto.message_pb2.Context) -> flwr.app.message.context.Context',
    'flwr.common.serde:fab_to_proto': '(fab: flwr.supercore.fab.Fab) -> flwr.proto.fab_pb2.Fab',
    'flwr.common.serde:run_from_proto': '(run_proto: flwr.proto.run_pb2.Run) -> flwr.supercore.run.Run',
    'flwr.supercore.control:ControlHttpClient': "(base_url: 'str', *, interceptors: 'Sequence[ProtobufClientInterceptor]' = (), verify: 'ssl.SSLContext | bool | str' = True, timeout: 'float' = 30.0, retry_invoker: 'RetryInvoker | None' = None) -> 'None'",
    'flwr.supercore.control:ControlHttpClient.ListNodes': '(self, request: flwr.proto.control_pb2.ListNodesRequest) -> flwr.proto.control_pb2.ListNodesResponse',
    'flwr.supercore.control:ControlHttpClient.RegisterNode': '(self, request: flwr.proto.control_pb2.RegisterNodeRequest) -> flwr.proto.control_pb2.RegisterNodeResponse',
    'flwr.supercore.control:ControlHttpClient.StartRun': '(self, request: flwr.proto.control_pb2.StartRunRequest) -> flwr.proto.control_pb2.StartRunResponse',
    'flwr.supercore.control:ControlHttpClient.UnregisterNode': '(self, request: flwr.proto.control_pb2.UnregisterNodeRequest) -> flwr.proto.control_pb2.UnregisterNodeResponse',
    'flwr.supercore.control:ControlHttpClient.close': "(self) -> 'None'",
    'flwr.supercore.control:ControlHttpClient.from_server_address': "(server_address: 'str', insecure: 'bool', root_certificates: 'bytes | str | None', interceptors: 'Sequence[ProtobufClientInterceptor]', *, retry_invoker: 'RetryInvoker | None' = None) -> 'Self'",
    'flwr.supercore.fab:Fab': '(hash_str: str, content: bytes, verifications: dict[str, str]) -> None',
    'flwr.supercore.heartbeat:HeartbeatSender': '(heartbeat_fn: collections.abc.Callable[[], bool]) -> None',
    'flwr.supercore.heartbeat:HeartbeatSender.start': '(self) -> None',
    'flwr.supercore.heartbeat:HeartbeatSender.stop': '(self) -> None',
    'flwr.supercore.inflatable.inflatable_object:iterate_object_tree': "(tree: 'ObjectTree') -> 'Iterator[ObjectTree]'",
    'flwr.supercore.inflatable.inflatable_protobuf_utils:make_pull_object_fn_protobuf': '(pull_object_protobuf: collections.abc.Callable[[flwr.proto.message_pb2.PullObjectRequest], flwr.proto.message_pb2.PullObjectResponse], node: flwr.proto.node_pb2.Node, run_id: int) -> collections.abc.Callable[[str], bytes]',
    'flwr.supercore.inflatable.inflatable_utils:ObjectPullError': '(object_id: str, reason: str)',
    'flwr.supercore.inflatable.inflatable_utils:inflate_object_from_contents': '(object_id: str, object_contents: dict[str, bytes], *, keep_object_contents: bool = False, objects: dict[str, flwr.supercore.inflatable.inflatable_object.InflatableObject] | None = None) -> flwr.supercore.inflatable.inflatable_object.InflatableObject',
    'flwr.supercore.inflatable.inflatable_utils:pull_objects': '(object_ids: list[str], pull_object_fn: collections.abc.Callable[[str], bytes], *, max_concurrent_pulls: int = 2, max_time: float | None = 7200, max_tries_per_object: int | None = 500, initial_backoff: float = 1, backoff_cap: float = 10) -> dict[str, bytes]',
    'flwr.supercore.interceptors:RuntimeTokenHttpInterceptor': '(token: str) -> None',
    'flwr.supercore.interceptors:RuntimeVersionHttpInterceptor': '(component_name: str) -> None',
    'flwr.supercore.interceptors:SuperExecAuthHttpInterceptor': '(*, master_secret: bytes, protected_methods: collections.abc.Collection[str]) -> None',
    'flwr.supercore.retry:RetryInvoker': '(wait_gen_factory: collections.abc.Callable[[], collections.abc.Generator[float, None, None]], recoverable_exceptions: type[Exception] | tuple[type[Exception], ...], max_tries: int | None, max_time: float | None, *, on_success: collections.abc.Callable[[flwr.supercore.retry.retry_invoker.RetryState], None] | None = None, on_backoff: collections.abc.Callable[[flwr.supercore.retry.retry_invoker.RetryState], None] | None = None, on_giveup: collections.abc.Callable[[flwr.supercore.retry.retry_invoker.RetryState], None] | None = None, jitter: collections.abc.Callable[[float], float] | None = <function full_jitter>, should_giveup: collections.abc.Callable[[Exception], bool] | None = None, wait_function: collections.abc.Callable[[float], None] | None = None) -> None',
    'flwr.supercore.retry:exponential': '(base_delay: float = 1, multiplier: float = 2, max_delay: int | None = None) -> collections.abc.Generator[float, None, None]',
    'flwr.supercore.runtime:RuntimeHttpClient': "(base_url: 'str', *, interceptors: 'Sequence[ProtobufClientInterceptor]' = (), verify: 'ssl.SSLContext | bool | str' = True, timeout: 'float' = 30.0, retry_invoker: 'RetryInvoker | None' = None) -> 'None'",
    'flwr.supercore.runtime:RuntimeHttpClient.AcquireTask': '(self, request: flwr.proto.runtime_pb2.AcquireTaskRequest) -> flwr.proto.runtime_pb2.AcquireTaskResponse',
    'flwr.supercore.runtime:RuntimeHttpClient.ConfirmMessageReceived': '(self, request: flwr.proto.message_pb2.ConfirmMessageReceivedRequest) -> flwr.proto.message_pb2.ConfirmMessageReceivedResponse',
    'flwr.supercore.runtime:RuntimeHttpClient.PullMessages': '(self, request: flwr.proto.runtime_pb2.PullAppMessagesRequest) -> flwr.proto.runtime_pb2.PullAppMessagesResponse',
    'flwr.supercore.runtime:RuntimeHttpClient.PullObject': '(self, request: flwr.proto.message_pb2.PullObjectRequest) -> flwr.proto.message_pb2.PullObjectResponse',
    'flwr.supercore.runtime:RuntimeHttpClient.PullTaskInput': '(self, request: flwr.proto.runtime_pb2.PullTaskInputRequest) -> flwr.proto.runtime_pb2.PullTaskInputResponse',
    'flwr.supercore.runtime:RuntimeHttpClient.PushTaskOutput': '(self, request: flwr.proto.runtime_pb2.PushTaskOutputRequest) -> flwr.proto.runtime_pb2.PushTaskOutputResponse',
    'flwr.supercore.runtime:RuntimeHttpClient.SendTaskHeartbeat': '(self, request: flwr.proto.runtime_pb2.SendTaskHeartbeatRequest) -> flwr.proto.runtime_pb2.SendTaskHeartbeatResponse',
    'flwr.supercore.runtime:RuntimeHttpClient.close': "(self) -> 'None'",
    'flwr.supercore.runtime:RuntimeHttpClient.from_server_address': "(server_address: 'str', insecure: 'bool', root_certificates: 'bytes | str | None', interceptors: 'Sequence[ProtobufClientInterceptor]', *, retry_invoker: 'RetryInvoker | None' = None) -> 'Self'",
    'flwr.supercore.task_identity:TaskIdentity': '()',
    'flwr.superlink.grid:HttpGrid': "(runtime_api_address: str = '127.0.0.1:8000', insecure: bool = False, root_certificates: bytes | None = None, *, token: str) -> None",
    'flwr.superlink.grid:HttpGrid.close': '(self) -> None',
    'flwr.superlink.grid:HttpGrid.get_nodes': '(self) -> collections.abc.Iterable[flwr.proto.node_pb2.NodeInfo]',
    'flwr.superlink.grid:HttpGrid.pull_messages': '(self, message_ids: collections.abc.Iterable[str]) -> collections.abc.Iterable[flwr.app.message.message.Message]',
    'flwr.superlink.grid:HttpGrid.push_messages': '(self, messages: collections.abc.Iterable[flwr.app.message.message.Message]) -> collections.abc.Iterable[str]',
    'flwr.superlink.grid:HttpGrid.set_run': '(self, run: flwr.supercore.run.Run) -> None',
}
# fmt: on
FIELDS: dict[str, set[str]] = {
    "control_pb2:ListNodesRequest": set(),
    "control_pb2:ListNodesResponse": {"nodes_info"},
    "control_pb2:RegisterNodeRequest": {"public_key", "name"},
    "control_pb2:StartRunRequest": {"fab"},
    "control_pb2:StartRunResponse": {"run_id"},
    "control_pb2:UnregisterNodeRequest": {"node_id"},
    "message_pb2:ConfirmMessageReceivedRequest": {"node", "run_id", "message_object_id"},
    "message_pb2:Metadata": {"run_id", "message_id", "src_node_id", "reply_to_message_id"},
    "message_pb2:ObjectTree": {"object_id", "children"},
    "node_pb2:NodeInfo": {"node_id", "name", "public_key", "status"},
    "runtime_pb2:AcquireTaskRequest": {"supported_task_types"},
    "runtime_pb2:AcquireTaskResponse": {"task", "token"},
    "runtime_pb2:PullAppMessagesRequest": {"message_ids"},
    "runtime_pb2:PullAppMessagesResponse": {"messages_list", "message_object_trees"},
    "runtime_pb2:PullTaskInputRequest": set(),
    "runtime_pb2:PullTaskInputResponse": {"task_id", "run", "context"},
    "runtime_pb2:PushTaskOutputRequest": {"sub_status", "details"},
    "runtime_pb2:SendTaskHeartbeatRequest": set(),
    "task_pb2:Task": {"run_id"},
}
"""Messages and the fields of them that are read or written."""
CONSTANTS = {
    "flwr.common.constant:SUPERLINK_NODE_ID": 1,
    "flwr.common.constant:ErrorCode.REPLY_MESSAGE_UNAVAILABLE": 4,
    "flwr.common.constant:ErrorCode.UNKNOWN": 0,
    "flwr.common.constant:PUBLIC_KEY_HEADER": "flwr-public-key-bin",
    "flwr.supercore.error:ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED": 2004,
    "flwr.common.constant:SIGNATURE_HEADER": "flwr-signature-bin",
    "flwr.common.constant:TIMESTAMP_HEADER": "flwr-timestamp",
    "flwr.common.constant:SubStatus.COMPLETED": "completed",
    "flwr.common.constant:SubStatus.FAILED": "failed",
    "flwr.supercore.constant:SYSTEM_MESSAGE_TYPE": "system",
    "flwr.superlink.cli.flower_superlink:GRPC_MAX_MESSAGE_LENGTH": 2**31 - 1,
}
PUBLIC = ("flwr.app", "flwr.clientapp", "flwr.serverapp")
PATCHED = {
    "flwr.supercore.inflatable.inflatable_utils:ObjectPushError",
    "flwr.supercore.run:RunNotRunningException",
    "flwr.supercore.task_identity:TaskIdentity",
}
"""Pinned by tests of their own."""


def named(path: str) -> Any:
    module, _, names = path.partition(":")
    found: Any = importlib.import_module(module)
    for name in names.split("."):
        found = getattr(found, name)
    return found


@pytest.mark.parametrize("path", SIGNATURES)
def test_a_function_is_called_as_before(path: str) -> None:
    assert re.sub(r" at 0x[0-9a-f]+", "", str(inspect.signature(named(path)))) == SIGNATURES[path]


@pytest.mark.parametrize("path", FIELDS)
def test_a_message_has_the_fields_that_are_used(path: str) -> None:
    assert FIELDS[path] <= {field.name for field in named(f"flwr.proto.{path}").DESCRIPTOR.fields}


@pytest.mark.parametrize("path", CONSTANTS)
def test_a_constant_is_what_it_was(path: str) -> None:
    assert named(path) == CONSTANTS[path]


def test_other_names_that_are_used() -> None:
    identity = named("flwr.supercore.task_identity:TaskIdentity")
    assert all(hasattr(identity, f"_{name}") for name in ("task_id", "run_id", "node_id"))  # read through a metaclass
    assert issubclass(named("flwr.supercore.run:RunNotRunningException"), BaseException)
    assert issubclass(named("flwr.supercore.inflatable.inflatable_utils:ObjectPushError"), BaseException)
    grid = named("flwr.superlink.grid:HttpGrid")
    assert isinstance(grid._runtime_client, property)
    held = grid("127.0.0.1:1", insecure=True, token="x")
    assert held._client is None
    assert held.node.node_id == 1
    assert "_retry_invoker" in vars(held)


def test_nothing_private_is_used_that_is_not_pinned() -> None:
    pinned = {re.sub(r"(:\w+)\..*", r"\1", path) for path in (*SIGNATURES, *CONSTANTS)}
    pinned |= {f"flwr.proto.{path}" for path in FIELDS} | PATCHED
    used = set()
    for module in (consilience.server.grid, consilience.server.superlink):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "flwr":
                used |= {f"{node.module}:{name.name}" for name in node.names if node.module not in PUBLIC}
    assert used <= pinned


def test_a_database_keeps_the_keys_of_sites_as_we_forget_them(tmp_path: Path) -> None:
    superlink = SuperLink(tmp_path)
    superlink.start()
    try:
        node = superlink.register(make_key(tmp_path / "site.key").public_key(), "hospital-a")
        superlink.unregister(node)
        with sqlite3.connect(tmp_path / "state.db") as database:
            rows = database.execute("SELECT public_key, status, name FROM node").fetchall()
        database.close()
    finally:
        superlink.end()
    ((key, status, name),) = rows
    assert (key[:26], status, name) == (b"-----BEGIN PUBLIC KEY-----", "unregistered", "hospital-a")


def test_the_superlink_waits_for_its_database_as_long_as_we_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql_mixin, "SQLITE_PRAGMAS", SQLITE_PRAGMAS)
    superlink_process.be_patient()
    database = sqlite3.connect(":memory:")
    sql_mixin._set_sqlite_pragmas(database, None)
    assert database.execute("PRAGMA busy_timeout").fetchall() == [(1000 * superlink_process.BUSY_SECONDS,)]
    database.close()


def test_the_command_line_of_the_superlink_has_our_options() -> None:
    command = [sys.executable, "-m", superlink_process.__name__, "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = re.findall(r'"(--[a-z-]+)"', inspect.getsource(consilience.server.superlink))
    assert len(used) == 11
    assert set(used) <= set(re.findall(r"--[a-z-]+", text))
