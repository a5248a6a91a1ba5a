"""Why a server cannot be reached: its name, its port, its certificate, tried one after the other.

Lives here: plain sockets and TLS of the standard library. Does not live here: Flower's calls (client/fleet).
Nothing is sent but the TLS handshake.
"""

from __future__ import annotations

import os
import socket
import ssl
import urllib.parse
import urllib.request
from datetime import UTC, datetime

from consilience.common.errors import CertificateError, ClockError, UnreachableError
from consilience.common.identity import Kit

PATIENCE = 5.0
"""Seconds for a connection and for a handshake."""
_NOT_NOW = {9: "not valid yet", 10: "no longer valid"}
"""OpenSSL's X509_V_ERR_CERT_NOT_YET_VALID and X509_V_ERR_CERT_HAS_EXPIRED."""


def proxy(kit: Kit) -> tuple[str, int] | None:
    """Return host and port of the web proxy that this machine's environment names for the server, as gRPC reads it."""
    named, spared = _first("grpc_proxy", "https_proxy", "http_proxy"), _first("no_grpc_proxy", "no_proxy")
    if not named or urllib.request.proxy_bypass_environment(kit.host, {"no": spared}):  # type: ignore[attr-defined]
        return None
    parts = urllib.parse.urlsplit(named if "//" in named else f"//{named}")
    return (parts.hostname or "", parts.port or 80)


def _first(*names: str) -> str:
    """Return the first of these variables that is set; gRPC knows them in small letters alone."""
    return next((value for name in names if (value := os.environ.get(name))), "")


def resolve(kit: Kit) -> list[str]:
    """Return the addresses of the server's name, or who resolves it. Raises `UnreachableError`."""
    if through := proxy(kit):
        return [f"left to the proxy {through[0]}:{through[1]}"]
    try:
        found = socket.getaddrinfo(kit.host, kit.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UnreachableError(
            f"The name {kit.host} cannot be resolved: {error.strerror or error}",
            hint="Look at this machine's name service, or ask the coordinator whether the name changed",
        ) from error
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def connect(kit: Kit) -> socket.socket:
    """Open a TCP connection to the server, through the proxy where there is one. Raises `UnreachableError`."""
    through = proxy(kit)
    try:
        connection = socket.create_connection(through or (kit.host, kit.port), timeout=PATIENCE)
        if through:
            _ask_proxy(connection, kit)
        return connection
    except OSError as error:
        why = "no answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
        way = f" through the proxy {through[0]}:{through[1]}" if through else ""
        raise UnreachableError(
            f"Cannot open a TCP connection to {kit.address}{way}: {why}",
            hint="Ask the coordinator whether the server runs, and let the firewall, or proxy, allow this connection",
        ) from error


def _ask_proxy(connection: socket.socket, kit: Kit) -> None:
    """Ask for a tunnel. Raises `OSError`."""
    connection.sendall(f"CONNECT {kit.address} HTTP/1.1\r\nHost: {kit.address}\r\n\r\n".encode())
    answer = b""
    while b"\r\n\r\n" not in answer and len(answer) < 65_536:
        if not (more := connection.recv(1)):  # what follows the answer is the server's
            break
        answer += more
    status = answer.split(b"\r\n")[0].split()[1:2]
    if status != [b"200"]:
        connection.close()
        raise ConnectionRefusedError(0, "the proxy refused the tunnel")


def certificate_end(kit: Kit) -> datetime:
    """Make a TLS handshake as an agent does; return when the server's certificate ends.

    Raises `CertificateError` when it is not one of the kit's authority or not for this address, `ClockError` when it is
    not for this time, `UnreachableError`.
    """
    context = ssl.create_default_context(cadata=kit.ca)
    context.set_alpn_protocols(["h2"])
    with connect(kit) as plain:
        try:
            with context.wrap_socket(plain, server_hostname=kit.host) as secure:
                shown = secure.getpeercert() or {}
        except ssl.SSLCertVerificationError as error:
            if error.verify_code in _NOT_NOW:
                raise ClockError(
                    f"By this machine's clock, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, the certificate that "
                    f"{kit.address} shows is {_NOT_NOW[error.verify_code]}",
                    hint="Compare `date -u` with the coordinator's; if it is right, the certificate is at fault",
                ) from error
            raise CertificateError(
                f"The server at {kit.address} shows a certificate that the kit does not allow: {error.verify_message}",
                hint="Compare the kit's words with the coordinator, and this machine's clock",
            ) from error
        except ssl.SSLError as error:
            if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
                raise _broken_off(kit, "it closed the connection") from error
            raise CertificateError(
                f"What answers at {kit.address} does not speak TLS as the server does: {error.reason or 'no reason'}",
                hint="Compare the kit's address with the coordinator",
            ) from error
        except OSError as error:
            raise _broken_off(kit, "no answer" if isinstance(error, TimeoutError) else str(error.strerror)) from error
    return datetime.fromtimestamp(ssl.cert_time_to_seconds(str(shown["notAfter"])), UTC)


def _broken_off(kit: Kit, why: str) -> UnreachableError:
    return UnreachableError(
        f"{kit.address} broke off the TLS handshake: {why}", hint="Ask the coordinator whether the server runs"
    )


def why_unreachable(kit: Kit) -> UnreachableError:
    """Return why no call came through. Raises `CertificateError` and `ClockError`, which trying again does not mend."""
    try:
        certificate_end(kit)
    except UnreachableError as error:
        return error
    return UnreachableError(f"{kit.address} does not answer calls", hint="Ask the coordinator whether the server runs")
