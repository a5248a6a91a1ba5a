"""A real SuperLink on loopback with TLS and site authentication, its sites, and runs to send messages in."""

from __future__ import annotations

import datetime as dt
import hashlib
import ipaddress
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import SubStatus
from flwr.common.serde import fab_to_proto, run_from_proto
from flwr.proto.control_pb2 import RegisterNodeRequest, StartRunRequest, UnregisterNodeRequest
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullTaskInputRequest, PushTaskOutputRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from consilience.deploy.processes import free_ports

PYPROJECT = b"""[project]
name = "consilience-app"
version = "0.1.0"
description = "Names of the installed apps"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "consilience"
[tool.flwr.app.components]
serverapp = "consilience.server.app:app"
clientapp = "consilience.client.app:app"
[tool.flwr.app.config]
"""
PATIENCE = 120.0
"""Seconds until a wait for another process is a failure."""
SWITCHES = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}


def until(condition: Any, what: str) -> Any:
    """Wait until `condition()` holds and return what it gave."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError(f"not within {PATIENCE} s: {what}")


class Authority:
    """A certificate authority of the tests' own."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tests")])
        built = self._base(self.name, self.key.public_key(), dt.timedelta(days=2)).add_extension(
            x509.BasicConstraints(ca=True, path_length=None), critical=True
        )
        self.pem = built.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()

    def _base(self, subject: x509.Name, key: ec.EllipticCurvePublicKey, life: dt.timedelta) -> x509.CertificateBuilder:
        now = dt.datetime.now(dt.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(days=1))
            .not_valid_after(now + life)
        )

    def issue(self, folder: Path) -> tuple[Path, Path]:
        """Write a server's certificate for loopback and its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = x509.SubjectAlternativeName(
            [x509.DNSName("localhost"), x509.IPAddress(ipaddress.IPv4Address("127.0.0.1"))]
        )
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
        built = self._base(subject, key.public_key(), dt.timedelta(days=1)).add_extension(names, critical=False)
        certificate = built.sign(self.key, hashes.SHA256())
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "server.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        (folder / "server.key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return folder / "server.crt", folder / "server.key"


class SuperLink:
    """A `flower-superlink` process and its two clients: of the Control API and of runs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.authority = folder, Authority()
        self.certificate, self.certificate_key = self.authority.issue(folder)
        (folder / "ca.crt").write_text(self.authority.pem)
        self.control_port, self.fleet_port = free_ports(2)
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """Where sites connect."""
        return f"127.0.0.1:{self.fleet_port}"

    def start(self) -> None:
        """Start it and wait until it listens."""
        command = [str(Path(sys.executable).parent / "flower-superlink")]
        command += ["--ssl-ca-certfile", str(self.folder / "ca.crt"), "--ssl-certfile", str(self.certificate)]
        command += ["--ssl-keyfile", str(self.certificate_key), "--enable-supernode-auth", "--isolation", "process"]
        command += ["--host", "127.0.0.1", "--port", str(self.control_port), "--fleet-api-address", self.address]
        command += ["--database", str(self.folder / "state.db"), "--disable-runtime-dependency-installation"]
        with (self.folder / "superlink.log").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env={**os.environ, **SWITCHES, "FLWR_HOME": str(self.folder / "home")},
            )
        until(lambda: all(map(self._listens, (self.control_port, self.fleet_port))), "the SuperLink listens")

    def _listens(self, port: int) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.folder / "superlink.log").read_text()
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
        return False

    def end(self, number: int = signal.SIGKILL) -> None:
        """Send it a signal and wait for its end."""
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(PATIENCE)
            self.process = None

    def _client(self, kind: Any, component: str) -> Any:
        return kind.from_server_address(
            server_address=f"127.0.0.1:{self.control_port}",
            insecure=False,
            root_certificates=self.authority.pem.encode(),
            interceptors=[RuntimeVersionHttpInterceptor(component_name=component)],
            retry_invoker=make_simple_http_retry_invoker(),
        )

    def register(self, public: Any, name: str) -> int:
        """Admit a key; return the node's id."""
        control = self._client(ControlHttpClient, "flwr CLI")
        try:
            request = RegisterNodeRequest(public_key=public_key_to_bytes(public), name=name)
            return int(control.RegisterNode(request).node_id)
        finally:
            control.close()

    def unregister(self, node: int) -> None:
        """Suspend a node's key."""
        control = self._client(ControlHttpClient, "flwr CLI")
        try:
            control.UnregisterNode(UnregisterNodeRequest(node_id=node))
        finally:
            control.close()

    @contextmanager
    def run(self, files: dict[str, bytes] | None = None) -> Iterator[HttpGrid]:
        """Start a run with a bundle of `files` and give its grid, as a server's job would have it."""
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # of Flower's own
            bundle, _ = build_fab_from_files({"pyproject.toml": PYPROJECT, **(files or {})})
        control, runtime = self._client(ControlHttpClient, "flwr CLI"), self._client(RuntimeHttpClient, "SuperExec")
        digest = hashlib.sha256(bundle).hexdigest()
        control.StartRun(StartRunRequest(fab=fab_to_proto(Fab(digest, bundle, {})), federation=""))
        task = until(lambda: self._acquire(runtime), "a task")
        grid = HttpGrid(
            f"127.0.0.1:{self.control_port}",
            insecure=False,
            root_certificates=self.authority.pem.encode(),
            token=task.token,
        )
        client = grid._runtime_client
        heart = HeartbeatSender(make_task_heartbeat_fn_http(client))
        heart.start()
        given = client.PullTaskInput(PullTaskInputRequest())
        TaskIdentity.task_id, TaskIdentity.run_id = given.task_id, given.run.run_id
        TaskIdentity.node_id = given.context.node_id
        grid.set_run(run_from_proto(given.run))
        try:
            yield grid
        finally:
            if self.process is not None:
                client.PushTaskOutput(PushTaskOutputRequest(sub_status=SubStatus.COMPLETED, details=""))
            heart.stop()
            grid.close()
            runtime.close()
            control.close()

    @staticmethod
    def _acquire(runtime: Any) -> Any:
        response = runtime.AcquireTask(AcquireTaskRequest(supported_task_types=["flwr-serverapp"]))
        return response if response.HasField("task") and response.token else None
