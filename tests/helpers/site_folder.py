"""A site as a folder and a process: what an engineer would have set up, and ways to hinder it."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from flwr.app import Message, RecordDict
from flwr.superlink.grid import HttpGrid

from consilience.common.data import from_arrays
from consilience.common.identity import Kit, key_fingerprint, load_key, make_key
from consilience.common.pool import Pool
from consilience.deploy.processes import free_ports
from helpers.superlink import PATIENCE, SWITCHES, SuperLink, until

TEACHER = '''"""A teacher for tests."""
import time
from pathlib import Path

import numpy as np


def scores(images):
    """Probabilities from mean colours."""
    means = images.reshape(len(images), 3, -1).mean(axis=2)
    odds = np.exp(means - means.max(axis=1, keepdims=True))
    return odds / odds.sum(axis=1, keepdims=True)


def features(images):
    """What `scores` is made of."""
    return {"means": images.mean(axis=(2, 3))}


scores.features = features


def paced(images):
    """As `scores`, but it waits until a test lets it go on."""
    here = Path(__file__).parent
    (here / "begun").touch()
    while not (here / "go").exists():
        time.sleep(0.02)
    return scores(images)
'''


class SiteFolder:
    """A site's folder: settings, teacher, pool, key and kit."""

    def __init__(self, folder: Path, superlink: SuperLink, name: str, *, teacher: str = "scores") -> None:
        self.folder, self.name, self.superlink = folder, name, superlink
        folder.mkdir(parents=True)
        (folder / "agent_teacher.py").write_text(TEACHER)
        pixels = np.random.default_rng(0).integers(0, 256, (40, 4, 4, 3), np.uint8)
        self.pool = Pool.build(from_arrays(pixels, None, (), where="test"), folder / "pool")
        self.key = make_key(folder / "site.key")
        self.raw: dict[str, Any] = {
            "name": name,
            "teacher": {
                "kind": "callable",
                "callable": f"agent_teacher:{teacher}",
                "classes": ["red", "green", "blue"],
                "preprocessing": {},
            },
            "pools": ["pool"],
        }
        self.write_settings()
        self.write_kit()

    @property
    def file(self) -> Path:
        """The site's site.yaml."""
        return self.folder / "site.yaml"

    def write_settings(self, **changes: Any) -> None:
        """Write site.yaml anew."""
        self.raw.update(changes)
        self.file.write_text(yaml.safe_dump(self.raw))

    def write_kit(self, **changes: Any) -> Kit:
        """Write kit.json anew."""
        fields: dict[str, Any] = {
            "site": self.name,
            "site_fingerprint": key_fingerprint(load_key(self.folder / "site.key").public_key()),
            "address": self.superlink.address,
            "ca": self.superlink.authority.pem,
        }
        kit = Kit(**{**fields, **changes})
        kit.write(self.folder / "kit.json")
        return kit

    def register(self) -> int:
        """Admit the site; return its node's id."""
        return self.superlink.register(self.key.public_key(), self.name)

    def start(self, *options: str) -> AgentProcess:
        """Start its agent."""
        return AgentProcess(self, options)


class AgentProcess:
    """`consilience site start` as a process; its log is in a file."""

    count = 0

    def __init__(self, site: SiteFolder, options: tuple[str, ...] = ()) -> None:
        AgentProcess.count += 1
        self.log = site.folder / f"agent-{AgentProcess.count}.log"
        path = os.pathsep.join([str(site.folder), *filter(None, [os.environ.get("PYTHONPATH")])])
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "consilience", "site", "start", str(site.file), *options],
                stdout=subprocess.DEVNULL,
                stderr=log,
                env={**os.environ, "PYTHONPATH": path, "FLWR_HOME": str(site.folder / "home")},
            )

    def text(self) -> str:
        """What it logged."""
        return self.log.read_text()

    def says(self, text: str, times: int = 1) -> None:
        """Wait until its log holds `text` so many times."""

        def held() -> bool:
            assert self.process.poll() is None or text in self.text(), self.text()
            return self.text().count(text) >= times

        until(held, f"the agent says {text!r}; it said:\n{self.text()}")

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send it a signal and return its exit code."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)

    def wait(self) -> int:
        """Return its exit code once it ended by itself."""
        return self.process.wait(PATIENCE)

    def __enter__(self) -> AgentProcess:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(PATIENCE)


def ask(grid: HttpGrid, node: int, kind: str, *contents: RecordDict) -> list[Message]:
    """Send messages to a node and return the replies in order."""
    sent = list(grid.push_messages([Message(content, node, kind) for content in contents]))
    replies: dict[str, Message] = {}

    def arrived() -> bool:
        for reply in grid.pull_messages(set(sent) - set(replies)):
            replies[reply.metadata.reply_to_message_id] = reply
        return len(replies) == len(sent)

    until(arrived, f"replies to {kind}")
    return [replies[identifier] for identifier in sent]


def health(port: int) -> tuple[int, dict[str, Any]]:
    """GET /health; status 0 while nobody listens."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        response = connection.getresponse()
        return response.status, yaml.safe_load(response.read())
    except OSError:
        return 0, {}
    finally:
        connection.close()


class Proxy:
    """Carries TCP between agents and a server, until a test cuts it."""

    def __init__(self, target: int) -> None:
        self._target, self._held = target, list[socket.socket]()
        (self.port,) = free_ports(1)
        self.mend()

    def mend(self) -> None:
        """Carry connections, from now on."""
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self) -> None:
        """End every connection and take no new one."""
        for held in (self._listener, *self._held):
            with suppress(OSError):
                held.shutdown(socket.SHUT_RDWR)
            held.close()
        self._held.clear()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                self._held += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=(source, sink), daemon=True).start()

    @staticmethod
    def _carry(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65_536):
                sink.sendall(data)
        for held in (source, sink):
            with suppress(OSError):
                held.shutdown(socket.SHUT_RDWR)


@contextmanager
def stock_supernode(site: SiteFolder) -> Iterator[None]:
    """Run Flower's own SuperNode with the site's key, which starts a process per message."""
    (port,) = free_ports(1)
    tools = Path(sys.executable).parent
    (site.folder / "ca.crt").write_text(site.superlink.authority.pem)
    command = [str(tools / "flower-supernode"), "--root-certificates", str(site.folder / "ca.crt")]
    command += ["--superlink", site.superlink.address, "--auth-supernode-private-key", str(site.folder / "site.key")]
    command += ["--host", "127.0.0.1", "--port", str(port), "--node-config", f'site="{site.file}"']
    path = os.pathsep.join([str(site.folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {
        **os.environ,
        **SWITCHES,
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": path,
        "FLWR_HOME": str(site.folder / "home"),
    }
    with (site.folder / "supernode.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(PATIENCE)
