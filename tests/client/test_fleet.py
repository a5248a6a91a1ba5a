"""What the client stands on in Flower's private modules: names and parameters, so that an update cannot surprise."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
from typing import Any

import pytest
from flwr.common import constant
from flwr.proto import fleet_pb2_grpc
from flwr.supercore.error import ApiErrorCode

from consilience.client.fleet import FORGOTTEN, HEARTBEAT, SERVER_NODE
from consilience.client.fleet_http import CONNECTION

PARAMETERS = {
    "flwr.app.message:remove_content_from_message": "message",
    "flwr.common.serde:message_from_proto": "message_proto",
    "flwr.common.serde:message_to_proto": "message",
    "flwr.supercore.grpc:create_channel": (
        "server_address, insecure, root_certificates, max_message_length, interceptors"
    ),
    "flwr.supercore.error:FlowerError.from_json": "value",
    "flwr.supercore.inflatable.inflatable_object:get_all_nested_objects": "obj",
    "flwr.supercore.inflatable.inflatable_object:get_object_id": "object_content",
    "flwr.supercore.inflatable.inflatable_object:get_object_tree": "obj",
    "flwr.supercore.inflatable.inflatable_object:iterate_object_tree": "tree",
    "flwr.supercore.inflatable.inflatable_object:no_object_id_recompute": "",
    "flwr.supercore.inflatable.inflatable_protobuf_utils:make_confirm_message_received_fn_protobuf": (
        "confirm_message_received_protobuf, node, run_id"
    ),
    "flwr.supercore.inflatable.inflatable_protobuf_utils:make_pull_object_fn_protobuf": (
        "pull_object_protobuf, node, run_id"
    ),
    "flwr.supercore.inflatable.inflatable_protobuf_utils:make_push_object_fn_protobuf": (
        "push_object_protobuf, node, run_id, session_id"
    ),
    "flwr.supercore.inflatable.inflatable_utils:inflate_object_from_contents": (
        "object_id, object_contents, keep_object_contents, objects"
    ),
    "flwr.supercore.inflatable.inflatable_utils:pull_objects": (
        "object_ids, pull_object_fn, max_concurrent_pulls, max_time, max_tries_per_object, initial_backoff, backoff_cap"
    ),
    "flwr.supercore.inflatable.inflatable_utils:push_objects": (
        "objects, push_object_fn, object_ids_to_push, keep_objects, max_concurrent_pushes"
    ),
    "flwr.supercore.primitives.asymmetric:public_key_to_bytes": "public_key",
    "flwr.supercore.runtime_version_compatibility:RuntimeVersionMetadata.from_local_component": (
        "component_name, package_name_value, package_version_value"
    ),
    "flwr.supercore.runtime_version_compatibility:RuntimeVersionMetadata.append_to_grpc_metadata": (
        "self, grpc_metadata"
    ),
    "flwr.client.grpc_rere_client.node_auth_client_interceptor:NodeAuthClientInterceptor": "private_key, public_key",
}
METHODS = {
    "ActivateNode",
    "DeactivateNode",
    "SendNodeHeartbeat",
    "PullMessages",
    "PushMessages",
    "GetRun",
    "GetFab",
    "PushObject",
    "PullObject",
    "ConfirmMessageReceived",
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_private_function_takes_what_the_client_gives_it(name: str) -> None:
    module, _, path = name.partition(":")
    held: Any = importlib.import_module(module)
    for part in path.split("."):
        held = getattr(held, part)
    assert ", ".join(inspect.signature(held).parameters) == PARAMETERS[name]


def test_the_fleet_api_has_the_calls_and_the_codes_that_the_client_knows() -> None:
    assert set(vars(fleet_pb2_grpc.FleetServicer)) >= METHODS
    for code in ("FLEET_NODE_ACTIVATION_FAILED", "FLEET_INVALID_HEARTBEAT_INTERVAL", "RUNTIME_VERSION_INCOMPATIBLE"):
        assert hasattr(ApiErrorCode, code)


def test_signs_of_life_are_as_frequent_as_the_superlink_takes() -> None:
    assert constant.HEARTBEAT_MIN_INTERVAL == HEARTBEAT
    assert constant.HEARTBEAT_PATIENCE * HEARTBEAT == FORGOTTEN
    assert SERVER_NODE == constant.SUPERLINK_NODE_ID == 1


@pytest.mark.skipif(
    os.environ.get("CONSILIENCE_TEST_NEWEST_FLWR") != "1", reason="looks at flwr 1.40 and later, if installed"
)
def test_a_newer_flwr_has_the_connection_by_http() -> None:
    module, name = CONNECTION
    connect = getattr(importlib.import_module(module), name)
    assert [*inspect.signature(connect).parameters][:4] == [
        "server_address",
        "insecure",
        "root_certificates",
        "authentication_keys",
    ]
    assert importlib.util.find_spec("flwr.client.grpc_rere_client") is None
