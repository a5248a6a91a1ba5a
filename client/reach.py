"""Why a server cannot be reached: its name, its port, its certificate, tried one after the other.

Lives here: plain sockets and TLS of the standard library. Does not live here: Flower's calls (client/fleet).
Nothing is sent but the TLS handshake.
"""

from __future__ import annotations

import socket
import ssl
from datetime import UTC, datetime

from consilience.common.errors import CertificateError, UnreachableError
from consilience.common.identity import Kit

PATIENCE = 5.0
"""Seconds for a connection and for a handshake."""


def resolve(kit: Kit) -> list[str]:
    """Return the addresses of the server's name. Raises `UnreachableError`."""
    try:
        found = socket.getaddrinfo(kit.host, kit.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UnreachableError(
            f"The name {kit.host} cannot be resolved: {error.strerror or error}",
            hint="Look at this machine's name service, or ask the coordinator whether the name changed",
        ) from error
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def connect(kit: Kit) -> socket.socket:
    """Open a TCP connection to the server. Raises `UnreachableError`."""
    try:
        return socket.create_connection((kit.host, kit.port), timeout=PATIENCE)
    except OSError as error:
        why = "no answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
        raise UnreachableError(
            f"Cannot open a TCP connection to {kit.address}: {why}",
            hint="Ask the coordinator whether the server runs, and let the firewall allow this connection",
        ) from error


def certificate_end(kit: Kit) -> datetime:
    """Make a TLS handshake as an agent does; return when the server's certificate ends.

    Raises `CertificateError` when it is not one of the kit's authority, for this address and this time,
    `UnreachableError`.
    """
    context = ssl.create_default_context(cadata=kit.ca)
    context.set_alpn_protocols(["h2"])
    with connect(kit) as plain:
        try:
            with context.wrap_socket(plain, server_hostname=kit.host) as secure:
                shown = secure.getpeercert() or {}
        except ssl.SSLCertVerificationError as error:
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
    """Return why no call came through. Raises `CertificateError`, which trying again does not mend."""
    try:
        certificate_end(kit)
    except UnreachableError as error:
        return error
    return UnreachableError(f"{kit.address} does not answer calls", hint="Ask the coordinator whether the server runs")
