"""server.yaml, and where things lie in the server's folder.

Lives here: the fields a coordinator may write, and every name in the folder. Does not live here: what is in the files
(authority: certificates; admission: sites), and jobs (common/settings).
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from consilience.common.errors import RunError, ServerError
from consilience.common.files import lock
from consilience.common.settings import Settings
from consilience.common.settings_file import load_settings

HOME_VARIABLE = "CONSILIENCE_SERVER_HOME"
LOCK_SECONDS = 10.0
"""How long a command waits for another one that works in the same folder."""
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


def _host(value: str) -> str:
    """Return a DNS name in lower case or an IP address in its shortest form. Raises `ValueError`."""
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(value))
    name = value.lower()
    if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in name.split(".")) or _is_number(name):
        raise ValueError(f"{value!r} is neither a DNS name nor an IP address")
    return name


def _is_number(name: str) -> bool:
    return name.rpartition(".")[2].isdigit()


def _address(value: str) -> str:
    """Return host:port with the host as `_host` gives it, an IPv6 address in brackets. Raises `ValueError`."""
    host, _, port = value.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not host or not re.fullmatch(r"[0-9]{1,5}", port) or not 1 <= int(port) <= 65_535:
        raise ValueError(f"{value!r} is not HOST:PORT with a port from 1 to 65535")
    if (":" in host) != bracketed:
        raise ValueError(f"{value!r} is not HOST:PORT; write an IPv6 address in brackets: [2001:db8::1]:9092")
    host = _host(host.strip("[]") if bracketed else host)
    return f"[{host}]:{int(port)}" if ":" in host else f"{host}:{int(port)}"


def _dialled(value: str) -> str:
    address = _address(value)
    if split_address(address)[0] in ("0.0.0.0", "::"):
        raise ValueError(f"{value!r} is no address that a site could connect to; name the server as sites see it")
    return address


def split_address(address: str) -> tuple[str, int]:
    """Return host (without brackets) and port of an address that a settings file held."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


Host = Annotated[str, Field(max_length=253), AfterValidator(_host)]
Address = Annotated[str, Field(max_length=260), AfterValidator(_address)]


class ServerSettings(Settings):
    """server.yaml: where the server listens and under which names sites know it."""

    address: Annotated[str, Field(max_length=260), AfterValidator(_dialled)]
    """host:port that sites connect to; it stands in their kits and in the server's certificate."""
    names: tuple[Host, ...] = ()
    """Further DNS names and IP addresses that the server's certificate is for."""
    listen: Address = "0.0.0.0:9092"
    """host:port on this machine where sites' connections arrive: the one port that a firewall must let through."""
    control_port: int = Field(default=9093, ge=1, le=65_535)
    """Port on 127.0.0.1 for this machine's own commands. It has no authentication: never let others reach it."""

    @model_validator(mode="after")
    def _two_ports(self) -> ServerSettings:
        if split_address(self.listen)[1] == self.control_port:
            raise ValueError(f"listen and control_port both name port {self.control_port}; give each its own")
        return self


@dataclass(frozen=True)
class Home:
    """The server's folder."""

    folder: Path

    @classmethod
    def find(cls, option: Path | None) -> Home:
        """Return the server's folder: `option`, $CONSILIENCE_SERVER_HOME, here when server.yaml is, or ./server.

        Raises `ServerError` when it holds no server.yaml.
        """
        named = option or (Path(value) if (value := os.environ.get(HOME_VARIABLE)) else None)
        home = cls(named or (Path() if Path("server.yaml").exists() else Path("server")))
        if not home.settings_file.exists():
            raise ServerError(
                f"{home.folder} is no server's folder: it holds no server.yaml",
                hint=f"Make one with `consilience server init`, or name it with --home or {HOME_VARIABLE}",
            )
        return home

    @property
    def settings_file(self) -> Path:
        """The server's settings."""
        return self.folder / "server.yaml"

    @property
    def ca_key(self) -> Path:
        """The certificate authority's private key."""
        return self.folder / "ca.key"

    @property
    def ca_certificate(self) -> Path:
        """The certificate authority's certificate: what sites trust."""
        return self.folder / "ca.crt"

    @property
    def server_key(self) -> Path:
        """The server's private key."""
        return self.folder / "server.key"

    @property
    def server_certificate(self) -> Path:
        """The server's certificate."""
        return self.folder / "server.crt"

    @property
    def database(self) -> Path:
        """The SuperLink's database, which it makes itself."""
        return self.folder / "superlink.db"

    @property
    def sites(self) -> Path:
        """Folder of admission records."""
        return self.folder / "sites"

    @property
    def runs(self) -> Path:
        """Folder of run folders."""
        return self.folder / "runs"

    def settings(self) -> ServerSettings:
        """Read server.yaml. Raises `SettingsError`."""
        return load_settings(self.settings_file, ServerSettings)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other commands from changing certificates and admissions; waits for one that is at it.

        The lock is on `sites`, not on the whole folder, in which runs are at work. Raises `RunError`, `StorageError`.
        """
        with contextlib.ExitStack() as stack:
            until = time.monotonic() + LOCK_SECONDS
            while True:
                try:
                    stack.enter_context(lock(self.sites))
                    break
                except RunError as error:
                    if time.monotonic() > until:
                        raise RunError(error.message, hint="Wait for it, then run the same command again") from error
                    time.sleep(0.05)
            yield
