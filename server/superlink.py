"""Flower's SuperLink as a process of ours, and what we tell it over its control API.

Lives here: starting, watching and stopping the process; registering keys; one Flower run at a time. All private flwr
modules of the server are used here and in server/grid (pinned by tests/server/test_flwr_contract.py). Does not live
here: what a run does (server/app), which keys and which runs (server/service).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import signal
import socket
import sqlite3
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import IO

import httpx
from cryptography.hazmat.primitives import serialization
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import fab_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    RegisterNodeRequest,
    StartRunRequest,
    UnregisterNodeRequest,
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from consilience.common.child import child_command, end_all
from consilience.common.errors import ServerError
from consilience.common.files import storage_error
from consilience.common.identity import read_key_line, read_secret, write_secret
from consilience.server.settings import Home, split_address

READY_SECONDS = 60.0
"""How long a SuperLink may take to answer after its start."""
STOP_SECONDS = 10.0


@dataclass(frozen=True)
class Endpoint:
    """Where a SuperLink listens and with what it proves who it is."""

    home: Home
    control_port: int
    """Port on 127.0.0.1 of the control and runtime API: it has no authentication of people, so it stays there."""

    @property
    def control(self) -> str:
        """host:port of the control and runtime API."""
        return f"127.0.0.1:{self.control_port}"

    @property
    def ca(self) -> bytes:
        """The certificate authority's certificate, PEM."""
        return self.home.ca_certificate.read_bytes()

    @property
    def secret_file(self) -> Path:
        """What a process must know to be given the server's part of a run: other users of the machine do not."""
        return self.home.folder / "runner.secret"

    @property
    def secret(self) -> bytes:
        """The secret; made at first use. Raises `IdentityError`, `StorageError`."""
        if not self.secret_file.exists():
            write_secret(self.secret_file, secrets.token_hex(32).encode())
        return read_secret(self.secret_file)


class SuperLink:
    """The SuperLink process of one server folder. Start it from the main thread: it dies with that thread."""

    def __init__(self, endpoint: Endpoint, listen: str) -> None:
        """`listen` is host:port of the fleet API: the one port that sites dial."""
        self.endpoint, self.listen = endpoint, listen
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    def start(self) -> None:
        """Start the process and wait until it answers. Raises `ServerError`, `StorageError`."""
        home = self.endpoint.home
        stop_leftover(home)
        _need_port("127.0.0.1", self.endpoint.control_port)
        _need_port(*split_address(self.listen))
        assert self.endpoint.secret
        command = child_command(
            "consilience.server.superlink_process",
            "--ssl-ca-certfile",
            str(home.ca_certificate),
            "--ssl-certfile",
            str(home.server_certificate),
            "--ssl-keyfile",
            str(home.server_key),
            "--enable-supernode-auth",
            "--isolation",
            "process",
            "--superexec-auth-secret-file",
            str(self.endpoint.secret_file),
            "--host",
            "127.0.0.1",
            "--port",
            str(self.endpoint.control_port),
            "--fleet-api-address",
            self.listen,
            "--database",
            str(home.database),
            "--disable-runtime-dependency-installation",
        )
        environment = {
            **os.environ,
            "FLWR_HOME": str(home.folder / "flower"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        }
        try:
            self._log = (home.folder / "superlink.log").open("ab")
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                env=environment,
                start_new_session=True,
                umask=0o077,  # messages on their way lie in its database in clear
            )
            (home.folder / "superlink.pid").write_text(str(self._process.pid))
        except OSError as error:
            raise storage_error(error, home.folder, "start the SuperLink in") from error
        self._wait_until_ready()

    def _wait_until_ready(self) -> None:
        until = time.monotonic() + READY_SECONDS
        while time.monotonic() < until:
            if not self.alive:
                break
            try:
                with Control(self.endpoint) as control:
                    control.nodes()
                    return
            except ServerError:
                time.sleep(0.1)
        self.stop()
        raise ServerError(
            f"The SuperLink did not come up on {self.endpoint.control} and {self.listen}",
            hint=f"Read the end of {self.endpoint.home.folder / 'superlink.log'}",
        )

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def process(self) -> subprocess.Popen[bytes] | None:
        """The process, whether it still runs or not; None before the first start."""
        return self._process

    @property
    def pid(self) -> int | None:
        """The process id."""
        return self._process.pid if self._process is not None else None

    def stop(self) -> None:
        """Stop the process; kill it when it takes longer than `STOP_SECONDS`."""
        if self._process is not None:
            end_all([self._process], STOP_SECONDS)
        if self._log is not None:
            self._log.close()
        (self.endpoint.home.folder / "superlink.pid").unlink(missing_ok=True)


def stop_leftover(home: Home) -> None:
    """Stop a SuperLink that an earlier server of this folder left behind when it was killed."""
    try:
        pid = int((home.folder / "superlink.pid").read_text())
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, ValueError):
        return
    if str(home.database).encode() not in command:
        return  # the number belongs to another process by now
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.kill(pid, sign)
            until = time.monotonic() + STOP_SECONDS
            while time.monotonic() < until:
                os.kill(pid, 0)
                time.sleep(0.05)
        except ProcessLookupError:
            return


def _need_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServerError(
                f"Port {port} on {host} cannot be used: {error.strerror}",
                hint="Stop what uses it, or set another port in server.yaml",
            ) from error


@dataclass(frozen=True)
class Node:
    """One key that the SuperLink knows."""

    identifier: int
    name: str
    key: bytes
    """Public key, PEM."""
    online: bool


class Control:
    """The control API of a running SuperLink. Every method raises `ServerError` when it does not answer."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._client = ControlHttpClient.from_server_address(
            server_address=endpoint.control,
            insecure=False,
            root_certificates=endpoint.ca,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        )

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *exc: object) -> None:
        self._client.close()

    def nodes(self) -> list[Node]:
        """Return the keys that are registered."""
        try:
            held = self._client.ListNodes(ListNodesRequest()).nodes_info
        except httpx.HTTPError as error:
            raise _silent(error) from error
        return [
            Node(node.node_id, node.name, node.public_key, node.status == "online")
            for node in held
            if node.status != "unregistered"
        ]

    def sync(self, keys: Mapping[str, str], nodes: Iterable[Node]) -> list[str]:
        """Make the registered keys those of `keys` (site -> OpenSSH line); returns what was done, a line each.

        `nodes` are those that are registered now. A node that stays keeps its connection: adding, suspending or
        rotating one site touches no other.
        """
        wanted = {key_pem(key): name for name, key in keys.items()}
        done = []
        try:
            held = {node.key: node for node in nodes}
            for pem, node in held.items():
                if wanted.get(pem) != node.name:
                    self._client.UnregisterNode(UnregisterNodeRequest(node_id=node.identifier))
                    done.append(f"site {node.name} is no longer admitted with its key")
            for pem, name in wanted.items():
                if pem not in held or held[pem].name != name:
                    self._forget(pem)
                    self._client.RegisterNode(RegisterNodeRequest(public_key=pem, name=name))
                    done.append(f"site {name} is admitted")
        except httpx.HTTPError as error:
            raise _silent(error) from error
        except sqlite3.Error as error:
            raise ServerError(
                f"{self._endpoint.home.database} cannot be changed: {error}",
                hint="Make room on the disk, or end the program that holds it; the server tries again by itself",
            ) from error
        return done

    def _forget(self, pem: bytes) -> None:
        """Remove the trace of a key that was registered once: Flower would refuse to register it again."""
        with contextlib.closing(sqlite3.connect(self._endpoint.home.database, timeout=10)) as database, database:
            database.execute("DELETE FROM node WHERE public_key = ? AND status = 'unregistered'", (pem,))

    def start_run(self) -> int:
        """Start a Flower run of our thin app; returns its id."""
        thin = resources.files("consilience.server").joinpath("flower", "pyproject.toml").read_bytes()
        fab, _ = build_fab_from_files({"pyproject.toml": thin})
        request = StartRunRequest(fab=fab_to_proto(Fab(hashlib.sha256(fab).hexdigest(), fab, {})))
        try:
            return int(self._client.StartRun(request).run_id)
        except httpx.HTTPError as error:
            raise _silent(error) from error


def key_pem(line: str) -> bytes:
    """Return a public key as Flower keeps it. Raises `IdentityError`."""
    return read_key_line(line).public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _silent(error: httpx.HTTPError) -> ServerError:
    what = f"HTTP {error.response.status_code}" if isinstance(error, httpx.HTTPStatusError) else type(error).__name__
    return ServerError(
        f"The SuperLink's control API does not answer as it should ({what})",
        hint="Is `consilience server start` running? Read the end of superlink.log in the server's folder",
    )
