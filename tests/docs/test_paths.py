"""The paths of the site's engineer and of the coordinator, walked by a stranger: the pages' own commands, in order, as
processes on loopback, with the files that the pages' own words ask for.

What is not theirs: `pip install` (tests/test_packaging.py installs), and a name and two ports of this machine.
"""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import chdir, contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from consilience.__main__ import app
from consilience.common.data import open_data
from consilience.common.identity import Kit, Request
from consilience.common.settings import EmbeddedData
from consilience.deploy.processes import free_ports
from helpers.pages import ROOT, blocks, typed
from helpers.superlink import until

SITE, SERVER = ROOT / "docs" / "site.md", ROOT / "docs" / "coordinator.md"
SETTING_UP = ["python3 -m venv consilience", ". consilience/bin/activate", "pip install consilience"]
PATIENCE = 240


class Person:
    """Somebody who types what a page says, line by line."""

    def __init__(self, folder: Path, page: Path, section: str, **other: str) -> None:
        self.folder, self.left, self.other = folder, typed(page, section), other
        self.count = len(self.left)
        self.running: list[subprocess.Popen[bytes]] = []
        folder.mkdir(exist_ok=True)

    def _next(self, expected: str) -> list[str]:
        line = self.left.pop(0)
        assert line.startswith(expected), line
        for shown, here in self.other.items():
            line = line.replace(shown, here)
        program, *words = shlex.split(line)
        assert program == "consilience"
        return [sys.executable, "-m", "consilience", *words]

    def asks(self, expected: str) -> str:
        """Type the next line in this process, which saves the seconds of a start; returns what it said."""
        words = self._next(expected)[3:]
        with chdir(self.folder):
            result = CliRunner(env={"COLUMNS": "200"}).invoke(app, words)
        assert result.exit_code == 0, f"{expected}\n{result.output}"
        return result.output

    def types(self, expected: str, answer: str = "") -> str:
        """Type the next line and wait for its end; returns what it said."""
        if not answer:
            done = subprocess.run(
                self._next(expected), cwd=self.folder, capture_output=True, text=True, timeout=PATIENCE, check=False
            )
        else:
            ours, theirs = pty.openpty()
            try:
                os.write(ours, f"{answer}\n".encode())
                done = subprocess.run(
                    self._next(expected),
                    cwd=self.folder,
                    stdin=theirs,
                    capture_output=True,
                    text=True,
                    timeout=PATIENCE,
                    check=False,
                )
            finally:
                os.close(ours)
                os.close(theirs)
        assert done.returncode == 0, f"{expected}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def starts(self, expected: str) -> subprocess.Popen[bytes]:
        """Type the next line, which runs until it is stopped."""
        with (self.folder / "log").open("ab") as log:
            child = subprocess.Popen(self._next(expected), cwd=self.folder, stdout=log, stderr=log)
        self.running.append(child)
        return child

    def log(self) -> str:
        """What those said."""
        return (self.folder / "log").read_text()

    def says(self, text: str, times: int = 1) -> None:
        """Wait until they have said something."""
        until(lambda: self.log().count(text) >= times, f"{text!r} in\n{self.log()}")


@contextmanager
def ending(*people: Person) -> Iterator[None]:
    """Stop whatever still runs."""
    try:
        yield
    finally:
        for child in [child for person in people for child in person.running]:
            if child.poll() is None:
                child.terminate()
                with suppress(subprocess.TimeoutExpired):
                    child.wait(20)
                child.kill()


def private_and_public(site: Path, server: Path) -> None:
    """Make what people have before they begin: private data, public images, judging data."""
    data = open_data(EmbeddedData(kind="embedded"))
    labels = data.need_labels("the embedded data")
    private = np.flatnonzero(labels < 3)[:150]
    np.savez(site / "private.npz", x=data.read()[private], y=labels[private], names=np.array(data.class_names[:3]))
    (server / "images").mkdir()
    for i, image in enumerate(data.subset(np.flatnonzero(labels < 3)[200:400]).read()):
        Image.fromarray(image.squeeze()).save(server / "images" / f"{i:04d}.png")
    test = open_data(EmbeddedData(kind="embedded", split="test"))
    chosen = np.flatnonzero(test.need_labels("the embedded data") < 3)[:60]
    np.savez(server / "test.npz", x=test.read()[chosen], y=test.need_labels("")[chosen], names=data.class_names[:3])


def words_in(text: str) -> str:
    """Return the eight words that a command has shown."""
    return next(line.strip() for line in text.splitlines() if re.fullmatch(r" *([a-z]+ ){7}[a-z]+", line))


@pytest.mark.slow
def test_a_stranger_gets_from_nothing_to_a_report_by_the_pages_alone(tmp_path: Path) -> None:
    fleet, control = free_ports(2)
    engineer = Person(tmp_path / "engineer", SITE, "The path")
    coordinator = Person(
        tmp_path / "coordinator", SERVER, "The path", **{"learn.example.org:9092": f"127.0.0.1:{fleet}"}
    )
    assert engineer.count <= 8
    assert coordinator.count <= 5
    private_and_public(engineer.folder, coordinator.folder)
    began = time.monotonic()
    with ending(coordinator, engineer):
        before = Person(coordinator.folder, SERVER, "")
        assert [before.left.pop(0) for _ in SETTING_UP] == SETTING_UP
        before.types("consilience pool build")
        coordinator.types("consilience server init")
        settings = coordinator.folder / "server" / "server.yaml"
        settings.write_text(settings.read_text().replace("control_port: 9093", f"control_port: {control}"))
        coordinator.starts("consilience server start")

        assert [engineer.left.pop(0) for _ in SETTING_UP] == SETTING_UP
        words = words_in(engineer.types("consilience site init"))
        site = engineer.folder / "hospital-a"
        shutil.copy(site / "request.json", coordinator.folder / "request.json")
        assert Request.read(coordinator.folder / "request.json").words == words

        said = coordinator.types("consilience server approve", answer="y")
        assert words in said
        shutil.copy(coordinator.folder / "hospital-a-kit.json", site / "kit.json")
        shutil.copytree(coordinator.folder / "pool", site / "pool")
        (engineer.folder / "private.npz").rename(site / "private.npz")
        (shown,) = blocks(SITE, "yaml")
        given = yaml.safe_load((site / "site.yaml").read_text())
        (site / "site.yaml").write_text(yaml.safe_dump({**given, **yaml.safe_load(shown)}))

        engineer.types("consilience site train")
        coordinator.says("the SuperLink is up")
        coordinator.says("hospital-a is admitted")
        checked = " ".join(engineer.types("consilience site check").split())
        assert "problem" not in checked
        assert Kit.read(site / "kit.json").words.split()[0] in checked
        agent = engineer.starts("consilience site start")
        engineer.says("connected to")
        approved = time.monotonic() - began

        (job,) = blocks(SERVER, "yaml")
        (coordinator.folder / "job.yaml").write_text(job)
        coordinator.types("consilience server submit")
        assert "student" in coordinator.types("consilience server report")
        finished = time.monotonic() - began
        (run,) = (coordinator.folder / "server" / "runs").glob("clothes-*")
        report = json.loads((run / "report.json").read_text())
        assert [held["answers"] for held in report["sites"]] == [200]
        assert report["student"]["accuracy"] > 0.4
        assert engineer.left == coordinator.left == []

        later(coordinator, engineer, agent)
    with (Path(os.environ.get("STRANGER_LOG", os.devnull))).open("a") as log:
        log.write(f"{engineer.count} and {coordinator.count} commands; approved {approved:.1f} s, {finished:.1f} s\n")


def later(coordinator: Person, engineer: Person, agent: subprocess.Popen[bytes]) -> None:
    """Walk through the coordinator's other sections with the server and agent that run."""
    looking = Person(coordinator.folder, SERVER, "What to look at")
    assert "hospital-a" in looking.asks("consilience server sites")
    assert "hospital-a" in looking.asks("consilience server status")

    changing = Person(coordinator.folder, SERVER, "Suspend, admit again, replace a key")
    changing.asks("consilience server suspend hospital-a")
    assert agent.wait(PATIENCE) == 18
    changing.asks("consilience server resume hospital-a")
    coordinator.says("hospital-a is admitted", 2)
    rotating = Person(engineer.folder, SITE, "Later")
    words = words_in(rotating.asks("consilience site init"))
    shutil.copy(engineer.folder / "hospital-a" / "request.json", coordinator.folder)
    assert words in changing.types("consilience server approve", answer="y")
    shutil.copy(coordinator.folder / "hospital-a-kit.json", engineer.folder / "hospital-a" / "kit.json")
    assert "hospital-a" in Person(engineer.folder, SITE, "What leaves").asks("consilience site show")
    again = Person(engineer.folder, SITE, "The path")
    again.left = again.left[-1:]
    second = again.starts("consilience site start")
    engineer.says("connected to", 2)
    coordinator.says("hospital-a is online", 2)

    stopping = Person(coordinator.folder, SERVER, "Stopping and crashing")
    stopping.asks("consilience server stop")
    assert coordinator.running[0].wait(PATIENCE) == 0
    for name in ("server.key", "server.crt", "runner.secret"):
        (coordinator.folder / "server" / name).unlink(missing_ok=True)  # what a restored backup lacks
    coordinator.running.append(stopping.starts("consilience server start"))
    coordinator.says("hospital-a is online", 3)
    assert ": done" in stopping.asks("consilience server submit")
    engineer.says("connected to", 3)
    second.send_signal(signal.SIGTERM)
    assert second.wait(PATIENCE) == 0
