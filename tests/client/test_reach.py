"""Why a server cannot be reached: through a web proxy as gRPC goes, and by a clock that is wrong."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from consilience.client.reach import certificate_end, connect, proxy, resolve
from consilience.common.errors import ClockError, UnreachableError
from consilience.common.identity import Kit
from consilience.server.authority import authority_pem, ensure_authority, renew_if_due
from consilience.server.settings import Home, ServerSettings

ADDRESS = "learn.example.org:9092"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("grpc_proxy", "https_proxy", "http_proxy", "no_grpc_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    held = Home(tmp_path_factory.mktemp("home"))
    ensure_authority(held)
    return held


def kit(home: Home, address: str = ADDRESS) -> Kit:
    return Kit(site="a", site_fingerprint="0" * 64, address=address, ca=authority_pem(home))


class Listener:
    """Takes one connection after another, reads a request and answers with fixed bytes."""

    def __init__(self, answer: bytes) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.asked: list[bytes] = []
        self._answer = answer
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                taken, _ = self._socket.accept()
            except OSError:
                return
            with taken:
                self.asked.append(taken.recv(4096))
                taken.sendall(self._answer)

    def close(self) -> None:
        """Stop taking connections."""
        self._socket.close()


@pytest.fixture
def granting() -> Iterator[Listener]:
    held = Listener(b"HTTP/1.1 200 Connection established\r\n\r\nfrom the server")
    yield held
    held.close()


def test_a_proxy_of_the_environment_is_asked_for_a_tunnel(
    home: Home, granting: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{granting.port}")
    with connect(kit(home)) as connection:
        assert connection.recv(100) == b"from the server"
    assert granting.asked[0].startswith(b"CONNECT learn.example.org:9092 HTTP/1.1\r\n")
    assert resolve(kit(home)) == [f"left to the proxy 127.0.0.1:{granting.port}"]


def test_a_proxy_that_refuses_is_named(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = Listener(b"HTTP/1.1 403 Forbidden\r\n\r\n")
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{refusing.port}")
    with pytest.raises(UnreachableError, match=rf"the proxy 127\.0\.0\.1:{refusing.port}: .*refused"):
        connect(kit(home))
    refusing.close()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"https_proxy": "http://proxy:3128"}, ("proxy", 3128)),
        ({"https_proxy": "proxy:3128"}, ("proxy", 3128)),
        ({"http_proxy": "http://web:80", "grpc_proxy": "http://own:1"}, ("own", 1)),
        ({"https_proxy": "http://proxy:3128", "no_proxy": "example.org"}, None),
        ({"https_proxy": "http://proxy:3128", "no_grpc_proxy": "learn.example.org"}, None),
        ({"https_proxy": "http://proxy:3128", "no_proxy": "example.com"}, ("proxy", 3128)),
        ({"HTTPS_PROXY": "http://proxy:3128"}, None),  # gRPC does not read it
    ],
)
def test_the_proxy_is_the_one_that_grpc_takes(
    home: Home, variables: dict[str, str], expected: tuple[str, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert proxy(kit(home)) == expected


@pytest.mark.parametrize(("days", "says"), [(-400, "no longer valid"), (400, "not valid yet")])
def test_a_certificate_of_another_time_is_a_matter_of_clocks(tmp_path: Path, days: int, says: str) -> None:
    home = Home(tmp_path)
    settings = ServerSettings(address="127.0.0.1:9092")
    ensure_authority(home)
    renew_if_due(home, settings, datetime.now(UTC) + timedelta(days=days))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(home.server_certificate, home.server_key)
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        taken, _ = listening.accept()
        with taken, pytest.raises(OSError, match=r".*"), context.wrap_socket(taken, server_side=True) as secure:
            secure.recv(1)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    with pytest.raises(ClockError, match=says):
        certificate_end(kit(home, f"127.0.0.1:{listening.getsockname()[1]}"))
    thread.join(10)
    listening.close()
