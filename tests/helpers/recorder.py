"""A peer between an agent and a SuperLink that records every call, and every byte that leaves the agent's machine.

Two parts, one before the other: a relay that counts bytes of the TCP stream as they are, encrypted, and a gRPC peer
with a certificate of its own that keeps each request and passes it on to the SuperLink.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc  # type: ignore[import-untyped]

from consilience.common.identity import Kit
from helpers.superlink import Authority

UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


@dataclass(frozen=True)
class Call:
    """One request of the agent, as it arrived."""

    method: str
    request: bytes
    headers: tuple[tuple[str, bytes], ...]


class Recorder(grpc.GenericRpcHandler):  # type: ignore[misc]
    """The peer. `calls` grows as the agent speaks; `sent` counts the bytes of its side of the TCP streams."""

    def __init__(self, folder: Path, kit: Kit, own: tuple[Path, Path] | None = None) -> None:
        """`kit` is the one of the site: it says where the SuperLink is and who signs its certificate.

        `own`: the SuperLink's certificate and key, to stand in its place; by default an authority of the peer's own.
        """
        self.authority = Authority()
        self.calls: list[Call] = []
        self.sent = 0
        certificate, key = own or self.authority.issue(folder)
        self._onward = grpc.secure_channel(kit.address, grpc.ssl_channel_credentials(kit.ca.encode()), UNLIMITED)
        self._server = grpc.server(ThreadPoolExecutor(16), [self], options=UNLIMITED)
        credentials = grpc.ssl_server_credentials([(key.read_bytes(), certificate.read_bytes())])
        self._port = self._server.add_secure_port("127.0.0.1:0", credentials)
        self._server.start()
        self._relay = socket.create_server(("127.0.0.1", 0))
        self._streams: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._begin(self._accept)

    @property
    def address(self) -> str:
        """What an agent's kit must name."""
        return f"127.0.0.1:{self._relay.getsockname()[1]}"

    def service(self, handler_call_details: Any) -> Any:
        """Return how a call is answered: any call, by passing it on."""
        method = handler_call_details.method

        def answer(request: bytes, context: Any) -> bytes:
            held = tuple((key, value) for key, value in context.invocation_metadata() if key != "user-agent")
            headers = tuple((key, value if isinstance(value, bytes) else value.encode()) for key, value in held)
            self.calls.append(Call(method.rpartition("/")[2], request, headers))
            try:
                return bytes(self._onward.unary_unary(method)(request, metadata=held, timeout=60))
            except grpc.RpcError as error:
                context.abort(error.code(), error.details())
                raise

        return grpc.unary_unary_rpc_method_handler(answer)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._relay.accept()
                far = socket.create_connection(("127.0.0.1", self._port))
                self._streams += [near, far]
                self._begin(self._copy, near, far, True)
                self._begin(self._copy, far, near, False)

    def _begin(self, action: Callable[..., None], *arguments: object) -> None:
        self._threads.append(threading.Thread(target=action, args=arguments, daemon=True))
        self._threads[-1].start()

    def _copy(self, source: socket.socket, target: socket.socket, count: bool) -> None:
        with suppress(OSError):
            while data := source.recv(2**16):
                self.sent += len(data) if count else 0
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Stop listening."""
        self._server.stop(None).wait()
        self._onward.close()
        for held in (self._relay, *self._streams):
            with suppress(OSError):
                held.shutdown(socket.SHUT_RDWR)
            held.close()
        for thread in self._threads:
            thread.join()
