"""GET /health of a running agent, on this machine's loopback address only.

Does not live here: what is told (client/agent.Agent.status).
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from consilience.common.errors import SettingsError

HOST = "127.0.0.1"


@contextlib.contextmanager
def health_server(port: int | None, status: Callable[[], dict[str, Any]]) -> Iterator[None]:
    """Answer GET /health with `status()` as JSON while the block runs: 200 when connected, else 503.

    Without a port there is none. Raises `SettingsError` when the port cannot be had.
    """
    if port is None:
        yield
        return

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            held = status() if self.path == "/health" else None
            body = json.dumps(held if held is not None else {"error": "GET /health is all there is"}).encode()
            self.send_response(404 if held is None else 200 if held["status"] == "connected" else 503)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing: a monitor asks every few seconds."""

    try:
        server = ThreadingHTTPServer((HOST, port), Handler)
    except OSError as error:
        raise SettingsError(
            f"field 'health_port' is {port}; that port of {HOST} cannot be had: {error.strerror}",
            hint="Name a free port in the site's settings",
        ) from error
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.1,), name="health", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
