"""Claim: kill -9 at random moments changes nothing: same final report, no stored answer asked for again.

An undisturbed run of a small job is timed. Then the same command is started, killed at a random moment, started
again, and so on; when a run ends by itself before the kills are used up, another folder is begun. Every finished
run's report is compared with the undisturbed one's, and its events are searched for a range of samples that was asked
about after its answer had been stored.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from consilience.common.files import read_json
from consilience.server.report import comparable
from harness import options, show

JOB: dict[str, Any] = {
    "name": "crash",
    "simulation": {
        "data": {"kind": "embedded"},
        "test": {"kind": "embedded", "split": "test"},
        "pool_share": 0.1,
        "partition": {"kind": "class-lists", "classes": [[0, 1, 2, 3, 4], [3, 4, 5, 6, 7], [6, 7, 8, 9, 0]]},
        "teachers": [{"kind": "train", "architecture": "cnn3", "fit": {"epochs": 2, "precision": "f32"}}],
    },
    "ask": {"question_size": 32},
    "student": {"architecture": "cnn3", "fit": {"epochs": 6, "precision": "f32"}},
}


def start(job: Path, out: Path) -> subprocess.Popen[bytes]:
    """Start the command a user types."""
    command = [sys.executable, "-m", "consilience", "simulate", str(job), "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def last_stage(run: Path) -> str:
    """Return what the run was doing, for the table."""
    path = run / "events.jsonl"
    if not path.exists():
        return "preparing"
    stages = [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{") and line.endswith("}")]
    named = [event["name"] for event in stages if event["event"] == "stage"]
    return str(named[-1]) if named else "preparing"


def asked_twice(run: Path) -> int:
    """Count questions that were sent for samples whose answer was already stored."""
    stored: set[tuple[str, str, int]] = set()
    again = 0
    for line in (run / "events.jsonl").read_text().splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue  # the line a kill tore
        if event["event"] not in ("asked", "answered"):
            continue
        samples = {(event["site"], event["pool"], i) for i in range(event["start"], event["stop"])}
        again += bool(samples & stored)
        if event["event"] == "answered":
            stored |= samples
    return again


def main() -> None:
    arguments = options(__doc__)
    kills_wanted = 3 if arguments.quick else 20
    chance = random.Random(0)
    stages: Counter[str] = Counter()
    runs, equal, again = 0, 0, 0
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        job = home / "job.yaml"
        job.write_text(yaml.safe_dump(JOB))
        began = time.perf_counter()
        process = start(job, home / "undisturbed")
        _, errors = process.communicate()
        assert process.returncode == 0, errors.decode()
        whole = time.perf_counter() - began
        truth = comparable(read_json(home / "undisturbed" / "report.json"))
        kills, finished = 0, True
        while kills < kills_wanted or not finished:
            out = home / f"run-{runs}"
            process = start(job, out)
            moment = chance.uniform(0.1, 1.0) * whole if kills < kills_wanted else None
            try:
                _, errors = process.communicate(timeout=moment)
                assert process.returncode == 0, errors.decode()
                finished = True
                runs += 1
                equal += comparable(read_json(out / "report.json")) == truth
                again += asked_twice(out)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                kills += 1
                finished = False
                stages[last_stage(out)] += 1
    where = ", ".join(f"{stage} {count}" for stage, count in stages.most_common())
    rows = [
        ("kills", str(kills), where),
        ("finished runs", str(runs), f"undisturbed run: {whole:.0f} s"),
        ("reports equal to the undisturbed one", str(equal), f"of {runs}"),
        ("answers asked for again", str(again), "of those that had been stored"),
    ]
    figures = {"kills": kills, "stages": dict(stages), "runs": runs, "equal": equal, "asked_again": again}
    show("kill -9 at random moments", ("", "count", ""), rows, figures, arguments.json)
    if equal != runs or again:
        sys.exit(1)


if __name__ == "__main__":
    main()
