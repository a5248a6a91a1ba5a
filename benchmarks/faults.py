"""Claim: a job survives what happens to machines, loses no answer that had arrived, and asks for none twice.

Real processes on loopback, TLS and authentication on: a server and four sites. In every run, at random moments, the
SuperLink, the server and two agents are killed with -9 and started again, and the agent of a fourth site is frozen
until the run is over. All the while an intruder who trusts another authority, and one whose key nobody approved, try
to connect. A run is good when it is done by itself, the three sites' answers are complete and exactly what their
teachers said, no sample was asked about after its answer was stored, and the intruders were given nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from crash import asked_twice

from consilience.common.data import ImageData
from consilience.common.files import read_json
from consilience.common.identity import Kit, key_fingerprint, make_key
from consilience.common.pool import Pool
from consilience.common.settings import (
    Ask,
    CallableTeacher,
    Fit,
    JobSettings,
    Policy,
    Preprocessing,
    SiteSettings,
    Student,
)
from consilience.common.settings_file import dump_settings, load_settings
from consilience.deploy.processes import join, make_server, online, start, stop
from consilience.server.answers import AnswerStore
from consilience.server.answers_about import About
from consilience.server.runs import Run, submit
from consilience.server.service_state import read_service
from consilience.server.settings import Home
from harness import options, show

SAMPLES, SIZE, CLASSES, BATCH = 2_048, 16, 5, 64
SECONDS_A_BATCH = 0.2
DEADLINE = 60.0
SITES = ("ant-hill", "bee-hive", "cow-shed", "den")
FROZEN = "den"


def teacher(images: np.ndarray[Any, np.dtype[np.float32]]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return rows that follow from each image alone, as slowly as a large model."""
    time.sleep(SECONDS_A_BATCH)
    return probabilities(images)


def probabilities(images: np.ndarray[Any, np.dtype[np.float32]]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return (n, CLASSES) rows made of the images' means."""
    means = images.reshape(len(images), -1).mean(axis=1, dtype=np.float64)
    odds = np.exp(np.sin(1000 * means[:, None] + np.arange(CLASSES)))
    return np.asarray(odds / odds.sum(axis=1, keepdims=True), np.float32)


class Place:
    """The server, the sites and the intruders of the whole benchmark."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home: Home = make_server(folder / "server")
        images = np.random.default_rng(1).integers(0, 256, (SAMPLES, SIZE, SIZE, 1), np.uint8)
        self.pool = Pool.build(ImageData((SIZE, SIZE, 1), None, (), SAMPLES, lambda ids: images[ids]), folder / "pool")
        scaled = (images / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
        self.expected = np.log(probabilities(scaled.astype(np.float32)))
        self.sites = {name: self.make_site(name, i) for i, name in enumerate(SITES)}
        self.server = start(["server", "start", "--home", str(self.home.folder)])
        wait(lambda: len(online(self.home)) == len(SITES))
        self.agents = {name: start(["site", "start", str(path)]) for name, path in self.sites.items()}
        self.intruders = Intruders(self)

    def make_site(self, name: str, index: int) -> Path:
        """Make an admitted site; returns its settings."""
        path = self.folder / name / "site.yaml"
        settings = SiteSettings(
            name=name,
            teacher=CallableTeacher(
                kind="callable",
                callable="faults:teacher",
                classes=tuple(f"class-{3 * index + k}" for k in range(CLASSES)),
                preprocessing=Preprocessing(),
            ),
            pools=(self.folder / "pool",),
            batch_size=BATCH,
            policy=Policy(precision="f32"),
        )
        dump_settings(settings, path)
        return join(self.home, path, self.folder / "papers")

    def close(self) -> None:
        """Stop everything."""
        self.intruders.close()
        self.agents[FROZEN].send_signal(signal.SIGCONT)
        stop([*self.agents.values(), self.server])

    def restart(self, name: str, chance: random.Random) -> None:
        """Kill an agent, and start it again a little later."""
        kill(self.agents[name])
        time.sleep(chance.uniform(0, 2))
        self.agents[name] = start(["site", "start", str(self.sites[name])])

    def restart_server(self, chance: random.Random) -> None:
        """Kill the server, and start it again a little later."""
        kill(self.server)
        time.sleep(chance.uniform(0, 2))
        self.server = start(["server", "start", "--home", str(self.home.folder)])

    def kill_superlink(self) -> None:
        """Kill the SuperLink; the server starts it again."""
        service = read_service(self.home.folder)
        if service is not None and service.superlink is not None:
            os.kill(service.superlink, signal.SIGKILL)


class Intruders:
    """Two strangers' agents, started again whenever they are sent away."""

    def __init__(self, place: Place) -> None:
        self._stop = threading.Event()
        self.codes: list[int] = []
        self.log = place.folder / "intruders.log"
        other = make_server(place.folder / "other-server")
        settings = load_settings(place.sites["ant-hill"], SiteSettings)
        self._files = []
        for name in ("wrong-authority", "unknown-key"):
            folder = place.folder / name
            kit = Kit.read(settings.kit)
            key = make_key(folder / "site.key")
            kit = kit.model_copy(update={"site": name, "site_fingerprint": key_fingerprint(key.public_key())})
            if name == "wrong-authority":
                kit = kit.model_copy(update={"ca": other.ca_certificate.read_text()})
            kit.write(folder / "kit.json")
            dump_settings(
                settings.model_copy(
                    update={
                        "name": name,
                        "key": folder / "site.key",
                        "kit": folder / "kit.json",
                        "state": folder / "state",
                    }
                ),
                folder / "site.yaml",
            )
            self._files.append(folder / "site.yaml")
        self._threads = [threading.Thread(target=self._try, args=(file,)) for file in self._files]
        for thread in self._threads:
            thread.start()

    def _try(self, file: Path) -> None:
        while not self._stop.is_set():
            with self.log.open("ab") as log:
                command = [sys.executable, "-m", "consilience", "site", "start", str(file)]
                child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
                while child.poll() is None and not self._stop.wait(0.2):
                    pass
                if child.poll() is None:
                    kill(child)
                else:
                    self.codes.append(child.returncode)
            self._stop.wait(10)

    def close(self) -> None:
        """Stop them."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    @property
    def were_given_something(self) -> bool:
        """Whether one was ever connected."""
        return any(word in self.log.read_text() for word in ("connected to", "answering"))


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process as a power cut would."""
    process.kill()
    process.wait()


def wait(done: Any, seconds: float = 180) -> None:
    """Wait until `done()`."""
    until = time.monotonic() + seconds
    while not done():
        if time.monotonic() > until:
            sys.exit("something did not happen in time; see the lines above")
        time.sleep(0.1)


def do_run(place: Place, number: int, chance: random.Random) -> tuple[Run, float]:
    """Do one job while things are killed; returns its run and seconds."""
    wait(lambda: sum(online(place.home).values()) == len(SITES))
    job = JobSettings(
        name=f"fault-{number}",
        seed=number,
        pool=place.folder / "pool",
        ask=Ask(encoding="f32", question_size=128, in_flight=3, wait_for=len(SITES), min_sites=3, deadline=DEADLINE),
        student=Student(architecture="cnn3", fit=Fit(epochs=1, precision="f32")),
    )
    began = time.monotonic()
    run, _ = submit(place.home.folder, job)
    wait(lambda: run.progress.get("stage") == "ask" and bool(run.progress.get("sites")))
    victims = chance.sample([name for name in SITES if name != FROZEN], 2)
    actions = [
        (chance.uniform(0, 6), lambda: place.agents[FROZEN].send_signal(signal.SIGSTOP)),
        (chance.uniform(0, 10), place.kill_superlink),
        (chance.uniform(0, 10), lambda: place.restart_server(chance)),
        (chance.uniform(0, 10), lambda: place.restart(victims[0], chance)),
        (chance.uniform(0, 10), lambda: place.restart(victims[1], chance)),
    ]
    asking = time.monotonic()
    for moment, action in sorted(actions, key=lambda entry: entry[0]):
        time.sleep(max(0.0, asking + moment - time.monotonic()))
        action()
    wait(lambda: run.state.state in ("done", "failed"), 400)
    seconds = time.monotonic() - began
    place.agents[FROZEN].send_signal(signal.SIGCONT)
    return run, seconds


def judge(place: Place, run: Run) -> dict[str, Any]:
    """Return what is to be said about a run."""
    complete, wrong = 0, 0
    for site in SITES:
        folder = run.folder / "answers" / site / place.pool.digest[:12]
        if not folder.exists():
            continue
        store = AnswerStore(folder, About.model_validate(read_json(folder / "about.json")))
        complete += store.complete and site != FROZEN
        held = np.flatnonzero(store.answered(0, SAMPLES))
        rows = np.concatenate([store.read(int(i), int(i) + 1) for i in held]) if len(held) else np.empty((0, CLASSES))
        wrong += int((np.abs(rows - place.expected[held]) > 1e-5).any(axis=1).sum())
    return {
        "state": run.state.state,
        "complete": complete,
        "wrong": wrong,
        "asked_twice": asked_twice(run.folder),
        "lost": lost(run, place),
        "report": (run.folder / "report.json").exists(),
    }


def lost(run: Run, place: Place) -> int:
    """Count samples that the events call answered and the stores do not hold."""
    missing = 0
    for line in (run.folder / "events.jsonl").read_text().splitlines():
        if not line.endswith("}"):
            continue
        event = json.loads(line)
        if event["event"] == "answered":
            folder = run.folder / "answers" / event["site"] / place.pool.digest[:12]
            store = AnswerStore(folder, About.model_validate(read_json(folder / "about.json")))
            missing += int((~store.answered(event["start"], event["stop"])).sum())
    return missing


def main() -> None:
    arguments = options(__doc__)
    os.environ["PYTHONPATH"] = f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"
    os.environ["OMP_NUM_THREADS"] = "1"
    runs = 1 if arguments.quick else 20
    chance = random.Random(int(hashlib.sha256(b"faults").hexdigest()[:8], 16))
    verdicts = []
    with tempfile.TemporaryDirectory() as name:
        place = Place(Path(name))
        try:
            for number in range(runs):
                run, seconds = do_run(place, number, chance)
                verdicts.append({**judge(place, run), "seconds": seconds})
                print(f"run {number + 1}: {verdicts[-1]}", file=sys.stderr)
        finally:
            place.close()
        given, codes = place.intruders.were_given_something, sorted(set(place.intruders.codes))
    finished = sum(v["state"] == "done" and v["report"] for v in verdicts)
    whole = sum(v["complete"] == 3 for v in verdicts)
    rows = [
        ("finished by themselves", f"{finished} of {runs}"),
        ("three sites' answers complete", f"{whole} of {runs}"),
        ("answers that differ from the teacher's", str(sum(v["wrong"] for v in verdicts))),
        ("stored answers lost", str(sum(v["lost"] for v in verdicts))),
        ("stored answers asked for again", str(sum(v["asked_twice"] for v in verdicts))),
        ("intruders given anything", f"{'yes' if given else 'no'} (exit codes {codes})"),
        ("seconds a run", f"{min(v['seconds'] for v in verdicts):.0f} to {max(v['seconds'] for v in verdicts):.0f}"),
    ]
    figures = {"runs": verdicts, "intruders_given_anything": given, "intruders_codes": codes}
    show(
        "SuperLink, server and two agents killed, one site frozen, in every run",
        ("", ""),
        rows,
        figures,
        arguments.json,
    )
    bad = any(v["wrong"] or v["lost"] or v["asked_twice"] for v in verdicts)
    if finished < runs or whole < runs or bad or given:
        sys.exit(1)


if __name__ == "__main__":
    main()
