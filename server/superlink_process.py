"""Flower's `flower-superlink` with three things of ours: `python -m` this module.

Lives here: a bound on what one call of a site may carry (Flower's own is 2 GB, which the SuperLink would hold in memory
several times over, for whoever sends it), more patience with its own database, and a line in strangers.jsonl for each
key that is turned away. Does not live here: starting and watching the process (server/superlink), telling the
coordinator (server/strangers).
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from consilience.server.strangers import Strangers

MOST_BYTES = 64 * 2**20
"""Bytes of one call: an answer travels in pieces of 5 MB, a card or an agreement in one."""
BUSY_SECONDS = 25
"""How long a call waits while others write to the database. Flower's own 5 s are too short where many sites report at
once to a busy machine; a site gives a call up after 30 s."""
FOLDER_OPTION = "--database"


def main(arguments: list[str]) -> None:
    """Run the command with `arguments`, which are those of `sys.argv`."""
    command = importlib.import_module("flwr.superlink.cli.flower_superlink")  # the package shows the function instead
    command.__dict__["GRPC_MAX_MESSAGE_LENGTH"] = MOST_BYTES
    be_patient()
    if FOLDER_OPTION in arguments and "FleetServicer" in command.__dict__:  # a flwr whose sites speak gRPC
        watch(command.__dict__, Strangers(Path(arguments[arguments.index(FOLDER_OPTION) + 1]).parent))
    command.flower_superlink()


def be_patient() -> None:
    """Let every database that is opened from now on wait `BUSY_SECONDS` for others that write."""
    database = importlib.import_module("flwr.supercore.sql_mixin").__dict__
    database["SQLITE_PRAGMAS"] = (*database["SQLITE_PRAGMAS"], ("busy_timeout", str(1000 * BUSY_SECONDS)))


def watch(names: dict[str, Any], strangers: Strangers) -> None:
    """Let the classes in the module with those `names` that turn a site away tell `strangers`; they do so as before."""
    keys = importlib.import_module("flwr.supercore.primitives.asymmetric")
    constant, errors = importlib.import_module("flwr.common.constant"), importlib.import_module("flwr.supercore.error")

    fleet: Any = names["FleetServicer"]
    authentication: Any = names["NodeAuthServerInterceptor"]

    class Servicer(fleet):  # type: ignore[misc]
        def ActivateNode(self, request: Any, context: Any) -> Any:
            try:
                return super().ActivateNode(request, context)
            except errors.FlowerError as error:
                if error.code != errors.ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
                    raise
                key = dict(context.invocation_metadata()).get(constant.PUBLIC_KEY_HEADER)  # that it has proved to hold
                if isinstance(key, bytes):
                    known = self.state_factory.state().get_node_id_by_public_key(key) is not None
                    strangers.turned_away(key, "connected" if known else "unknown")
                raise

    class Interceptor(authentication):  # type: ignore[misc]
        def intercept_service(self, continuation: Any, details: Any) -> Any:
            passed = False

            def go_on(given: Any) -> Any:
                nonlocal passed
                passed = True
                return continuation(given)

            handler = super().intercept_service(go_on, details)
            if not passed:
                held = dict(details.invocation_metadata)
                key, signature = held.get(constant.PUBLIC_KEY_HEADER), held.get(constant.SIGNATURE_HEADER)
                when = str(held.get(constant.TIMESTAMP_HEADER)).encode()
                if (
                    isinstance(key, bytes)
                    and isinstance(signature, bytes)
                    and keys.verify_signature(keys.bytes_to_public_key(key), when, signature)
                ):
                    strangers.turned_away(key, "clock")
            return handler

    names["FleetServicer"], names["NodeAuthServerInterceptor"] = Servicer, Interceptor


if __name__ == "__main__":
    import sys

    main(sys.argv)
